r"""The final answer of a worked response, and whether two answers are the same.

An answer is looked for in two tiers; the first tier that has one decides, and inside a tier the last one wins:

1. explicit marks: `<answer>x</answer>`, `\boxed{x}` (braces may nest), `\fbox{x}`;
2. lines: `#### x`, `A: x`, `Answer: x`, `Final answer: x`, `the answer is x` (to the end of the sentence).

Lines come second because prose is loose: a markdown heading `#### Step 2` must not outdo a box. A mark inside a mark
is opened (`<answer>\boxed{5}</answer>` is `5`). Only what follows the last `</think>` counts, where there is one; a
`<think>` that is never closed holds no final answer.
"""

import re

from rlattn.formats.answer_text import clean, key
from rlattn.formats.formulas import same_formula
from rlattn.formats.quantities import number, same_number, units_agree, without_units
from rlattn.formats.thought import after_thought

LONGEST_ANSWER = 2000
"""Characters; what is longer is prose, not an answer."""

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

    Equal texts are the same up to spaces, LaTeX wrapping and, in words, case. A unit may be left out, but not another:
    `$18` is `18 dollars` and `18`, yet not `18 cents`. Two numbers are compared as numbers, to six decimals where one
    is written in decimals (below a thousandth to six digits): `1,000` is `1000.0`, `50%` is `50` and `0.5`. Anything
    else that looks like mathematics is judged by math-verify; words only by their text.
    """
    if answer.strip() == gold.strip():
        return bool(gold.strip())
    if len(answer) > LONGEST_ANSWER or len(gold) > LONGEST_ANSWER:
        return False
    answer, gold = clean(answer), clean(gold)
    if key(answer) == key(gold):
        return bool(key(gold))
    (answer, units), (gold, gold_units) = without_units(answer), without_units(gold)
    if not units_agree(units, gold_units):
        return False
    a, g = number(answer), number(gold)
    if a is not None and g is not None:
        decimals = "." in answer + gold
        percent, gold_percent = units == [("%",)], gold_units == [("%",)]
        if percent != gold_percent and same_number(*((a / 100, g) if percent else (a, g / 100)), decimals=decimals):
            return True
        return same_number(a, g, decimals=decimals)
    return key(answer) == key(gold) or same_formula(answer, gold)
