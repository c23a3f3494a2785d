"""Turns pydantic's validation errors into UserError: the key, what was expected, the nearest valid name."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from rlattn.errors import UserError

SECTION_TYPES = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
LONGEST_MESSAGE = 300  # it may quote a value
WITH_KIND = ("credit", "task")  # sections that a `kind` can fill


def user_error(finding: Mapping[str, Any], path: Sequence[str], more: str = "") -> UserError:
    """One of `ValidationError.errors()`, at the key `path`; `more` ends the message."""
    kind, value, where = finding["type"], finding.get("input"), ".".join(path)
    message = finding["msg"].removeprefix("Value error, ").rstrip(".")
    if kind.startswith("missing"):
        return UserError(where, "is required.", f"Add it to the recipe.{more}")
    if kind == "value_error":  # a dataclass speaks of the whole; its message starts with the option's name
        name, colon, rest = message.partition(": ")
        named = bool(colon) and name.isidentifier()
        said = rest if named else message
        shown = said if len(said) <= LONGEST_MESSAGE else f"{said[: LONGEST_MESSAGE - 3]}..."
        return UserError(".".join([*path, name]) if named else where, f"{shown}.", more.strip())
    expected, fix = _expected(kind, message, finding.get("ctx", {}), value, path)
    return UserError(where, f"{expected}; got {short(value)}.", f"{fix}{more}".strip())


def _expected(
    kind: str, message: str, context: Mapping[str, Any], value: object, path: Sequence[str]
) -> tuple[str, str]:
    """What was expected, and how to mend it."""
    if kind == "literal_error":
        options = [option.strip(" '") for option in context["expected"].replace(" or ", ", ").split(",")]
        near = get_close_matches(str(value), options, n=1)
        return f"expected one of {', '.join(options)}", f"Did you mean '{near[0]}'?" if near else ""
    if kind in SECTION_TYPES:
        named = isinstance(value, str) and path[-1] in WITH_KIND
        return "expected a section of keys", f"Write {{kind: {value:.60}}}." if named else ""
    if kind == "string_pattern_mismatch":
        return f"expected {'module:Class' if path[-1] == 'python' else 'letters, digits, _, - and .'}", ""
    if kind == "string_type" and isinstance(value, int | float):
        return "expected text", "Put it in quotes to make it text."
    if kind == "too_long" and isinstance(value, list | tuple):
        return f"expected a list of {context['max_length']}", ""
    fixed = {"tuple_type": "expected a list, such as [a, b]", "int_parsing_size": "expected a shorter whole number"}
    plain = message.replace("a valid tuple", "a list").replace("a valid list", "a list")
    rest = plain.removeprefix("Input should be ")
    return fixed.get(kind, f"expected {rest}" if rest != plain else plain[:1].lower() + plain[1:]), ""


def refuse_booleans(given: Any, taken: Any, path: Sequence[str] = ()) -> None:
    """Raises UserError where `given` has true or false and validation made a number of it, as pydantic does."""
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        raise UserError(".".join(path), f"expected a number; got {str(given).lower()}.")
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        for key in given:
            refuse_booleans(given[key], taken.get(key), [*path, str(key)])
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        for index, (one, other) in enumerate(zip(given, taken)):
            refuse_booleans(one, other, [*path, str(index)])


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
