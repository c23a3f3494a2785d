"""A task's rows, looked at before anything is built on them: a task of a user's own may give anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from rlattn.errors import UserError, describe
from rlattn.formats.effort import query_key
from rlattn.formats.strict_json import finite
from rlattn.types import DialogueTask, Row, Split, Task

GOLD_CHECKED = 3
ANSWERED = "ends in a message of the assistant's: it leaves nothing to answer, and continuing one is not supported."
END_IN_QUESTION = "End it in the user's message, or write the beginning of the answer into that."
LARGEST_COLUMN = 100_000  # characters of a row's column that a log keeps


def check_gold(task: Task) -> None:
    """That the task's own gold answers score 1.0 under its verifier: the first held-out ones.

    Raises:
        UserError: no policy could learn this task.
    """
    for row in islice(rows_of(task, "eval"), GOLD_CHECKED):
        try:
            score = task.verify(task.gold(row), row)
        except (Exception, SystemExit) as error:
            raise UserError("task", f"its verify() or gold() fails on a row of its own: {describe(error)}.") from None
        if score != 1.0:
            text = f"its verify() scores its own gold() {score!r} on the row {str(dict(row))[:120]}"
            raise UserError("task", f"{text}.", "Expected 1.0.")


def rows_of(task: Task, split: Split) -> Any:
    """`task.rows(split)`, its first row checked.

    Raises:
        UserError: it raises, is empty, or its first row is none.
    """
    try:
        rows = task.rows(split)
        first = next(iter(islice(rows, 1)), None)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError("task", f"{type(task).__name__}.rows('{split}') fails: {describe(error)}.") from None
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise UserError("task", f"{type(task).__name__}.rows('{split}') gives no rows.", "Expected a list of dicts.")
    if first is None:
        fix = "Set task.eval_rows to at least 1." if split == "eval" else "Check where it reads them."
        raise UserError("task", f"{type(task).__name__} has no {split} rows.", fix)
    check_row(first, f"the first {split} row")
    # a generator has lost its first row now
    return rows if iter(rows) is not rows else task.rows(split)


def check_row(row: Row, where: str) -> None:
    """Raises UserError where a row has no prompt of text or chat messages."""
    if not isinstance(row, Mapping):
        raise UserError("task", f"{where} is no dict but {type(row).__name__}.", "Expected a dict with `prompt`.")
    if "prompt" not in row:
        raise UserError(
            "task", f"{where} has no 'prompt', only {', '.join(map(str, row))}.", "See rlattn/tasks/README.md."
        )
    if not is_prompt(row["prompt"]):
        raise UserError("task", f"{where}: its prompt is neither text nor chat messages.", "Expected one of them.")
    if is_answered(row["prompt"]):
        raise UserError("task", f"{where}: its prompt {ANSWERED}", END_IN_QUESTION)


def is_prompt(value: object) -> bool:
    """Text that is not blank, or chat messages."""
    if isinstance(value, list):
        return bool(value) and all(_is_message(message) for message in value)
    return isinstance(value, str) and bool(value.strip())


def is_answered(prompt: object) -> bool:
    """Whether chat messages end in one of the assistant's. A chat template would end it and begin another one, which
    is no continuation: such prompts are refused.
    """
    return isinstance(prompt, list) and prompt[-1]["role"] == "assistant"


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


def shared_prompts(task: Task, train: Iterable[Row], held_out: Iterable[Row]) -> list[str]:
    """A warning where held-out prompts are trained on; none for dialogues, whose rows share one prompt by nature.

    Looks at every row of `train`.
    """
    prompts = {query_key(row) for row in held_out}
    both = len(prompts.intersection(map(query_key, train)))
    if not both or isinstance(task, DialogueTask):
        return []
    return [f"task: {both} of {len(prompts)} held-out prompts are training prompts too; evaluation is no test of them."]


def storable(row: Row) -> Row:
    """What JSON can hold of a task's row, so that `rlattn score` can read it back; numpy's values as plain ones, and
    null for a number that is not finite.
    """
    kept = {}
    for name, value in row.items():
        try:
            text = json.dumps(value, default=lambda other: other.tolist())
        except (TypeError, ValueError, AttributeError, RecursionError):  # an image, bytes, a date
            continue
        if len(text) <= LARGEST_COLUMN:
            kept[name] = finite(json.loads(text))
    return kept
