"""From a recipe's `kind` or `python: module:Class` and options to a task or a reward."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlattn.errors import UserError, did_you_mean
from rlattn.recipe import Plugin, Recipe
from rlattn.rewards import REWARDS, Reward
from rlattn.tasks import TASKS, Task


def build_task(recipe: Recipe) -> Task:
    """The recipe's task, its options validated. Raises UserError."""
    return _build(recipe.task, recipe.task.kind, TASKS, Task, "task")


def build_rewards(recipe: Recipe) -> dict[str, Reward]:
    """The recipe's rewards by name, their options validated. Raises UserError."""
    return {
        name: _build(spec, spec.kind or name, REWARDS, Reward, f"rewards.{name}")
        for name, spec in recipe.rewards.named.items()
    }


def _build(spec: Plugin, kind: str | None, table: Mapping[str, type], protocol: type, where: str) -> Any:
    if spec.python:
        cls = _import(spec.python, where)
    elif kind is None:
        raise UserError(f"{where}.kind", "is required.", f"Expected {', '.join(table)}, or `python: module:Class`.")
    elif kind in table:
        cls = table[kind]
    else:
        key = f"{where}.kind" if spec.kind else where
        raise UserError(
            key, f"unknown {where.partition('.')[0].removesuffix('s')} '{kind}'.", did_you_mean(kind, table)
        )
    built = _construct(cls, spec.options, where)
    if not isinstance(built, protocol):
        missing = [n for n in dir(protocol) if not n.startswith("_") and not callable(getattr(built, n, None))]
        raise UserError(f"{where}.python", f"{spec.python} lacks the method {missing[0]}().", "See the README.")
    return built


def _import(path: str, where: str) -> type:
    module_name, _, class_name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            nearby = [file.stem for file in Path.cwd().glob("*.py")]
            raise UserError(
                f"{where}.python",
                f"no module '{module_name}' in the working directory or the environment.",
                did_you_mean(module_name, nearby) if nearby else "",
            ) from None
        raise UserError(f"{where}.python", f"{module_name} needs '{error.name}', which is not installed.") from None
    except Exception as error:
        raise UserError(f"{where}.python", f"{module_name} fails at import: {type(error).__name__}: {error}.") from None
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        names = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise UserError(
            f"{where}.python", f"no class '{class_name}' in {module_name}.", did_you_mean(class_name, names)
        )
    return cls


def _construct(cls: type, options: dict[str, Any], where: str) -> Any:
    parameters = inspect.signature(cls).parameters
    names = {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else set(parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in options:
        if key not in names and not takes_any:
            hint = did_you_mean(key, names) if names else "It takes no options."
            raise UserError(f"{where}.{key}", f"unknown option of {cls.__name__}.", hint)
    try:
        return TypeAdapter(cls).validate_python(options) if is_dataclass(cls) else cls(**options)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join([where, *(str(part) for part in first["loc"])])
        if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            raise UserError(location, "is required.", "Add it to the recipe.") from None
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            problem = f"{problem.replace('Input should be', 'expected')}; got {first.get('input')!r}"
        raise UserError(location, f"{problem}.") from None
    except (TypeError, ValueError) as error:
        raise UserError(where, f"{cls.__name__} refuses its options: {error}.") from None
