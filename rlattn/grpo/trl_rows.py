"""Makes TRL's data sets of a task's rows. Rows ride beside the prompt untouched, so no column can clash with TRL's."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from typing import Any

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError

from rlattn.errors import UserError, describe
from rlattn.formats.effort import at_effort, query_key
from rlattn.policy.prompts import chat_or_plain, render_ids
from rlattn.progress import progress
from rlattn.rank import is_main, say
from rlattn.recipe.schema import Policy
from rlattn.tasks.bad_rows import BadRows, stream_rows
from rlattn.tasks.rows import check_row, rows_of
from rlattn.types import Example, Messages, Row, Task

MANY = 5000  # prompts: looking at more takes so long that it is shown
HEAD = 1000  # rows of a stream, which TRL's shuffling reads beforehand anyway


def train_data(task: Task, policy: Policy, limit: int | None = None) -> Dataset | IterableDataset:
    """Columns `prompt` (as the policy gets it) and `row` (the task's, as it was), of the first `limit` rows."""
    rows = rows_of(task, "train")
    if isinstance(rows, IterableDataset):
        bad = stream_rows()
        rows = rows.take(limit) if limit else rows
        rows = rows.filter(lambda row: bad.passes(lambda: check_row(row, "a row of the stream")))
        return rows.map(lambda row: _example(row, policy, "a row"), remove_columns=rows.column_names)
    rows = rows if isinstance(rows, Dataset) else list(rows)

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = [_example(rows[index], policy, f"training row {index + 1}") for index in batch["index"]]
        return {"prompt": [e["prompt"] for e in examples], "row": [e["row"] for e in examples]}

    # Looked up and not copied into Arrow, which would unify types and fill absent columns with None.
    data = Dataset.from_dict({"index": list(range(len(rows)))[:limit]})
    data.set_transform(look_up)
    return data


def eval_examples(task: Task, policy: Policy, efforts: Sequence[float] | None = None) -> list[Example]:
    """The held-out rows; each at every effort, where there are efforts."""
    rows = enumerate(rows_of(task, "eval"), 1)
    examples = [_example(row, policy, f"held-out row {number}") for number, row in rows]
    if not efforts:
        return examples
    return [at_effort(example, effort) for example in examples for effort in efforts]


def _example(row: Row, policy: Policy, where: str) -> Example:
    check_row(row, where)
    return Example(prompt=chat_or_plain(row["prompt"], policy), row=dict(row))


def count_rows(data: Dataset | IterableDataset, most: int) -> int:
    """How many rows there are; of a stream `most` at most."""
    return len(data) if isinstance(data, Dataset) else sum(1 for _ in data.take(most))


def examples_of(data: Dataset | IterableDataset) -> Iterator[Example]:
    """Every example of a data set; of a stream the first HEAD."""
    if isinstance(data, IterableDataset):
        yield from data.take(HEAD)
        return
    for batch in data.iter(batch_size=HEAD):
        yield from (Example(prompt=p, row=row) for p, row in zip(batch["prompt"], batch["row"], strict=True))


@dataclass(frozen=True, kw_only=True)
class PromptRule:
    """What a prompt must meet: the chat template takes it, and a completion fits behind it into the context."""

    tokenizer: Any
    template_kwargs: dict[str, Any]
    context: int | None
    """Of the model, in tokens; None where that is unknown."""
    completion: int
    drop: bool
    """Leave out what is too long (`task.overlong`) instead of refusing it."""
    effort: float | None = None
    """One that training prompts will ask for, where the recipe has efforts."""

    @property
    def room(self) -> float:
        return inf if self.context is None else self.context - self.completion

    def fitting_examples(self, examples: Sequence[Example]) -> list[Example]:
        """The held-out ones that fit. Raises UserError where one does not and `drop` is off, or none is left."""
        kept = [examples[i] for i in self._fitting((e["prompt"] for e in examples), len(examples), "held-out")]
        if not kept:
            raise UserError("task.overlong", "drop leaves no held-out prompt.", "Lower trainer.max_completion_length.")
        return kept

    def fitting_data(self, data: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The training examples that fit; every one is looked at here, a stream's as they come.

        Raises:
            UserError: one does not, and `drop` is off. Of a stream, that too many do not.
        """
        if isinstance(data, IterableDataset):
            bad, too_long = stream_rows(), BadRows(most=inf, tell=True) if self.drop else stream_rows()
            readable = data.filter(lambda example: bad.passes(lambda: self._stream_tokens(example)))
            return readable.filter(lambda example: too_long.passes(lambda: self._check_room(example)))
        kept = self._fitting((self._asked(example) for example in examples_of(data)), len(data), "training")
        return data if len(kept) == len(data) else data.select(kept)

    def _asked(self, example: Any) -> str | Messages:
        return (example if self.effort is None else at_effort(example, self.effort))["prompt"]

    def _fitting(self, prompts: Iterable[str | Messages], total: int, which: str) -> list[int]:
        """Places of the prompts that fit."""
        lengths: dict[int, int] = {}  # by the hash of a prompt: data sets repeat prompts
        kept, longest, where = [], 0, ""
        with progress(f"{which} prompts", total) if total > MANY and is_main() else nullcontext() as update:
            for place, prompt in enumerate(prompts):
                key = hash(query_key({"prompt": prompt}))
                if key not in lengths:
                    lengths[key] = self._tokens(prompt, f"{which} row {place + 1}")
                if lengths[key] <= self.room:
                    kept.append(place)
                elif lengths[key] > longest:
                    longest, where = lengths[key], f"{which} row {place + 1}"
                if update:
                    update(place + 1, "looked at")
        if longest and not self.drop:
            raise self._too_long(longest, where, f"leaves out {total - len(kept)} of {total} {which} prompts")
        if longest:
            left = f"{total - len(kept)} of {total} {which} prompts are left out, the longest of {longest} tokens"
            why = f"with a completion of {self.completion} they exceed the model's context of {self.context}"
            say(f"warning: task.overlong: {left}: {why}.")
        return kept

    def _stream_tokens(self, example: Any) -> int:
        return self._tokens(self._asked(example), "a row of the stream")

    def _check_room(self, example: Any) -> None:
        if (tokens := self._stream_tokens(example)) > self.room:
            raise self._too_long(tokens, "a row of the stream", "leaves such rows out")

    def _tokens(self, prompt: str | Messages, where: str) -> int:
        try:
            return len(render_ids(self.tokenizer, prompt, self.template_kwargs))
        except (TemplateError, TypeError, ValueError) as error:
            begins = " ".join(str(prompt).split())[:100]
            problem = f"the chat template refuses the prompt of {where}: {describe(error)}. It begins: {begins}"
            raise UserError("task", problem, "Mend or remove the row.") from error

    def _too_long(self, tokens: int, where: str, drop: str) -> UserError:
        return UserError(
            "trainer.max_completion_length",
            f"{self.completion} and a prompt ({where}, {tokens} tokens) exceed the model's context of {self.context}.",
            f"At most {max((self.context or 0) - tokens, 0)}; or task.overlong=drop {drop}.",
        )
