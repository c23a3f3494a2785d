"""Whether two formulas are the same, as math-verify says, in bounded time, and for tiny numbers too."""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from inspect import CO_GENERATOR
from itertools import accumulate
from math import prod
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

LONGEST_FORMULA = 256
"""Characters; what is longer is compared as text only: computer algebra takes unbounded time on long input."""
READ_BUDGET = 2_000_000
"""Python calls that reading one formula may take (a few seconds) before it counts as unreadable."""
COMPARE_BUDGET = 1_000_000
"""Python calls that comparing two may take (a second or two) before they count as unequal."""
DEEPEST = 15
"""Brackets and braces within one another: reading takes time without bound in their depth."""

_NAMED = re.compile(r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sin|cos|tan|log|ln|exp|sqrt|pi|infty)(?![a-zA-Z])")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{(?:[pbvB]?matrix|array)\}(?:\{[lcr| ]*\})?")
_LABEL = re.compile(r"\\text\{[^{}]*\}\s*=")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
# What a final answer is written in. Sums, integrals, limits, gamma functions and the like are work still to be done,
# and may take for ever to do: they are compared as text.
_COMMANDS = re.compile(
    r"frac|sqrt|binom|cdot|times|div|pm|mp|pi|infty|circ|mathbb|emptyset|cup|cap|setminus|in|over|le|ge|ne|land|lor|"
    r"lfloor|rfloor|lceil|rceil|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|log|ln|exp|vec|hat|bar|tilde|"
    r"overline|overrightarrow|alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|kappa|lambda|mu|nu|xi|rho|"
    r"sigma|tau|(?:var)?phi|chi|psi|omega|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|hbar|ell"
)


def same_formula(answer: str, gold: str) -> bool:
    """Whether computer algebra may judge two cleaned answers, and calls them the same.

    Never raises; works in any thread; takes seconds at worst.
    """
    if max(len(answer), len(gold)) > LONGEST_FORMULA:
        return False
    answer, gold = _latex(answer), _latex(gold)
    return _is_formula(answer) and _is_formula(gold) and _judged_same(answer, gold)


def _latex(cleaned: str) -> str:
    """A cleaned answer as math-verify reads it."""
    text = re.sub(r"\\text\{(,?\s*(?:and|or))\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])", ",", cleaned)
    text = re.sub(r",(?:\s*,)+", ",", text.replace("**", "^").replace("$", ""))
    text = re.sub(r"^([A-Za-z][A-Za-z ]{2,}?)\s*=", r"\\text{\1}=", text)
    text = re.sub(r"\\text\{([a-zA-Z]{1,6})\}", _read_aloud, text)
    text = _NAMED.sub(r"\\\1 ", text.replace("infinity", r"\infty "))
    power_of_ten = r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?![\w.])"
    text = re.sub(power_of_ten, r"\1\\cdot 10^{\2}", text)
    text = re.sub(r"(\\sqrt\s*(?:\[\d+\])?)\s*(\d+(?:\.\d+)?)", r"\1{\2}", _braced(text))
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("+/-", r"\pm ").replace("*", r"\cdot ")
    text = text.replace("°", r"^\circ ").replace("%", r"\%")
    return re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", lambda found: _ungrouped(found, text), text)


def _read_aloud(text: re.Match[str]) -> str:
    """Upright letters: a symbol, or the name of a function."""
    if _NAMED.fullmatch(text[1]):
        return f"\\{text[1]} "
    return text[1] if len(text[1]) < 3 else text[0]


def _braced(text: str) -> str:
    """With braces for the brackets of `sqrt(x)` and `2^(x)`."""
    while opening := re.search(r"(?:\\sqrt\s*(?:\[\d+\])?|\^)\s*\(", text):
        depth, start = 1, opening.end()
        for at in range(start, len(text)):
            depth += (text[at] == "(") - (text[at] == ")")
            if depth == 0:
                text = f"{text[: start - 1]}{{{text[start:at]}}}{text[at + 1 :]}"
                break
        else:
            return text
    return text


def _ungrouped(found: re.Match[str], text: str) -> str:
    """A number without the commas between its thousands; within brackets they part a list."""
    before = text[: found.start()]
    in_brackets = sum(map(before.count, "([{")) > sum(map(before.count, ")]}"))
    return found[0] if in_brackets else found[0].replace(",", "")


def _is_formula(latex: str) -> bool:
    """Whether computer algebra may judge `latex`: it would read words as products of letters, `3 4` as 12."""
    bare = _ENVIRONMENT.sub(" ", _LABEL.sub("=", latex, count=1))
    if not all(map(_COMMANDS.fullmatch, _COMMAND.findall(bare))):
        return False
    bare = _COMMAND.sub(r"\\", bare)
    return (
        re.search(r"[\d\\=<>+\-*/^!|_,]", bare) is not None
        and re.fullmatch(r"[\w\s\\{}()\[\]^+\-/=<>.,;:!|&%']*", bare, re.ASCII) is not None
        and re.search(r"(?<![_^])\d\s+\d", bare) is None
        and all(sorted(set(letters)) == list(letters) for letters in re.findall(r"[a-zA-Z]{3,}", bare))
        and max(accumulate((sign in "([{") - (sign in ")]}") for sign in latex)) <= DEEPEST
        and _stays_small(latex)
    )


def _stays_small(latex: str) -> bool:
    """Whether no power, factorial or binomial can make an integer that fills the memory in one C call."""
    inner = r"\(([a-zA-Z0-9+\- ]{1,12})\)\s*!(?!\s*!)"
    counted = re.sub(inner, r"\1!", latex)
    if re.search(r"!\s*!|[)}\]]\s*!|\d{4}\s*!|(?:binom|exp).*(?:binom|exp|\d{5})|sqrt\s*\[(?!\d{1,3}\])", counted):
        return False
    plain, grouped = [1], [1]
    for match in re.finditer(r"\^", latex):
        exponent = _exponent(latex[match.end() :])
        # a power of a letter stays a power; one of a number, of e too, is worked out
        if re.search(r"(?<![a-df-zA-Z])\^|(?<=\\)[a-zA-Z]+\^|!|binom|exp", exponent):
            return False
        size = max(2, int("".join(re.findall(r"[0-9]", exponent)) or 2))
        (grouped if latex[: match.start()].rstrip()[-1:] in (")", "}", "]") else plain).append(size)
    return max(plain) * prod(grouped) <= 20_000


def _exponent(rest: str) -> str:
    """What a power sign in front of `rest` governs at most, with the sign behind it that would raise that further."""
    rest = rest.lstrip()
    governed = re.match(r"[-+]?\s*(?:[0-9.]+|[a-zA-Z]|\\(?:circ|pi|infty|alpha|beta|theta|lambda|mu|omega)\b)", rest)
    end = governed.end() if governed else len(rest)
    if rest[:1] in ("{", "("):
        depths = accumulate((sign in "{(") - (sign in "})") for sign in rest)
        end = next((at for at, depth in enumerate(depths, 1) if depth == 0), len(rest))
    behind = re.match(r"\s*[\^!]", rest[end:])
    return rest[:end] + (behind[0] if behind else "")


@lru_cache(maxsize=4096)
def _judged_same(answer: str, gold: str) -> bool:
    from math_verify import verify

    read_gold, read_answer = _read(gold), _read(answer)
    if not read_gold or not read_answer:
        return False

    def judge() -> bool:
        if not verify(read_gold, read_answer, timeout_seconds=None):
            return False
        try:
            return not _apart(read_gold[0], read_answer[0])
        except Exception:  # sympy raises anything on what it cannot work out; math-verify's word stands
            return True

    return _within_budget(judge, COMPARE_BUDGET) or False


@lru_cache(maxsize=4096)
def _read(latex: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # math-verify warns whenever its own timeouts are off; the budgets here stand in for them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    default = LatexExtractionConfig()
    # Units are gone by now: math-verify would take the t of `x + 3 t` for one.
    config = [replace(default, normalization_config=replace(default.normalization_config, units=False))]
    boxed = rf"\boxed{{{latex}}}"

    def read() -> list[Any]:
        return list(parse(boxed, extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None))

    return _within_budget(read, READ_BUDGET) or []


def _apart(gold: Any, answer: Any) -> bool:
    """Whether two answers that math-verify calls the same are not: it looks at a fixed number of decimals.

    Numbers are compared in proportion to their size, in lists and matrices one by one, formulas at a point.
    """
    from sympy import Expr, MatrixBase, default_sort_key
    from sympy.core.relational import Relational

    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return gold.func == answer.func and gold.lhs == answer.lhs and _apart(gold.rhs, answer.rhs)
    if isinstance(gold, Relational) and gold.lhs.is_Symbol:
        return _apart(gold.rhs, answer)
    if isinstance(answer, Relational) and answer.lhs.is_Symbol:
        return _apart(gold, answer.rhs)
    if isinstance(gold, Expr) and isinstance(answer, Expr) and not isinstance(gold, MatrixBase):
        return _far(gold, answer)
    if type(gold) is not type(answer):
        return False
    parts, others = (list(x.flat() if isinstance(x, MatrixBase) else x.args) for x in (gold, answer))
    if type(gold).__name__ == "FiniteSet":
        by_size = lambda part: default_sort_key(part.evalf() if isinstance(part, Expr) else part)  # noqa: E731
        parts, others = sorted(parts, key=by_size), sorted(others, key=by_size)
    return len(parts) == len(others) and any(map(_apart, parts, others))


def _far(gold: Any, answer: Any) -> bool:
    from sympy import Abs, Float, Rational, UnevaluatedExpr

    symbols = gold.free_symbols
    if symbols != answer.free_symbols or gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr):
        return False  # names that math-verify matched in its own way, or a percentage
    # of floats, whose powers are as cheap as any; those of a fraction may fill the memory
    point = {symbol: Float(37 + 12 * i, 60) / 31 for i, symbol in enumerate(sorted(symbols, key=str))}
    x, y = gold.subs(point).doit(), answer.subs(point).doit()
    if x.is_Rational and y.is_Rational:
        return bool(x != y)
    gap, largest = (size.evalf(50) for size in (Abs(x - y), Abs(x) + Abs(y)))
    if not (gap.is_Float and largest.is_Float):
        return False
    if gold.has(Float) or answer.has(Float):
        return bool(largest < Rational(1, 1000) and gap > largest * Rational(5, 10**6))
    return bool(gap > largest / 10**40)


def _within_budget(work: Callable[[], Result], budget: int) -> Result | None:
    """`work()`, or None once it has made `budget` Python calls.

    Counted calls, not seconds: math-verify's own timeout is an alarm, which only the main thread may set, which would
    cancel other alarms, and whose verdict depends on how busy the machine is.
    """
    from math_verify.errors import TimeoutException

    left = budget

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        left -= 1
        # Not in a generator: Python drops what is raised while it closes one, and the trace with it.
        if left < 0 and not frame.f_code.co_flags & CO_GENERATOR:
            raise TimeoutException  # a BaseException, so that no `except Exception` on the way swallows it

    tracer = sys.gettrace()
    sys.settrace(count)
    try:
        return work()
    except TimeoutException:
        return None
    finally:
        sys.settrace(tracer)
