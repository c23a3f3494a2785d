r"""The final answer of a worked response, and whether two answers are the same.

An answer is looked for in two tiers; the first tier that has one decides, and inside a tier the last one wins:

1. explicit marks: `<answer>x</answer>`, `\boxed{x}` (braces may nest), `\fbox{x}`;
2. lines: `#### x`, `A: x`, `Answer: x`, `Final answer: x`, `the answer is x` (to the end of the sentence).

Lines come second because prose is loose: a markdown heading `#### Step 2` must not outdo a box. A mark inside a mark
is opened (`<answer>\boxed{5}</answer>` is `5`). Only what follows the last `</think>` counts, where there is one; a
`<think>` that is never closed holds no final answer.
"""

import logging
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from inspect import CO_GENERATOR
from math import prod
from types import FrameType

from rlattn.formats.thought import after_thought

LONGEST_ANSWER = 2000
"""Characters; what is longer is prose, not an answer."""
LONGEST_FORMULA = 256
"""Characters; what is longer is compared as text only: computer algebra takes unbounded time on long input."""
CALL_BUDGET = 1_000_000
"""Python calls that one comparison by computer algebra may take (a second or two) before it counts as unequal."""

_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|([{}])", re.DOTALL)
_LINE = re.compile(
    r"(?:(?<!\#)\#{4}(?!\#)[ \t]*"
    r"|^[ \t>*_]*A[*_]*[ \t]*:[ \t]*"
    r"|^[ \t>*_]*(?i:(?:the\ |my\ )?(?:final\ )?answer)[*_]*[ \t]*:\s*"
    # the colon first: an optional one between two runs of spaces would make this quadratic in spaces
    r"|(?i:\banswer[ \t]+is\b)(?:[ \t]*:)?\s*)"
    r"(\S.*)",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z]|[\s*_]*$)")


def final_answer(text: str) -> str | None:
    """The final answer of `text`, bare of its mark, or None where it gives none. Never raises; cost: linear in `text`.

    See the head of this module for the marks and which of them wins.
    """
    found = _last_marked(after_thought(text))
    while found is not None and (inside := _last_marked(found)) is not None:
        found = inside
    return found


def gold_answer(text: str) -> str:
    """The answer of a gold column: the final answer where it holds worked steps, else all of it."""
    answer = final_answer(text)
    return after_thought(text).strip() if answer is None else answer


def _last_marked(text: str) -> str | None:
    marks = [mark for mark in [*_tagged(text), *_boxed(text)] if 0 < len(mark[1]) <= LONGEST_ANSWER]
    if marks:
        return max(marks)[1]
    lines = [content for match in _LINE.finditer(text) if (content := _sentence(match[1]))]
    return lines[-1] if lines and len(lines[-1]) <= LONGEST_ANSWER else None


def _tagged(text: str) -> list[tuple[int, str]]:
    """(end, content) of the last filled `<answer>…</answer>`. By `rfind`: a regex is quadratic in unclosed tags."""
    end = len(text)
    while (end := text.rfind("</answer>", 0, end)) >= 0:
        start = text.rfind("<answer>", 0, end)
        if start < 0:
            break
        if content := text[start + len("<answer>") : end].strip():
            return [(end, content)]
    return []


def _boxed(text: str) -> list[tuple[int, str]]:
    """(end, content) of every closed box, in one pass over the braces."""
    boxes: list[tuple[int, str]] = []
    open_braces: list[int | None] = []
    for match in _BRACES.finditer(text):
        if match[1]:
            open_braces.append(match.end())
        elif match[2] == "{":
            open_braces.append(None)
        elif match[2] == "}" and open_braces:
            start = open_braces.pop()
            # a longer one is no answer, and slicing every box of a deep nest would be quadratic
            if start is not None and match.start() - start <= LONGEST_ANSWER + 2:
                boxes.append((match.start(), text[start : match.start()].strip()))
    return boxes


def _sentence(line: str) -> str:
    end = _SENTENCE_END.search(line)
    return (line[: end.start()] if end else line).strip().strip("*_").strip()


def same_answer(answer: str, gold: str) -> bool:
    """Whether `answer` is right where `gold` is. Never raises; works in any thread; takes seconds at worst.

    Equal texts are the same up to case, spaces and LaTeX wrapping. Two numbers are compared as numbers, to six decimals
    where one is written in decimals: `1,000` is `1000.0`, `50%` is `50` and `0.5`, `$18` is `18 dollars` and `18`, yet
    not `18 cents`. Anything else that looks like mathematics is judged by math-verify; words only by their text.
    """
    if len(answer) > LONGEST_ANSWER or len(gold) > LONGEST_ANSWER:
        return answer.strip() == gold.strip()
    answer, gold = _normal(answer), _normal(gold)
    if answer.casefold() == gold.casefold():
        return bool(answer)
    a, g = _quantity(answer.casefold()), _quantity(gold.casefold())
    if a is not None and g is not None:
        return _same_quantity(a, g, decimals="." in answer + gold)
    if not (_is_formula(answer) and _is_formula(gold)):
        return False
    return _same_formula(answer, gold)


_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_NOT_CONTENT = re.compile(r"\\[;: ]|\\(?:left|right|quad|displaystyle)(?![a-zA-Z])|[\u200b\ufeff]")


def _normal(text: str) -> str:
    """`text` without what does not change an answer: outer `$`, `\\text`, thin spaces, bold, a final full stop."""
    kept = text.strip()
    plain = kept.replace("−", "-").replace("–", "-").replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    plain = _TEXT_COMMAND.sub(r" \1 ", re.sub(r"\\!\s*|\\,", "", plain))
    plain = " ".join(_NOT_CONTENT.sub(" ", plain).split()).rstrip(".").strip()
    for opening, closing in (("**", "**"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("(", ")")):
        inner = plain[len(opening) : -len(closing)].strip()
        # Brackets go from around one letter only, a choice such as (B): elsewhere they are intervals and points.
        if plain.startswith(opening) and plain.endswith(closing) and inner and (opening != "(" or len(inner) == 1):
            plain = inner
    return plain or kept


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[$€£]?)\s*(?P<minus>-?)"
    rf"(?:(?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s*/\s*(?P<under>\d+)"
    rf"|(?P<decimal>{_INTEGER}?\.\d+|{_INTEGER}\.?)(?:e(?P<power>[-+]?\d{{1,2}}))?)"
    # Short letters after a number are a factor (18x, 18 xy) unless they are a known unit.
    r"(?P<unit>\s*%|(?:\s*(?:cm|mm|km|ft|in|mi|kg|mg|lb|oz|ml|hr|ms|am|pm|[a-z]{3,})|\s+[mghls])"
    r"\.?(?:\s*\^?\{?[23]\}?)?(?:(?:\s+|/)[a-z]+)*)?"
)
_UNITS = {"$": "dollar", "€": "euro", "£": "pound", "percent": "%"}
# Words that change the number in front of them: `18 million` is not 18 with a unit.
_NOT_UNITS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|halves|third|thirds|quarters?|fifths?|tenths?|squared|"
    r"cubed|factorial|and|or|not|to|plus|minus|times|pi|sqrt|mod|less|more|than)\b"
)


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """A number and its unit ("" for none), or None where `text` is more or less than that."""
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["minus"]):
        return None
    words = (match["unit"] or "").strip()
    if _NOT_UNITS.search(words) or (match["under"] and int(match["under"]) == 0):
        return None
    if match["over"]:
        value = int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))
    else:
        value = Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** int(match["power"] or 0)
    unit = re.split(r"[\s/^{.]", words)[0]
    unit = _UNITS.get(match["currency"] or unit, unit)
    return (-value if "-" in (match["sign"], match["minus"]) else value), (unit.rstrip("s") or unit)


def _same_quantity(a: tuple[Fraction, str], g: tuple[Fraction, str], *, decimals: bool) -> bool:
    (value, unit), (gold, gold_unit) = a, g
    if unit and gold_unit and unit != gold_unit:
        return False
    pairs = [(value, gold)]
    if "%" in (unit, gold_unit) and unit != gold_unit:
        pairs.append((value / 100, gold) if unit == "%" else (value, gold / 100))
    return any(x == y or (decimals and round(x, 6) == round(y, 6)) for x, y in pairs)


_NAMED = re.compile(r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sin|cos|tan|log|ln|exp|sqrt|pi)(?![a-zA-Z])")
_MATRIX = re.compile(r"\\(?:begin|end)\{[pbv]?matrix\}")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
# What a final answer is written in. Sums, integrals, limits, gamma functions and the like are work still to be done,
# and may take for ever to do: they are compared as text.
_COMMANDS = re.compile(
    r"[dtc]?frac|sqrt|[dt]?binom|cdot|times|div|pm|mp|pi|infty|circ|degree|mathbb|emptyset|varnothing|cup|cap|setminus|in|"
    r"le|leq|leqslant|ge|geq|geqslant|lt|gt|neq?|land|lor|[lr]brace|[lr]brack|"
    r"(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|log|ln|exp|"
    r"alpha|beta|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|omega"
)


def _is_formula(text: str) -> bool:
    """Whether computer algebra may judge `text`: it would read words as products of letters, `3 4` as 12."""
    bare = _MATRIX.sub(" ", _NAMED.sub(r"\\\1", text))
    if len(text) > LONGEST_FORMULA or not all(map(_COMMANDS.fullmatch, _COMMAND.findall(bare))):
        return False
    bare = _COMMAND.sub(r"\\", bare)
    return (
        re.search(r"[\d\\=<>+*/^]", bare) is not None
        and re.search(r"[a-zA-Z]{3}|\d\s+\d", bare) is None
        and _stays_small(text)
    )


def _stays_small(text: str) -> bool:
    """Whether no power, factorial or binomial of `text` can make an integer that fills the memory in one C call."""
    if re.search(r"!\s*!|[)}\]]\s*!|\d{4}\s*!|(?:binom|exp).*(?:binom|exp|\d{5})|sqrt\s*\[(?!\d{1,3}\])", text):
        return False
    plain, grouped = [1], [1]
    for match in re.finditer(r"\^|\*\*", text):
        exponent = _exponent(text[match.end() :])
        if re.search(r"\^|\*\*|!|binom|exp", exponent):
            return False
        size = max(2, int("".join(re.findall(r"[0-9]", exponent)) or 2))
        (grouped if text[: match.start()].rstrip()[-1:] in (")", "}", "]") else plain).append(size)
    return max(plain) * prod(grouped) <= 20_000


def _exponent(rest: str) -> str:
    """What a power sign at the head of `rest` governs: a bracketed group, else all up to the next operator."""
    rest, depth = rest.lstrip(), 0
    if rest.startswith("\\"):
        return rest  # a fraction, say: its parts are not told apart here
    for i, sign in enumerate(rest):
        depth += (sign in "{(") - (sign in "})")
        if depth < 0 or (depth == 0 and i and sign in "+-=,*/") or (depth == 0 and sign in "})"):
            return rest[: i + 2] if rest[i : i + 2] == "**" or rest[i + 1 : i + 2] == "^" else rest[: i + 1]
    return rest


@lru_cache(maxsize=4096)
def _same_formula(answer: str, gold: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # math-verify warns whenever its own timeouts are off; the budget below stands in for them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig()]

    def judge() -> bool:
        parsed = [
            parse(_latex(text), extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
            for text in (gold, answer)
        ]
        return verify(*parsed, timeout_seconds=None)

    return _within_budget(judge)


def _latex(text: str) -> str:
    return r"\boxed{" + _NAMED.sub(r"\\\1", text.replace("**", "^")).replace("%", r"\%") + "}"


def _within_budget(judge: Callable[[], bool]) -> bool:
    """`judge()`, or False once it has made CALL_BUDGET Python calls.

    Counted calls, not seconds: math-verify's own timeout is an alarm, which only the main thread may set, which would
    cancel other alarms, and whose verdict depends on how busy the machine is.
    """
    from math_verify.errors import TimeoutException

    left = CALL_BUDGET

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        left -= 1
        # Not in a generator: Python drops what is raised while it closes one, and the trace with it.
        if left < 0 and not frame.f_code.co_flags & CO_GENERATOR:
            raise TimeoutException  # a BaseException, so that no `except Exception` on the way swallows it

    tracer = sys.gettrace()
    sys.settrace(count)
    try:
        return judge()
    except TimeoutException:
        return False
    finally:
        sys.settrace(tracer)
