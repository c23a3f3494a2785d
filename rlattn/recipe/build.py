"""From a recipe's `kind` or `python: module:Class` and options to a task, a reward or a credit rule."""

import importlib
import inspect
import sys
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlattn.credit import CREDIT_RULES, CreditRule
from rlattn.errors import UserError, describe, did_you_mean
from rlattn.recipe.pydantic_errors import refuse_booleans, user_error
from rlattn.recipe.schema import Plugin, Recipe
from rlattn.rewards import REWARDS
from rlattn.tasks import TASKS
from rlattn.types import LARGEST_WEIGHT, Reward, Task

# how many arguments each protocol's methods are called with
CALLS: dict[type, dict[str, int]] = {
    Task: {"rows": 1, "verify": 2, "gold": 1},
    Reward: {"score": 1},
    CreditRule: {"__call__": 1},
}
BY_NAME: dict[type, tuple[str, ...]] = {CreditRule: ("step",)}  # what they are given as well, if they take it
OPTIONAL = {"prepare": 1, "tokens": 1, "parts": 1, "state_dict": 0, "load_state_dict": 1, "bind": 1}  # of a reward
# what is read of an object besides, so that a property of a user's own that raises does so here
READ: dict[type, tuple[str, ...]] = {
    Task: ("metrics", "trace", "reply", "questions", "turn_tokens", "style"),
    CreditRule: ("needs_entropy", "reads_fai", "top_fraction"),
    Reward: (*OPTIONAL, "needs", "needs_of_task", "lag", "first_policy", "part_count", "part_weight"),
}
MOST_PARTS = 1024


def build_task(recipe: Recipe) -> Task:
    """The recipe's task, its options validated. Raises UserError."""
    return _build(recipe.task, recipe.task.kind, TASKS, Task, "task")


def build_rewards(recipe: Recipe) -> dict[str, Reward]:
    """The recipe's rewards by name, their options validated. Raises UserError."""
    return {
        name: _build(spec, spec.kind or name, REWARDS, Reward, f"rewards.{name}")
        for name, spec in recipe.rewards.named.items()
    }


def build_credit(recipe: Recipe) -> CreditRule | None:
    """The recipe's credit rule, its options validated; None for GRPO's equal credit. Raises UserError."""
    if recipe.credit is None:
        return None
    return _build(recipe.credit, recipe.credit.kind, CREDIT_RULES, CreditRule, "credit")


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
    built = _construct(cls, spec.options, where, set(type(spec).model_fields))
    try:
        for name in (*CALLS[protocol], *READ.get(protocol, ())):
            getattr(built, name, None)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}.python", f"reading its '{name}' fails: {describe(error)}.") from None
    if not isinstance(built, protocol):
        missing = [name for name in CALLS[protocol] if not callable(getattr(built, name, None))]
        raise UserError(f"{where}.python", f"{spec.python} lacks the method {missing[0]}().", page_of(where))
    check_methods(built, CALLS[protocol], where, BY_NAME.get(protocol, ()))
    if protocol is Reward:
        _check_reward(built, where)
    return built


def _check_reward(reward: Any, where: str) -> None:
    """What a reward says about itself besides its score (`rlattn/rewards/__init__.py`)."""
    check_methods(reward, {name: n for name, n in OPTIONAL.items() if callable(getattr(reward, name, None))}, where)
    for key in ("needs", "needs_of_task"):
        names = getattr(reward, key, ())
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}.{key}", f"expected a tuple of names, such as ('payoff',), got {names!r}.")
    lag = getattr(reward, "lag", None)
    if lag is not None and (not isinstance(lag, int) or lag < 0):
        raise UserError(f"{where}.lag", f"expected a whole number of steps, 0 for no lagged policy, got {lag!r}.")
    if hasattr(reward, "parts"):
        count, weight = getattr(reward, "part_count", None), getattr(reward, "part_weight", None)
        if not isinstance(count, int) or not 1 <= count <= MOST_PARTS:
            problem = f"a reward with parts() says how many at most, 1 to {MOST_PARTS}, got {count!r}."
            raise UserError(f"{where}.part_count", problem)
        if not isinstance(weight, int | float) or not abs(weight) <= LARGEST_WEIGHT:
            problem = f"a reward with parts() says what they weigh, up to {LARGEST_WEIGHT:g}, got {weight!r}."
            raise UserError(f"{where}.part_weight", problem)


def _import(path: str, where: str) -> type:
    module_name, _, class_name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        cls = getattr(module, class_name, None)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            nearby = [file.stem for file in Path.cwd().glob("*.py")]
            raise UserError(
                f"{where}.python",
                f"no module '{module_name}' in the working directory or the environment.",
                did_you_mean(module_name, nearby) if nearby else "",
            ) from None
        raise UserError(f"{where}.python", f"{module_name} needs '{error.name}', which is not installed.") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}.python", f"{module_name} fails at import: {describe(error)}.") from None
    if cls is not None and not isinstance(cls, type):
        raise UserError(f"{where}.python", f"{path} is no class.", "Expected a class with the methods in the README.")
    if cls is None:
        own = [name for name, value in vars(module).items() if isinstance(value, type) and not name.startswith("_")]
        hint = did_you_mean(class_name, own) if own else "It defines no class."
        raise UserError(f"{where}.python", f"no class '{class_name}' in {module_name}.", hint)
    return cls


def _construct(cls: type, options: dict[str, Any], where: str, spec_keys: Set[str] = frozenset()) -> Any:
    try:
        parameters = inspect.signature(cls).parameters
    except ValueError:
        raise UserError(
            f"{where}.python", f"{cls.__name__} cannot be made from options.", "Name another class."
        ) from None
    names = {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else set(parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in options:
        if key not in names and not takes_any:
            shared = spec_keys - {"kind", "python"}
            hint = did_you_mean(key, names | shared) if names | shared else "It takes no options."
            raise UserError(f"{where}.{key}", f"unknown option of {cls.__name__}.", hint)
    try:
        if not is_dataclass(cls):
            return cls(**options)
        built = TypeAdapter(cls).validate_python(options)
        refuse_booleans(options, {name: getattr(built, name) for name in options}, [where])
        return built
    except UserError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        raise user_error(first, [where, *map(str, first["loc"])]) from None
    except (Exception, SystemExit) as error:
        raise UserError(where, f"{cls.__name__} refuses its options: {describe(error)}.") from None


def page_of(where: str) -> str:
    """Where a task, a reward or a rule of one's own is described."""
    return f"See rlattn/{ {'task': 'tasks', 'credit': 'credit'}.get(where, 'rewards') }/README.md."


def check_methods(built: Any, calls: Mapping[str, int], where: str, by_name: tuple[str, ...] = ()) -> None:
    """That every method of `calls` takes that many arguments, and those of `by_name` it has, and is no coroutine."""
    for name, count in calls.items():
        method = getattr(built, name)
        try:
            signature = inspect.signature(method)
            signature.bind(*range(count), **{key: 0 for key in by_name if key in signature.parameters})
        except TypeError as error:
            problem = f"{name}() must take {count} argument{'s' * (count != 1)}: {error}."
            raise UserError(f"{where}.python", problem, page_of(where)) from None
        except ValueError:
            continue  # a builtin without a signature
        if inspect.iscoroutinefunction(method):
            raise UserError(f"{where}.python", f"{name}() must not be async.", "Make it a plain method.")
