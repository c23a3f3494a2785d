"""What is asked and how it is answered: from the command line to a recipe, items and settings. No torch, no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlattn.errors import UserError
from rlattn.evaluation.subjects import Subject
from rlattn.files import expanded
from rlattn.formats.effort import at_effort
from rlattn.formats.yaml import override, parse_yaml
from rlattn.preflight.preflight import preflight
from rlattn.recipe.constraints import number
from rlattn.recipe.load import differences, load_recipe, parse_recipe
from rlattn.recipe.schema import TINY_POLICY, Recipe
from rlattn.tasks import DatasetTask
from rlattn.tasks.rows import check_gold, check_row, rows_of
from rlattn.types import DialogueTask, Messages, Row, Task, WarmStartable

BATCH = 8
SAY_WHAT = "Give --task RECIPE (`rlattn recipes` lists them), or --data FILE with `prompt` and `answer` a line."


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: a task's row, at an effort where the recipe has efforts."""

    index: int
    """Of the row; its efforts share it."""
    prompt: str | Messages
    """As the task wrote it, the effort's line before it."""
    row: Row
    effort: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known before a weight loads."""

    recipe: Recipe
    task: Task | None
    """None where a probe reads its own data."""
    items: list[Item]
    samples: int
    ks: tuple[int, ...]
    temperature: float
    own_data: bool
    """Whether the items are the user's `--data` rather than a recipe's: then a model without a chat template is asked
    in plain text instead of being refused."""

    @property
    def max_new_tokens(self) -> int:
        return int(number(self.recipe, "max_completion_length", 512))

    @property
    def batch_size(self) -> int:
        return int(number(self.recipe, "per_device_eval_batch_size", BATCH))

    @property
    def settings(self) -> dict[str, Any]:
        """How the items are answered, for the record."""
        return {
            "samples": self.samples,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "seed": self.recipe.seed,
            "prompt_style": self.recipe.policy.prompt_style,
            "system_prompt": self.recipe.policy.system_prompt,
        }

    @property
    def template_kwargs(self) -> dict[str, Any]:
        return self.recipe.template_kwargs


def make_plan(
    subject: Subject,
    *,
    task: str | None,
    data: str | None,
    overrides: Sequence[str],
    samples: int,
    k: str | None,
    temperature: float | None,
    limit: int | None,
    probe_reads: bool = False,
) -> Plan:
    """Checks and reads everything that needs no model; of a probe's own data (`probe_reads`) nothing.

    Raises:
        UserError: options that do not fit together, a task or data that cannot be read.
    """
    ks = _ks(k, samples)
    if samples > 1 and temperature == 0:
        raise UserError("--temperature", f"0 gives {samples} times the same answer.", "Leave it out, or --samples.")
    recipe = _recipe(subject, task, data, overrides)
    built = None if probe_reads else preflight(recipe, 1, "parts").task
    if isinstance(built, DialogueTask) and built.style == "tools":
        fix = "Add task.style=text: the same dialogue in plain turns."
        raise UserError("task.style", "tools are called in a run only.", fix)
    if built is not None and not isinstance(built, DatasetTask):
        check_gold(built)
    sampled = 1.0 if recipe.trainer.get("temperature") is None else float(recipe.trainer["temperature"])
    return Plan(
        recipe=recipe,
        task=built,
        items=[] if built is None else _items(recipe, built, data is not None, limit),
        samples=samples,
        ks=ks,
        temperature=temperature if temperature is not None else 0.0 if samples == 1 else sampled,
        own_data=data is not None,
    )


def check_tiny(subject: Subject, plan: Plan, option: str) -> None:
    """`tiny-reasoner` is what a recipe's warm start makes. Raises UserError where this recipe makes none."""
    if subject.path != TINY_POLICY:
        return
    if plan.recipe.policy.path != TINY_POLICY or not isinstance(plan.task, WarmStartable):
        fix = "Give --task quickstart or another recipe with `policy: {path: tiny-reasoner}`."
        raise UserError(option, f"{TINY_POLICY} is made by a recipe, and this one makes none.", fix)


def check_same_task(subject: Subject, other: Subject) -> None:
    """Two runs are compared on the first's task. Raises UserError where the other was trained on another."""
    if subject.run is None or other.run is None or other.run == subject.run:
        return
    mine, theirs = _recipe_of_run(subject, "MODEL"), _recipe_of_run(other, "--against")
    changed = differences(mine.model_copy(update={"task": theirs.task}), mine)
    changed.pop("task.rl_rows", None)  # of training alone
    if changed:
        key, (there, here) = next(iter(changed.items()))
        problem = f"{other.name} was trained on another task ({key}: {there} there, {here} here)."
        raise UserError("--against", problem, "Say with --task or --data what both are asked.")


def _recipe(subject: Subject, task: str | None, data: str | None, overrides: Sequence[str]) -> Recipe:
    if task is not None and data is not None:
        raise UserError("--data", "and --task both say what to ask.", "Keep one.")
    if task is not None:
        return load_recipe(task, overrides)
    if data is None and subject.run is None:
        raise UserError("--task", f"is missing: {subject.name} is no run, whose own task would be taken.", SAY_WHAT)
    if data is None:
        return _recipe_of_run(subject, "MODEL", overrides)
    plain: dict[str, Any] = {"name": "eval", "policy": {"path": subject.path}, "rewards": {"accuracy": {}}}
    own = subject.run / "recipe.yaml" if subject.run is not None else None
    if own is not None and own.is_file():  # what the policy is used to: system prompt, lengths
        of_run = _read_mapping(own)
        plain |= {key: of_run[key] for key in ("policy", "trainer", "seed") if key in of_run}
    plain["task"] = {"kind": "dataset", "path": str(expanded(data)), "eval_rows": 0}
    for assignment in overrides:
        override(plain, assignment)
    return parse_recipe(plain)


def _recipe_of_run(subject: Subject, option: str, overrides: Sequence[str] = ()) -> Recipe:
    assert subject.run is not None
    file = subject.run / "recipe.yaml"
    if not file.is_file():
        raise UserError(option, f"{subject.name} is of a run without its recipe.yaml, which names its task.", SAY_WHAT)
    _read_mapping(file)
    return load_recipe(file, overrides)


def _read_mapping(file: Path) -> dict[str, Any]:
    """A run's recipe as it is written. Raises UserError where it is damaged."""
    fix = "Restore it; without it, --task or --data and overrides say what is asked."
    try:
        found = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError:
        raise UserError(str(file), "is damaged: it is not UTF-8 text.", fix) from None
    if not isinstance(found, dict):
        problem = "is damaged: expected a mapping with name, policy, task, rewards and trainer."
        raise UserError(str(file), problem, fix)
    return found


def _items(recipe: Recipe, task: Task, own_data: bool, limit: int | None) -> list[Item]:
    held_out = not own_data or any(getattr(task, name, None) for name in ("eval_path", "eval_split"))
    rows = list(islice(rows_of(task, "eval" if held_out else "train"), limit))
    items = []
    for index, row in enumerate(rows):
        check_row(row, f"row {index + 1}")
        asked = {"prompt": row["prompt"], "row": dict(row)}
        for effort in recipe.task.efforts or (None,):
            one = asked if effort is None else at_effort(asked, effort)
            items.append(Item(index=index, prompt=one["prompt"], row=one["row"], effort=effort))
    return items


def _ks(text: str | None, samples: int) -> tuple[int, ...]:
    if text is None:
        return (1,) if samples == 1 else (1, samples)
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError("--k", f"expected numbers such as 1,4,8, got '{text}'.") from None
    if ks[0] < 1:
        raise UserError("--k", f"expected numbers from 1 on, got {ks[0]}.")
    if ks[-1] > samples:
        raise UserError("--k", f"pass@{ks[-1]} needs {ks[-1]} answers a problem.", f"Add --samples {ks[-1]}.")
    return tuple(ks)
