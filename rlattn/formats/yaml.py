"""YAML as recipes use it: 1.2, so that `1e-6` is a number and `no` is text; and dotted overrides."""

from datetime import date
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from rlattn.errors import UserError


def parse_yaml(text: str, where: str) -> Any:
    """Plain data from YAML. Raises UserError naming the line at fault."""
    try:
        data = _yaml().load(text)
        _check_plain(data, "")
        return data
    except _NotPlain as error:
        raise UserError(f"{where}, {error.args[0]}" if error.args[0] else where, error.args[1]) from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "somewhere"
        raise UserError(where, f"not readable as YAML: {error.problem}, {line}.", "Mend that line.") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(where, f"not readable as YAML: {str(error).splitlines()[0]}.") from None


def override(data: dict[str, Any], assignment: str) -> None:
    """Sets one dotted key: `trainer.max_steps=20`; the value is YAML. `rewards.NAME=null` drops that reward.

    Raises:
        UserError: what cannot be read or set.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(assignment, "not an override.", "Expected key.path=value, such as trainer.max_steps=20.")
    *parents, leaf = path.split(".")
    node = data
    for depth, parent in enumerate(parents):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(path, f"{'.'.join(parents[: depth + 1])} is a value, not a section.")
    value = parse_yaml(text, assignment)
    if value is None and parents == ["rewards"]:
        node.pop(leaf, None)
    else:
        node[leaf] = value


def dump_yaml(data: Any) -> str:
    """YAML text that `parse_yaml` reads back as the same data, keys in their order."""
    stream = StringIO()
    _yaml().dump(data, stream)
    return stream.getvalue()


MOST_VALUES = 100_000  # of a file, its aliases written out: a few lines of nested ones stand for billions


class _NotPlain(Exception):
    """A value that YAML can write and a recipe cannot hold: its key path, and what to do."""


def _check_plain(data: Any, where: str) -> int:
    """How many values `data` holds, itself among them. Raises _NotPlain."""
    if not isinstance(data, dict | list | str | int | float | None):
        fix = "Put it in quotes to make it text." if isinstance(data, date) else "Use text, numbers, lists or mappings."
        raise _NotPlain(where, f"a recipe cannot hold a {type(data).__name__}. {fix}")
    count = 1
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        path = f"{where}.{key}" if where else str(key)
        if isinstance(data, dict) and not isinstance(key, str):
            raise _NotPlain(path, f"a key must be text, got {key!r}. Put it in quotes.")
        count += _check_plain(value, path)
        if count > MOST_VALUES:
            raise _NotPlain(where, f"holds more than {MOST_VALUES} values, its aliases (*) written out.")
    return count


def _yaml() -> YAML:
    # YAML 1.2: `1e-6` is a number and `no` is text, unlike PyYAML's 1.1.
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the recipe
    return yaml
