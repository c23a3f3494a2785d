"""A task's rows, looked at before a run: what cannot be used, what is too long, what both splits share."""

from itertools import islice
from typing import NamedTuple

from rlattn.errors import HubUnreachable
from rlattn.recipe.constraints import check_train_rows, prompts_a_batch
from rlattn.recipe.schema import Recipe
from rlattn.tasks import DatasetTask
from rlattn.tasks.dataset.task import Look
from rlattn.tasks.rows import check_gold, check_row, rows_of, shared_prompts
from rlattn.types import Messages, Task

PROMPTS_MEASURED = 200
READ_WHOLE = 50e6  # bytes of a data file


class DataFound(NamedTuple):
    """What looking at a task's rows gave."""

    prompts: list[str | Messages]
    """The longest ones."""
    unread: str
    """What could not be looked at."""
    warnings: list[str]


def look_at_data(recipe: Recipe, task: Task, ranks: int) -> DataFound:
    """The task's rows, looked at; a hub out of reach is for `train` to refuse.

    Every row of small local files is read and checked, the head of large ones and of what lies on the hub.

    Raises:
        UserError: a row cannot be used, or there are too few.
    """
    try:
        seen = _look(recipe, task, ranks)
    except HubUnreachable as error:
        return DataFound([], f", its columns not checked: {error.problem}", [])
    train = seen.train[: recipe.task.rl_rows]
    if seen.whole or len(train) < len(seen.train):
        check_train_rows(recipe, len(train), ranks)
    warnings = shared_prompts(task, train, seen.held_out)
    if seen.left_out:
        warnings.append(f"task: {seen.left_out} bad rows of the stream will be left out.")
    prompts = sorted((row["prompt"] for row in [*train, *seen.held_out]), key=_characters, reverse=True)
    return DataFound(prompts[:PROMPTS_MEASURED], "" if seen.whole else ", only its head checked", warnings)


def _look(recipe: Recipe, task: Task, ranks: int) -> Look:
    needed = max(PROMPTS_MEASURED, prompts_a_batch(recipe, ranks), recipe.task.rl_rows or 0)
    if isinstance(task, DatasetTask):
        size = task.local_size
        return task.look(None if size is not None and size < READ_WHOLE else needed + task.eval_rows)
    check_gold(task)
    train, held_out = (
        list(rows if isinstance(rows, list | tuple) else islice(rows, needed))
        for rows in (rows_of(task, "train"), rows_of(task, "eval"))
    )
    for name, split in (("training", train), ("held-out", held_out)):
        for place, row in enumerate(split, 1):
            check_row(row, f"{name} row {place}")
    return Look(train, held_out, 0, len(train) != needed)


def _characters(prompt: str | Messages) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(str(message.get("content"))) for message in prompt)
