r"""A final answer as people write it, in one spelling: signs as LaTeX commands, no wrappers, one kind of space.

LaTeX is read as tokens, so that the row break `\\` is never taken for the head of `\,`. Nothing here changes what an
answer means: `½` becomes `\frac{1}{2}`, `\dfrac12` too, `\mathrm{~cm}` becomes `\text{cm}`.
"""

import re
from unicodedata import normalize

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ", "0123456789+-=()nix")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₓ", "0123456789+-=()nx")
_GREEK = dict(
    zip(
        "αβγδεϵζηθικλμνξπρσςτυφϕχψωΓΔΘΛΞΠΣΦΨΩ",
        "alpha beta gamma delta epsilon epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma varsigma tau "  # noqa: SIM905
        "upsilon phi phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
        strict=True,
    )
)
_NAMES = {
    **_GREEK,
    **dict.fromkeys("×✕⨯", "times"), **dict.fromkeys("·⋅∙•∗", "cdot"), "÷": "div", "±": "pm", "∓": "mp",
    "∞": "infty", "≤": "le", "⩽": "le", "≥": "ge", "⩾": "ge", "≠": "ne", "≈": "approx", "∪": "cup", "∩": "cap",
    "∈": "in", "∅": "emptyset", "∖": "setminus", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil",
    "∠": "angle", "△": "triangle", "∧": "land", "∨": "lor", "→": "to", "∣": "mid",
}  # fmt: skip
_SIGNS = {ord(sign): f"\\{name} " for sign, name in _NAMES.items()}
_SIGNS |= {ord(sign): "-" for sign in "−–—‐‒"} | {ord(sign): "" for sign in "\u200b\u200c\u200d\u2060\ufeff"}
_SIGNS |= {ord("、"): ",", ord("。"): ".", ord("∛"): r"\sqrt[3]", ord("∜"): r"\sqrt[4]"}
_SIGNS |= {ord(sign): rf"\mathbb{{{letter}}}" for sign, letter in zip("ℝℤℕℚℂ", "RZNQC", strict=True)}

_TOKEN = re.compile(r"\\\\\*?(?:\s*\[-?[\d.]+\s*[a-z]{2}\])?|\\(?:[a-zA-Z]+|.)|.", re.DOTALL)
_TEXTS = {"text", "textrm", "textit", "textbf", "textsf", "textnormal", "mathrm", "mathit", "mathsf", "mbox", "hbox"}
_TEXTS |= {"operatorname"}
_WRAPPERS = {"boxed", "fbox", "mathbf", "boldsymbol", "bm", "emph", "underline", "ensuremath", "mathop", "mathstrut"}
_DROPPED = {"left", "right", "displaystyle", "textstyle", "limits", "rm", "bf", "it", "(", ")", "[", "]"}
_DROPPED |= {size + side for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")}
_SPACES = {",", ";", ":", " ", ">", "\n", "quad", "qquad", "enspace", "thinspace", "space"}
_SPELLINGS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"), "dbinom": r"\binom", "tbinom": r"\binom",
    **dict.fromkeys(("leq", "leqslant"), r"\le"), **dict.fromkeys(("geq", "geqslant"), r"\ge"), "neq": r"\ne",
    "varnothing": r"\emptyset", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lt": "<", "gt": ">",
    **dict.fromkeys(("lvert", "rvert", "vert"), "|"), **dict.fromkeys(("degree", "degrees"), "°"),
    "$": "$", "%": "%", "#": "#", "&": "&", "_": "_",
}  # fmt: skip
_JOINED = "\0"
"""Where `\\!` pulls two signs together."""


def clean(text: str) -> str:
    """`text` in the one spelling. Cost: linear in it."""
    text = _tokens_read(_escaped_once(_ascii(text)))
    text = re.sub(rf"(?<=\d)(?:,\s*{_JOINED}|{_JOINED}?\s*\{{\s*,\s*\}}|{_JOINED}?,(?={_JOINED}))", "{,}", text)
    text = text.replace(_JOINED, "")
    text = re.sub(r"(?<![\d.])0\{,\}(?=\d)", "0.", text)  # the decimal comma of LaTeX; else it parts thousands
    text = re.sub(r"(?<=\d)\{,\}\s*(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text)
    text = re.sub(r"\\\\\s*(?=\\end)", "", " ".join(text.split()))
    text = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])", lambda match: match[0].replace(" ", ""), text)
    text = re.sub(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})\s?", "°", text).replace("{}°", "°")
    return _unwrapped(_fractions(text))


def _ascii(text: str) -> str:
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻⁼⁽⁾ⁿⁱˣ]+", lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀-₉₊₋₌₍₎ₙₓ]+", lambda run: f"_{{{run[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub("[º˚]", "°", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda sign: re.sub("(.+)⁄(.+)", r"\\frac{\1}{\2}", normalize("NFKC", sign[0])), text)
    text = normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    return re.sub(r"[^\W\d_]|\d", lambda sign: sign[0] if sign[0].isascii() else _ascii_digit(sign[0]), text)


def _ascii_digit(sign: str) -> str:
    return str(int(sign)) if sign.isdecimal() else sign


def _escaped_once(text: str) -> str:
    r"""Without the doubled backslashes of text that was escaped twice; a row break stands in an environment only."""
    if r"\\begin" in text:
        return text.replace(r"\\", "\\")
    return text if r"\begin" in text else re.sub(r"\\\\(?=[a-zA-Z{}$%,!;(\[])", r"\\", text)


def _tokens_read(text: str) -> str:
    tokens = _TOKEN.findall(text)
    mathematics = sum(token == "$" for token in tokens) % 2 == 0
    read: list[str] = []
    closings: list[str] = []  # what each open brace is closed with
    opened: tuple[str, str] | None = None  # what a command before it makes of the next pair of braces
    for token in tokens:
        name = token[1:] if token[0] == "\\" else None
        if opened and token.isspace():
            continue
        if token == "{":
            start, end = opened or ("{", "}")
            read.append(start)
            closings.append(end)
        elif token == "}":
            read.append(closings.pop() if closings else "}")
        elif token[:2] == r"\\":
            read.append(r"\\ ")
        elif token == "~" or name in _SPACES or (token == "$" and mathematics):
            read.append(" ")
        elif name == "!":
            read.append(_JOINED)
        elif name is not None and name not in _TEXTS | _WRAPPERS | _DROPPED:
            read.append(_SPELLINGS.get(name, token))
        elif name is None:
            read.append(token)
        opened = (r"\text{", "}") if name in _TEXTS else ("", "") if name in _WRAPPERS else None
        if name in _DROPPED and name.isalpha():
            read.append(" " if read and read[-1][-1:].isalnum() else "")
    return "".join(read)


def _fractions(text: str) -> str:
    text = re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\\text{\1}", text)
    text = re.sub(r"\\(frac|binom)\s*(\d)\s*(?:(\d)(?!\d)|(?=\{))", _braced_digits, text)
    return re.sub(r"(\\frac\{[^{}]*\})\s*(\d)(?!\d)", r"\1{\2}", text)


def _braced_digits(match: re.Match[str]) -> str:
    return f"\\{match[1]}{{{match[2]}}}" + (f"{{{match[3]}}}" if match[3] else "")


def _unwrapped(text: str) -> str:
    bare = re.sub(r"[.,;\s]+$|\s*\\\\\s*$", "", text).strip()
    for opening, closing in (("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), (r"\text{", "}"), ("(", ")")):
        inner = bare[len(opening) : -len(closing)].strip()
        if not (bare.startswith(opening) and bare.endswith(closing) and inner):
            continue
        # Round brackets go from around one letter only, a choice such as (B): elsewhere they are intervals and points.
        if "{" not in inner and "}" not in inner and (opening != "(" or (len(inner) == 1 and inner.isalpha())):
            bare = inner.rstrip(".").strip() or bare
    return bare


def key(cleaned: str) -> str:
    """What two cleaned answers must share to be the same text: no space that only sets it apart, no spare braces."""
    text = " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", cleaned).split())
    text = re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", lambda space: _kept_space(space, text), text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return text if "\\" in text else text.casefold()


def _kept_space(space: re.Match[str], text: str) -> str:
    around = text[max(0, space.start() - 1) : space.start()] + text[space.end() : space.end() + 1]
    return " " if len(around) == 2 and around.isdigit() else ""
