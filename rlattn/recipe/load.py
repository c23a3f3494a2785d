"""From a YAML file and dotted overrides to a Recipe with absolute paths; what differs between two recipes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlattn.errors import UserError, did_you_mean
from rlattn.files import find_file, find_recipe, looks_local, nearest_file
from rlattn.formats.yaml import override, parse_yaml
from rlattn.recipe.pydantic_errors import refuse_booleans, user_error
from rlattn.recipe.schema import TINY_POLICY, Recipe, flat, home_of, is_model
from rlattn.tasks.dataset.readers import kind_of
from rlattn.types import AttentionOptions, WarmStart


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides (`trainer.max_steps=20`) and validates a recipe; its relative paths are resolved.

    Paths are looked for beside the recipe, in the working directory, then among the shipped files; `path` itself in the
    working directory, then among the shipped files (`recipes/quickstart.yaml`, or just `quickstart`).

    Raises:
        UserError: with the key path, what was expected and how to mend it.
    """
    file = find_recipe(path)
    data = parse_yaml(file.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(data, dict):
        raise UserError(str(path), "expected a recipe: a mapping with name, policy, task, rewards and trainer.")
    for assignment in overrides:
        override(data, assignment)
    return _resolve_paths(parse_recipe(data), file.parent)


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """A Recipe from plain data. Raises UserError naming the first key at fault."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _first_error(error) from None
    refuse_booleans(data, recipe.model_dump(mode="json"))
    return recipe


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for everything that changes what is trained (not where it is stored or shown)."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not re.match(r"(output_dir|tracking|resume)\b", key)
    }


def _resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """Absolute paths for local files, so that the resolved recipe means the same from anywhere."""
    data = recipe.model_dump()
    policy = recipe.policy.path
    if policy != TINY_POLICY:
        found = find_file(policy, base)
        if found is not None:
            data["policy"]["path"] = str(found)
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", policy) or policy.startswith(".") or looks_local(policy, base):
            raise UserError("policy.path", f"no folder '{policy}'.", nearest_file(policy, base))
    for key in ("path", "eval_path"):
        given = recipe.task.options.get(key)
        if recipe.task.python is None and isinstance(given, str) and given:
            found = find_file(given, base)
            if found is not None:
                data["task"][key] = str(found)
            elif kind_of(given) or given.startswith((".", "/", "~")) or looks_local(given, base):
                raise UserError(f"task.{key}", f"no file '{given}'.", nearest_file(given, base))
    deepspeed = recipe.trainer.get("deepspeed")
    if isinstance(deepspeed, str):
        found = find_file(deepspeed, base)
        if found is None:
            raise UserError("trainer.deepspeed", f"no file '{deepspeed}'.", nearest_file(deepspeed, base))
        data["trainer"]["deepspeed"] = str(found)
    data["output_dir"] = str(recipe.run_dir)
    return Recipe.model_validate(data)


def _first_error(error: ValidationError) -> UserError:
    first, *others = sorted(error.errors(), key=lambda one: one["type"] == "missing")  # a typo of it says more
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    more = f" ({len(others)} more after this one.)" if others else ""
    kind = first["type"]
    if kind == "extra_forbidden":
        section = Recipe
        for part in first["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            section = next(c for c in (annotation, *getattr(annotation, "__args__", ())) if is_model(c))
        leaf = str(first["loc"][-1])
        return UserError(where, "unknown key.", (home_of(leaf) or did_you_mean(leaf, section.model_fields)) + more)
    if kind == "unexpected_keyword_argument":  # of the warm start
        names = (AttentionOptions if first["loc"][0] == "attention" else WarmStart).__dataclass_fields__
        return UserError(where, "unknown key.", did_you_mean(first["loc"][-1], names) + more)
    return user_error(first, where.split("."), more)
