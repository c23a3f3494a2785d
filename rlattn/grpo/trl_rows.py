"""Glue: a task's rows as TRL's data sets. Rows ride beside the prompt untouched, so no column can clash with TRL's."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from rlattn.formats.effort import at_effort
from rlattn.policy.prompts import chat_or_plain
from rlattn.recipe.schema import Policy
from rlattn.tasks.rows import check_row, rows_of
from rlattn.types import Example, Row, Task


def train_data(task: Task, policy: Policy, limit: int | None = None) -> Dataset | IterableDataset:
    """Columns `prompt` (as the policy gets it) and `row` (the task's, as it was), of the first `limit` rows."""
    rows = rows_of(task, "train")
    if isinstance(rows, IterableDataset):
        rows = rows.take(limit) if limit else rows
        return rows.map(lambda row: _example(row, policy), remove_columns=rows.column_names)
    rows = rows if isinstance(rows, Dataset) else list(rows)

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = [_example(rows[index], policy) for index in batch["index"]]
        return {"prompt": [e["prompt"] for e in examples], "row": [e["row"] for e in examples]}

    # Looked up and not copied into Arrow, which would unify types and fill absent columns with None.
    data = Dataset.from_dict({"index": list(range(len(rows)))[:limit]})
    data.set_transform(look_up)
    return data


def eval_examples(task: Task, policy: Policy, efforts: Sequence[float] | None = None) -> list[Example]:
    """The held-out rows; each at every effort, where there are efforts."""
    examples = [_example(row, policy) for row in rows_of(task, "eval")]
    if not efforts:
        return examples
    return [at_effort(example, effort) for example in examples for effort in efforts]


def _example(row: Row, policy: Policy) -> Example:
    check_row(row, "a row")
    return Example(prompt=chat_or_plain(row["prompt"], policy), row=dict(row))
