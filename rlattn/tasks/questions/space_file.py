"""Reads a task space from a YAML or JSON file, every key checked."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlattn.errors import UserError, did_you_mean
from rlattn.formats.yaml import parse_yaml
from rlattn.tasks.questions.space import Attribute, TaskSpace
from rlattn.tasks.questions.wording_check import check_understood

QUESTION = "What is the {attribute}?"
ANSWER = "The {attribute} is {value}."
LARGEST_FILE = 200_000  # bytes; the shipped ones have 2,000
MOST_VALUES = 500  # of all attributes together; the prompt lists them
LARGEST_WEIGHT = 1e12
LEAST_SHARE = 1e-12  # of a prior; what is less likely is never drawn
FORBIDDEN = set("<>=;:,{}")  # they part a written specification, or mark a reply


def load_space(path: Path) -> TaskSpace:
    """A task space from a YAML or JSON file. Raises UserError naming the key at fault."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            raise UserError(
                str(path), f"expected a regular file of at most {LARGEST_FILE} bytes.", "See data/task_spaces/."
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            str(path), f"is no readable task space: {type(error).__name__}.", "See data/task_spaces/."
        ) from None
    return parse_space(parse_yaml(text, str(path)), str(path))


def parse_space(data: Any, where: str) -> TaskSpace:
    """A task space from plain data. `where` starts the key path of every error."""
    top = _mapping(data, where, ("about", "question", "answer", "attributes"))
    about = _text(top.get("about"), f"{where}: about")
    if "attributes" not in top:
        raise UserError(f"{where}: attributes", "is required.", "Name what may be asked for.")
    found = _mapping(top["attributes"], f"{where}: attributes")
    if len(found) < 2:
        raise UserError(f"{where}: attributes", f"expected at least 2, got {len(found)}.")
    defaults = {
        "question": _template(top.get("question", QUESTION), f"{where}: question", needs=("attribute",)),
        "answer": _template(top.get("answer", ANSWER), f"{where}: answer", needs=("value",), may=("attribute",)),
    }
    attributes = {name: _attribute(name, spec, defaults, f"{where}: attributes.{name}") for name, spec in found.items()}
    count = sum(len(attribute.prior) for attribute in attributes.values())
    if count > MOST_VALUES:
        raise UserError(f"{where}: attributes", f"expected at most {MOST_VALUES} values altogether, got {count}.")
    if all(len(attribute.answers) == 1 for attribute in attributes.values()):
        raise UserError(f"{where}: attributes", "every answer allows every value: none tells anything.")
    space = TaskSpace(about=about, attributes=attributes)
    check_understood(space, where)
    return space


def _attribute(name: str, data: Any, defaults: Mapping[str, str], where: str) -> Attribute:
    _label(name, where)
    spec = _mapping(data, where, ("values", "groups", "question", "answer"))
    prior = _prior(spec.get("values"), f"{where}.values")
    answers = {value: frozenset({value}) for value in prior}
    if "groups" in spec:
        answers = _groups(spec["groups"], prior, f"{where}.groups")
    question, answer = defaults["question"], defaults["answer"]
    if "question" in spec:
        question = _template(spec["question"], f"{where}.question", may=("attribute",))
    if "answer" in spec:
        answer = _template(spec["answer"], f"{where}.answer", needs=("value",), may=("attribute",))
    return Attribute(
        name=name,
        prior=prior,
        answers=answers,
        question=question.replace("{attribute}", name),
        answer=answer.replace("{attribute}", name),
    )


def _prior(data: Any, where: str) -> dict[str, float]:
    if isinstance(data, list):
        data = {value: 1.0 for value in data if isinstance(value, str)} if _distinct(data) else None
    values = _mapping(data, where) if data else {}
    if len(values) < 2:
        raise UserError(where, "expected at least 2 different values; one has nothing to ask for.")
    for value, weight in values.items():
        _label(value, f"{where}.{value}")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 < weight <= LARGEST_WEIGHT):
            problem = f"expected a prior of more than 0 and at most {LARGEST_WEIGHT:g}, got {weight!r}."
            raise UserError(f"{where}.{value}", problem, "Or leave it out.")
    total = math.fsum(values.values())
    for value, weight in values.items():
        if weight / total < LEAST_SHARE:
            raise UserError(f"{where}.{value}", f"is never drawn: its share is {weight / total:g}.", "Leave it out.")
    return {value: weight / total for value, weight in values.items()}


def _groups(data: Any, prior: Mapping[str, float], where: str) -> dict[str, frozenset[str]]:
    """Groups that part the values: each in one group, so that the customer can only say one thing."""
    groups = _mapping(data, where)
    seen: set[str] = set()
    for label, members in groups.items():
        _label(label, f"{where}.{label}")
        if not isinstance(members, list) or not members:
            raise UserError(f"{where}.{label}", "expected a list of values.")
        for member in members:
            if not isinstance(member, str) or member not in prior:
                raise UserError(f"{where}.{label}", f"'{member}' is no value.", did_you_mean(member, prior))
            if member in seen:
                raise UserError(f"{where}.{label}", f"'{member}' is in two groups.", "Keep one.")
            seen.add(member)
        if label in prior and members != [label]:
            raise UserError(f"{where}.{label}", "is also the name of a value.", "Name the group otherwise.")
    for value in prior:
        if value not in seen:
            raise UserError(where, f"'{value}' is in no group.", "Put every value into one.")
    return {label: frozenset(members) for label, members in groups.items()}


def _template(data: Any, where: str, *, needs: tuple[str, ...] = (), may: tuple[str, ...] = ()) -> str:
    text = _text(data, where)
    names = re.findall(r"\{([^{}]*)\}", text)
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", text)):
        raise UserError(where, "has a brace of its own.", f"Braces are for {{{(*needs, *may)[0]}}}.")
    for name in needs:
        if name not in names:
            raise UserError(where, f"lacks its placeholder {{{name}}}.", f"Got {text!r}.")
    for name in names:
        if name not in (*needs, *may):
            raise UserError(where, f"unknown placeholder {{{name}}}.", did_you_mean(name, (*needs, *may)))
    return text


def _mapping(data: Any, where: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        raise UserError(where, "expected a mapping with something in it.", "See data/task_spaces/ for examples.")
    for key in data:
        if keys and key not in keys:
            raise UserError(
                f"{where}.{key}" if "." in where else f"{where}: {key}", "unknown key.", did_you_mean(key, keys)
            )
    return data


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str) or not any(character.isalnum() for character in data):
        raise UserError(where, f"expected text with words in it, got {data!r}.")
    if "<" in data or ">" in data:
        raise UserError(where, "must not hold < or >, which mark tags.")
    return data


def _label(data: Any, where: str) -> None:
    if FORBIDDEN & set(_text(data, where)):
        raise UserError(where, f"expected words without any of {' '.join(sorted(FORBIDDEN))}.")
    if len(data.splitlines()) > 1:
        raise UserError(" ".join(where.split()), "must be one line.")


def _distinct(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values) and len(set(values)) == len(values)
