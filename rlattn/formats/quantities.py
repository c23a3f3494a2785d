r"""Numbers and units of cleaned answers (`answer_text.clean`): `24 \text{cm}^{2}` is 24, of square centimetres."""

import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise

Unit = tuple[str, ...]
"""The parts of a unit, in order and in one spelling: `miles per hour` and `mph` are `("mi", "h")`."""

_SPELLINGS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter", "m": "meter metre mtr",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "nm": "nanometer",
    "mg": "milligram", "g": "gram gramme gm", "kg": "kilogram kilo", "oz": "ounce", "pound": "lb £", "ton": "tonne",
    "ml": "milliliter millilitre", "l": "liter litre", "gal": "gallon", "ms": "millisecond", "s": "second sec",
    "min": "minute", "h": "hour hr", "d": "day", "week": "wk", "month": "mo", "year": "yr", "dollar": "$ usd buck",
    "euro": "€ eur", "yen": "¥", "rupee": "₹ rs", "cent": "¢", "%": "percent percentage pct", "°": "degree deg",
    "mi h": "mph", "km h": "kph kmph kmh", "c": "celsius", "f": "fahrenheit", "person": "people", "child": "children",
    "am": "", "pm": "", "hz": "", "ev": "", "kj": "", "kw": "", "kn": "", "mw": "", "gb": "", "mb": "", "rad": "radian",
}  # fmt: skip
_MEASURES = {word: unit for unit, words in _SPELLINGS.items() for word in (unit, *words.split())}
_LETTERS_AFTER_A_NUMBER = {"m", "g", "h", "l", "s"}
_SHORT_AFTER_A_FORMULA = {"mm", "cm", "km", "ft", "kg"}
_FILLERS = {"per", "a", "an", "of", "the"}
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# Words after a number that say something else of it than its unit.
_NOT_UNITS = re.compile(
    rf"\b(?:{'|'.join(_SCALES)}|dozen|half|halves|third|thirds|quarters?|fifths?|tenths?|squared|cubed|factorial|and|or|"
    r"not|no|to|plus|minus|times|pi|sqrt|sin|cos|tan|log|ln|exp|infinity|mod|less|more|than|if|when|where|for|is|are)\b"
)
_TOKEN = re.compile(
    r"(?P<text>\\text\{[^{}]*\})|(?P<joint>[/*-]|\\cdot)|(?P<command>\\[a-zA-Z]+)|(?P<word>[ap]\.\s?m\b|[^\W\d_]+)"
    r"|(?P<power>\^\s*(?:\{\s*-?\d\s*\}|-?\d)(?!\d))|(?P<sign>[%$€£¥₹¢°])|(?P<space>\s+)|(?P<other>.)",
    re.IGNORECASE | re.DOTALL,
)
_CURRENCY = re.compile(r"([-+]?)\s*([$€£¥₹])\s*(?=[-+.\d\\])")


def without_units(cleaned: str) -> tuple[str, list[Unit]]:
    """The value of an answer, and the units of its parts: one, or of a list (`3 cm, 4 cm`) one of each that has one."""
    values, units = zip(*map(_without_unit, _listed(cleaned)), strict=True)
    return ",".join(values), [unit for unit in units if unit]


def _listed(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _without_unit(text: str) -> tuple[str, Unit]:
    currency = _CURRENCY.match(text.strip())
    if currency:
        text = currency[1] + text.strip()[currency.end() :]
    value, unit = _split(text)
    parts = _parts((currency[2] if currency else "") + " " + unit)
    base = re.fullmatch(r"\s*(\d+)_(\d+|\{\d+\})\s*", value)
    return (base[1], (*parts, f"base {base[2].strip('{}')}")) if base else (value, parts)


def _split(text: str) -> tuple[str, str]:
    tokens = list(_TOKEN.finditer(text))
    start = len(tokens)
    while start and _in_unit(tokens, start - 1):
        start -= 1
    while start < len(tokens) and tokens[start].lastgroup not in ("text", "word", "sign"):
        start += 1
    if start == len(tokens):
        return text, ""
    first = tokens[start]
    value, unit = text[: first.start()].rstrip(" -"), text[first.start() :]
    if re.fullmatch(r"\s*-?\s*", value) or _NOT_UNITS.search(_words(unit)):
        return text, ""
    head = _parts(unit)[:1]
    if not re.search(r"[\d\\]", value) and not (head and head[0] in _SPELLINGS):
        return text, ""
    if first.lastgroup == "word" and len(first[0]) < 3 and number(value) is None:
        return (value, unit) if first[0].lower() in _SHORT_AFTER_A_FORMULA else (text, "")
    return value, unit


def _in_unit(tokens: list[re.Match[str]], at: int) -> bool:
    token, before = tokens[at], tokens[at - 1] if at else None
    if token.lastgroup != "word":
        return token.lastgroup in ("text", "joint", "power", "sign", "space")
    word = token[0].lower()
    if not word.isascii() or not word.isalpha():  # an ideogram, `p.m.`
        return True
    after_space = before is not None and before.lastgroup == "space"
    if len(word) > 2:
        return word in _MEASURES or not _are_variables(word, after_space=after_space)
    if len(word) == 2:
        return word in _MEASURES or word in _POWERS or word in _FILLERS or word in ("st", "nd", "rd", "th")
    previous = next((t[0] for t in reversed(tokens[:at]) if t.lastgroup != "space"), "")
    if previous == "/" or previous.lower() == "per" or (previous == "°" and word in "cfk"):
        return True
    return after_space and (word in _FILLERS or (word in _LETTERS_AFTER_A_NUMBER and previous[-1:] in "0123456789}"))


def _are_variables(word: str, *, after_space: bool) -> bool:
    """Whether letters after a value are factors, as in `6xyz`, `2 abc`, and no word."""
    steps = [ord(b) - ord(a) for a, b in pairwise(word)]
    return all(step == 1 for step in steps) or (not after_space and len(word) < 5 and min(steps) > 0)


def _words(unit: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}|\\cdot", r" \1 ", unit.casefold()).replace(".", "")


def _parts(unit: str) -> Unit:
    parts: list[str] = []
    power = ""
    for word in re.findall(r"[^\W\d_]+|\d|[%$€£¥₹¢°]", _words(unit)):
        if word in _POWERS:
            power = _POWERS[word]
        elif word not in _FILLERS and word not in ("st", "nd", "rd", "th"):
            stem = word.rstrip("s") or word
            if stem == "unit":  # units of whatever
                break
            parts += _MEASURES.get(word, _MEASURES.get(stem, stem)).split()
            if power:
                parts.append(power)
                power = ""
    return tuple(parts)


def units_agree(answer: Iterable[Unit], gold: Iterable[Unit]) -> bool:
    """Whether no unit of one side contradicts the other's: a side may name none, or less of it (`miles` per hour)."""
    golds = list(gold)
    return not golds or all(any(_agree(unit, other) for other in golds) for unit in answer)


def _agree(a: Unit, b: Unit) -> bool:
    named = {*a, *b} & _SPELLINGS.keys()
    return all(x == y for x, y in zip(a, b, strict=False)) or (not named and not {*a}.isdisjoint(b))


_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<minus>-?)\s*"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s*/\s*(?P<under>\d+)"
    r"|(?P<head>\d*)\.(?P<once>\d*)\\(?:overline|bar|dot)\{(?P<again>\d{1,30})\}"
    rf"|(?P<decimal>{_INTEGER}?\.\d+|{_INTEGER}\.?)"
    r"(?:e(?P<power>[-+]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*(?P<exponent>[-+]?\d{1,3})\s*\}?)?"
    rf"(?:\s*(?:\\text\{{)?(?P<scale>{'|'.join(_SCALES)})\}}?)?)",
    re.IGNORECASE,
)


def number(value: str) -> Fraction | None:
    """The number that a value is, exactly, or None where it is more or less than one."""
    match = _NUMBER.fullmatch(re.sub(r"\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}", r" \1/\2", value).strip())
    if match is None or (match["sign"] and match["minus"]) or (match["under"] and int(match["under"]) == 0):
        return None
    if match["over"]:
        found = int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))
    elif match["again"]:
        once, period = len(match["once"]), len(match["again"])
        digits = int((match["head"] or "0") + match["once"] + match["again"])
        found = Fraction(digits - int((match["head"] or "0") + match["once"]), 10**once * (10**period - 1))
    else:
        power = int(match["power"] or match["exponent"] or 0) + _SCALES.get((match["scale"] or "").lower(), 0)
        found = Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** power
    return -found if "-" in (match["sign"], match["minus"]) else found


def same_number(answer: Fraction, gold: Fraction, *, decimals: bool) -> bool:
    """Equal; where one is written in `decimals`, to six of them, and below a thousandth to six digits."""
    if answer == gold or not decimals or round(answer, 6) != round(gold, 6):
        return answer == gold
    largest = max(abs(answer), abs(gold))
    return largest >= Fraction(1, 1000) or abs(answer - gold) <= largest * Fraction(5, 10**6)
