"""What a written question asks for, what an answer allows, what a specification says. Pure text; nothing here raises.

Tolerated: case, hyphens, plurals, other words around, `not`, `or`, `either`, `neither`, "no preference". Where a text
could mean two things, or nothing, the parsers say None, and nothing is concluded from it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlattn.tasks.questions.space import Attribute, TaskSpace

FUNCTION_WORDS = {
    "a", "an", "and", "any", "are", "be", "by", "can", "could", "do", "does", "for", "have", "how", "i", "in", "is",
    "it", "must", "of", "on", "or", "shall", "should", "some", "somebody", "something", "that", "the", "there", "this",
    "to", "we", "what", "when", "where", "which", "who", "will", "with", "would", "you", "your",
}  # fmt: skip
NEGATIONS = {"not", "no", "nothing", "never", "neither", "nor", "without", "except"}
CLAUSE_ENDS = {",", ";", ".", "!", "?", "but"}
UNDECIDED = (
    ("do", "not", "know"), ("do", "not", "mind"), ("do", "not", "care"), ("not", "sure"), ("no", "preference"),
    ("any",), ("whatever",), ("undecided",),
)  # fmt: skip

Words = tuple[str, ...]


def question_about(space: "TaskSpace", text: str) -> str | None:
    """The one attribute that a question asks for; None where it is none, or several.

    In this order: the attribute's own question, its name, the values of one attribute only, the most words of its
    question that no other question has.
    """
    asked = words(text)
    for name, attribute in space.attributes.items():
        if words(attribute.question) == asked:
            return name
    by_name = {n for n in space.attributes if _holds(asked, words(n))}
    by_name -= {n for n in by_name for longer in by_name - {n} if _holds(words(longer), words(n))}
    if by_name:
        return by_name.pop() if len(by_name) == 1 else None
    by_value = {n for n, a in space.attributes.items() if any(_holds(asked, words(v)) for v in (*a.prior, *a.answers))}
    if len(by_value) == 1:
        return by_value.pop()
    overlaps = {name: len(own & set(asked)) for name, own in _own_words(space).items()}
    most = max(overlaps.values())
    best = [name for name, overlap in overlaps.items() if overlap == most]
    return best[0] if most and len(best) == 1 else None


def answer_allows(attribute: "Attribute", text: str) -> frozenset[str] | None:
    """The values that an answer leaves; all of them where the speaker is undecided; None where it says nothing."""
    everything = frozenset(attribute.prior)
    named = {label: frozenset({label}) for label in attribute.prior} | dict(attribute.answers)
    said = words(text)
    exact = [label for label in named if _holds(said, words(attribute.answer.replace("{value}", label)))]
    if exact:
        return named[max(exact, key=len)]
    meant, excluded = _mentions({words(label): allowed for label, allowed in named.items()}, _tokens(text))
    if meant:
        return frozenset().union(*meant) - frozenset().union(*excluded) or None
    if excluded:
        return everything - frozenset().union(*excluded) or None
    return everything if any(_holds(said, phrase) for phrase in UNDECIDED) else None


def write_specification(specification: Mapping[str, str]) -> str:
    return f"<spec> {' ; '.join(f'{name} = {value}' for name, value in specification.items())} </spec>"


def read_specification(space: "TaskSpace", text: str) -> dict[str, str] | None:
    """The last `<spec> name = value ; … </spec>`; None where there is none. Unknown names and values are left out, and
    so is an attribute that is given two different values.
    """
    block = _last_block(text)
    if block is None:
        return None
    names = {words(name): name for name in space.attributes}
    found: dict[str, set[str]] = {}
    for part in re.split(r"[;,\n]", block):
        left, _, right = re.sub(r"[:=]", "=", part, count=1).partition("=")
        name = names.get(words(left))
        if name:
            values = {words(value): value for value in space.attributes[name].prior}
            found.setdefault(name, set()).add(values.get(words(right), ""))
    return {name: value for name, (value, *others) in found.items() if value and not others}


def _last_block(text: str) -> str | None:
    """What the last `<spec> … </spec>` holds. By `partition`: a regex is quadratic in unclosed tags."""
    for closed in reversed(text.split("</spec>")[:-1]):
        _, opening, inside = closed.partition("<spec>")
        if opening:
            return inside
    return None


def words(text: str) -> Words:
    return tuple(token for token in _tokens(text) if token[0].isalnum())


def _tokens(text: str) -> list[str]:
    """Lower-case words and the marks that end a clause; `don't` as `do not`, `air-mail` as `air mail`."""
    return re.findall(r"[^\W_]+|[,;.!?]", re.sub(r"n['’]t\b", " not", text.lower()))


def _holds(text: Words, phrase: Words) -> bool:
    return any(_matches(text, at, phrase) for at in range(len(text)))


def _matches(text: Sequence[str], at: int, phrase: Words) -> bool:
    """Whether `phrase` stands at that place, its last word perhaps in the plural."""
    found = tuple(text[at : at + len(phrase)])
    return bool(phrase) and found[:-1] == phrase[:-1] and found[-1:] in ((phrase[-1],), (f"{phrase[-1]}s",))


def _mentions(
    labels: Mapping[Words, frozenset[str]], tokens: list[str]
) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
    """What a text names, and what it rules out: a negation holds to the end of its clause."""
    meant: list[frozenset[str]] = []
    excluded: list[frozenset[str]] = []
    at, negated = 0, False
    while at < len(tokens):
        # a value may be called `no`: values go before negations, long ones before short ones
        label = max((label for label in labels if _matches(tokens, at, label)), key=len, default=())
        if label:
            (excluded if negated else meant).append(labels[label])
        elif tokens[at] in CLAUSE_ENDS:
            negated = False
        elif tokens[at] in NEGATIONS:
            negated = True
        at += len(label) or 1
    return meant, excluded


def _own_words(space: "TaskSpace") -> dict[str, set[str]]:
    """The words of each question that no other question has, and that mean something."""
    questions = {name: set(words(attribute.question)) - FUNCTION_WORDS for name, attribute in space.attributes.items()}
    return {
        name: own.difference(*(other for key, other in questions.items() if key != name))
        for name, own in questions.items()
    }
