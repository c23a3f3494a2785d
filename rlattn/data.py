"""Glue: a task's rows as TRL's data sets. Rows ride beside the prompt untouched, so no column can clash with TRL's."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from rlattn.errors import UserError
from rlattn.evaluate import Example
from rlattn.prompts import chat_or_plain
from rlattn.recipe import Policy
from rlattn.tasks import Row, Task


def train_data(task: Task, policy: Policy) -> Dataset | IterableDataset:
    """Columns `prompt` (as the policy gets it) and `row` (the task's, as it was)."""
    rows = task.rows("train")
    if isinstance(rows, IterableDataset):
        return rows.map(lambda row: _example(row, policy), remove_columns=rows.column_names)
    rows = rows if isinstance(rows, Dataset) else list(rows)
    if not len(rows):
        raise UserError("task", "has no training rows.")
    _check_row(rows[0])

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = [_example(rows[index], policy) for index in batch["index"]]
        return {"prompt": [e["prompt"] for e in examples], "row": [e["row"] for e in examples]}

    # Looked up and not copied into Arrow, which would unify types and fill absent columns with None.
    data = Dataset.from_dict({"index": list(range(len(rows)))})
    data.set_transform(look_up)
    return data


def eval_examples(task: Task, policy: Policy) -> list[Example]:
    rows: Iterable[Row] = task.rows("eval")
    examples = [_example(row, policy) for row in rows]
    if not examples:
        raise UserError("task", "has no held-out rows.", "Set task.eval_rows to at least 1.")
    _check_row(examples[0]["row"])
    return examples


def first_example(task: Task, policy: Policy) -> Example:
    return next(_example(row, policy) for row in islice(task.rows("train"), 1))


def _example(row: Row, policy: Policy) -> Example:
    return Example(prompt=chat_or_plain(row["prompt"], policy), row=dict(row))


def _check_row(row: Row) -> None:
    if "prompt" not in row:
        raise UserError("task", f"its rows have no 'prompt', only {', '.join(map(str, row))}.", "See the README.")
