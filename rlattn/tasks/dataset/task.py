"""Any data set of prompts and gold answers: a local file or folder (JSON lines, JSON, Parquet, CSV) or a hub id.

Local files are read here rather than by `datasets`: a bad line is then named by file and number, the columns of a row
need no common type, and `rlattn check` starts fast.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rlattn.errors import HubUnreachable, UserError, did_you_mean
from rlattn.formats.final_answer import final_answer, gold_answer, same_answer
from rlattn.tasks.dataset.readers import SUFFIXES, columns_of, data_files, is_hub_id, read_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from rlattn.types import Row, Split

COLUMNS = {"prompt": "prompt", "answer": "answer"}


@dataclass(frozen=True, kw_only=True)
class DatasetTask:
    """Prompts and gold answers from a file, a folder or the hub; an answer is right where math-verify says so.

    A row has `prompt` (text, or chat messages), `answer` (the bare gold answer) and every other column as it is.
    """

    path: str
    """A .jsonl, .json, .parquet or .csv file, a folder of one of these kinds, or a hub id (`openai/gsm8k`)."""
    eval_path: str | None = None
    """The same for evaluation; all its rows are used."""
    config: str | None = None
    """Hub only: the configuration (`main`)."""
    split: str = "train"
    """Hub or folder: the split to train on. In a folder, a split is the files with its name in theirs."""
    eval_split: str | None = None
    """Hub or folder: the split to evaluate on; of eval_path, `train` unless given."""
    eval_rows: int = 200
    """Rows held out of train where there is neither eval_path nor eval_split: a seeded choice, or a stream's head."""
    streaming: bool = False
    """Read train rows as they are needed, in their order, instead of all at the start."""
    columns: dict[str, str] = field(default_factory=lambda: dict(COLUMNS))
    """Where `prompt` and `answer` stand in the data: `{prompt: question}`."""
    instruction: str = ""
    """Appended to every text prompt, on a line of its own."""
    revision: str | None = None
    """Hub only: a branch, tag or commit."""
    data_seed: int = 0
    """Chooses the held-out rows."""

    def __post_init__(self) -> None:
        for key in self.columns.keys() - COLUMNS.keys():
            raise UserError(f"task.columns.{key}", "is not a column rlattn reads.", did_you_mean(key, COLUMNS))
        if self.eval_rows < 0:
            raise UserError("task.eval_rows", f"is {self.eval_rows}, expected 0 or more.")
        if self.columns.get("prompt", "prompt") == self.columns.get("answer", "answer"):
            raise UserError(
                "task.columns", "prompt and answer are one column: the prompt would hold the answer.", "Mend it."
            )
        if self.eval_path == self.path and (self.eval_split or "train") == self.split:
            raise UserError("task.eval_path", "is the training data.", "Leave it out to hold out eval_rows of them.")
        if self.eval_path is None and self.eval_split == self.split:
            raise UserError("task.eval_split", f"is the training split, '{self.split}'.", "Name another, or none.")

    def rows(self, split: "Split") -> "Iterable[Row]":
        """The rows of `split`: a list, a `datasets.Dataset` from the hub, an `IterableDataset` for a train stream.

        Every row of local data is checked here, a stream's rows as they come. Raises UserError naming the file and row,
        column or option at fault. Cost: reads all of the data, or the head of a stream.
        """
        if split == "eval" and (source := self._eval_source):
            return list(self._source(*source, streaming=self.streaming))
        if self.streaming:
            return self._stream_rows(split)
        train = self._train_rows()
        held_out = 0 if self._eval_source else self.eval_rows
        if held_out and held_out >= len(train):
            raise self._too_few(len(train))
        chosen = set(Random(self.data_seed).sample(range(len(train)), held_out))
        kept = [i for i in range(len(train)) if (i in chosen) == (split == "eval")]
        return [train[i] for i in kept] if isinstance(train, list) else train.select(kept)

    def first_rows(self, n: int = 3) -> "list[Row]":
        """The first `n` training rows, checked, and a look at the first evaluation row: for `rlattn check`.

        Local data: reads no more than that (a Parquet file's first batch) and imports no `datasets`.
        """
        rows = list(islice(self._source(self.path, self.split, streaming=True), n))
        if source := self._eval_source:
            next(self._source(*source, streaming=True))
        return rows

    def verify(self, completion: str, row: "Row") -> float:
        """1.0 where the final answer of `completion` is the row's. Never raises; cost: see `same_answer`."""
        answer = final_answer(completion)
        # stored rows may hold the worked solution as the data has it
        return float(answer is not None and same_answer(answer, gold_answer(str(row["answer"]))))

    def gold(self, row: "Row") -> str:
        """A completion that `verify` scores 1.0."""
        return f"<answer>{row['answer']}</answer>"

    @property
    def _eval_source(self) -> tuple[str, str] | None:
        """(path, split) of the evaluation rows, or None where they are held out of train."""
        if self.eval_path is not None:
            return self.eval_path, self.eval_split or "train"
        return None if self.eval_split is None else (self.path, self.eval_split)

    def _train_rows(self) -> "list[Row] | Dataset":
        if not is_hub_id(self.path):
            return list(self._source(self.path, self.split, streaming=False))
        train = _load_hub(self.path, self.config, self.split, self.revision, streaming=False)
        return train.map(partial(self._hub_row, self.path), with_indices=True)

    def _stream_rows(self, split: "Split") -> "list[Row] | IterableDataset":
        from datasets import IterableDataset

        held_out = 0 if self._eval_source else self.eval_rows
        head = list(islice(self._source(self.path, self.split, streaming=True), held_out + 1))
        if len(head) <= held_out:
            raise self._too_few(len(head))
        if split == "eval":
            return head[:held_out]
        if is_hub_id(self.path):
            stream = _load_hub(self.path, self.config, self.split, self.revision, streaming=True)
            return stream.map(partial(self._hub_row, self.path), with_indices=True).skip(held_out)
        files = [str(file) for file in data_files(self.path, self.split)]
        return IterableDataset.from_generator(self._local_rows, gen_kwargs={"files": files}).skip(held_out)

    def _source(self, path: str, split: str, *, streaming: bool) -> "Iterator[Row]":
        """The rows of a path, one by one, checked; at least one. Local files are read as they go in either case."""
        if is_hub_id(path):
            loaded = _load_hub(path, self.config, split, self.revision, streaming=streaming)
            rows = self._hub_rows(path, loaded)
        else:
            for name in ("config", "revision"):
                if getattr(self, name) is not None and not is_hub_id(self.path):
                    raise UserError(f"task.{name}", f"is for data sets on the hub; {path} is local.", "Leave it out.")
            rows = self._local_rows([str(file) for file in data_files(path, split)])
        first = next(rows, None)
        if first is None:
            raise UserError(path, "the data set is empty: it has no rows.", "Check task.path and task.split.")
        yield first
        yield from rows

    def _local_rows(self, files: list[str]) -> "Iterator[Row]":
        for file in files:
            known = columns_of(Path(file))
            if known is not None:
                self._check_columns(known, file)
            for number, row in read_rows(Path(file)):
                yield self._row(row, f"{file}, row {number}")

    def _hub_rows(self, path: str, loaded: Iterable[Mapping[str, Any]]) -> "Iterator[Row]":
        for index, row in enumerate(loaded):
            yield self._hub_row(path, row, index)

    def _hub_row(self, path: str, row: Mapping[str, Any], index: int) -> "Row":
        return self._row(row, f"{path}, row {index + 1}")

    def _row(self, row: Mapping[str, Any], where: str) -> "Row":
        self._check_columns(row, where)
        columns = {**COLUMNS, **self.columns}
        prompt = _prompt(row[columns["prompt"]], f"{where}, column '{columns['prompt']}'", self.instruction)
        answer = _answer(row[columns["answer"]], f"{where}, column '{columns['answer']}'")
        return {**row, "prompt": prompt, "answer": answer}

    def _check_columns(self, known: Iterable[str], where: str) -> None:
        for key, column in {**COLUMNS, **self.columns}.items():
            if column not in known:
                fix = f"{did_you_mean(column, map(str, known))} Set task.columns.{key}."
                raise UserError(where, f"has no column '{column}' (task.columns.{key}).", fix)

    def _too_few(self, found: int) -> UserError:
        problem = f"is {self.eval_rows}, but {self.path} has only {found} rows; some must be left to train on."
        return UserError("task.eval_rows", problem, "Lower it, or give task.eval_path or task.eval_split.")


def _prompt(value: object, where: str, instruction: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(where, "the prompt is empty.", "Fill or remove the row.")
        return f"{value}\n{instruction}" if instruction else value
    if not isinstance(value, list):
        raise UserError(where, f"expected text or chat messages, found {_kind(value)}.", "Fill or remove the row.")
    if not value:
        raise UserError(where, "the prompt has no messages.", "Fill or remove the row.")
    if instruction:
        raise UserError("task.instruction", f"is for text prompts; {where} holds chat messages.", "Write it into them.")
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UserError(where, f"message {i}: expected {{role, content}}, found {_kind(message)}.")
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise UserError(where, f"message {i}: expected '{part}' to be text, found {_kind(message.get(part))}.")
    return value


def _answer(value: object, where: str) -> str:
    # A bare number is an answer too: many data sets keep their gold answers in a column of integers.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(where, f"expected text or a number, found {_kind(value)}.", "Fill or remove the row.")
    answer = gold_answer(value)
    if not answer:
        raise UserError(where, "the gold answer is empty.", "Fill or remove the row.")
    return answer


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} ({str(value)[:40]})"


def _load_hub(path: str, config: str | None, split: str, revision: str | None, *, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, name=config, split=split, revision=revision, streaming=streaming)
    except DatasetNotFoundError as error:
        fix = f"A local path ends in {', '.join(SUFFIXES)} or exists."
        raise UserError(path, f"is no data set on the hub, or is private or gated: {error}", fix) from error
    except ConnectionError as error:
        problem = "the hub cannot be reached for this data set."
        fix = "Give a local path, or set HF_HUB_OFFLINE=1 with a cached copy."
        raise HubUnreachable(path, problem, fix) from error
    except ValueError as error:  # `datasets` says so of an unknown config or split, and lists the known ones
        raise UserError(path, str(error), "See task.config and task.split.") from error
