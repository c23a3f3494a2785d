"""Any data set of prompts and gold answers: a local file or folder (JSON lines, JSON, Parquet, CSV, Arrow) or a hub id.

Local files are read here rather than by `datasets`: a bad line is then named by file and number, the columns of a row
need no common type, and `rlattn check` starts fast.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from itertools import islice
from math import isfinite
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from rlattn.errors import HubUnreachable, UserError, did_you_mean
from rlattn.formats.effort import query_key
from rlattn.formats.final_answer import final_answer, gold_answer, same_answer
from rlattn.tasks.bad_rows import MOST_BAD, BadRows, stream_rows
from rlattn.tasks.dataset.readers import SUPPORTED, columns_of, data_files, is_hub_id, read_rows
from rlattn.tasks.rows import ANSWERED, END_IN_QUESTION, is_answered

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from rlattn.types import Row, Split

COLUMNS = {"prompt": "prompt", "answer": "answer"}
CHAT_AS_TEXT = re.compile(r"""\s*(?:array\(\s*)?\[\s*\{\s*["'](?:role|content)["']\s*:""")  # a list in a cell of CSV

NULLS = {"nan", "+nan", "-nan", "inf", "+inf", "-inf", "<na>", "nat", "#n/a"}
"""What pandas and spreadsheets write into the text of a cell that has no value; infinity is written `\\infty`."""


class Look(NamedTuple):
    """What was seen of a data set."""

    train: "list[Row]"
    held_out: "list[Row]"
    left_out: int
    """Bad rows of a stream."""
    whole: bool
    """Whether all rows to train on were seen."""


@dataclass(frozen=True, kw_only=True)
class DatasetTask:
    """Prompts and gold answers from a file, a folder or the hub; an answer is right where math-verify says so.

    A row has `prompt` (text, or chat messages), `answer` (the bare gold answer) and every other column as it is.
    """

    path: str
    """A .jsonl, .json, .csv (these may be packed: .gz), .parquet or .arrow file, a folder of files of one of these
    kinds, a folder that `save_to_disk` wrote, or a hub id (`openai/gsm8k`).
    """
    eval_path: str | None = None
    """The same for evaluation; all its rows are used."""
    config: str | None = None
    """Hub only: the configuration (`main`)."""
    split: str = "train"
    """Hub or folder: the split to train on. In a folder, a split is the files with its name in theirs."""
    eval_split: str | None = None
    """Hub or folder: the split to evaluate on; of eval_path, `train` unless given."""
    eval_rows: int = 200
    """Prompts held out of train if there is neither eval_path nor eval_split: a seeded choice, or a stream's head."""
    streaming: bool = False
    """Read train rows as they are needed, in their order, instead of all at the start."""
    columns: dict[str, str] = field(default_factory=lambda: dict(COLUMNS))
    """Where `prompt` and `answer` stand in the data: `{prompt: question, answer: reward_model.ground_truth}`."""
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

        No prompt is in both where rows are held out: of a held-out prompt the first row is, and its copies are in
        neither. Every row is checked here, a stream's as they come; there, a few bad ones are left out.
        Raises UserError naming the file and row, column or option at fault. Cost: reads all of the data, or the head of
        a stream.
        """
        if split == "eval" and (source := self._eval_source):
            return list(self._source(*source, BadRows(), streaming=self.streaming))
        if self.streaming:
            return self._stream_rows(split)
        if is_hub_id(self.path):
            from_hub = self._hub_rows()
            return from_hub.select(self._places(from_hub["prompt"])[split])
        rows = list(self._source(self.path, self.split, BadRows(), streaming=False))
        return [rows[i] for i in self._places(row["prompt"] for row in rows)[split]]

    def look(self, most: int | None) -> "Look":
        """What `rlattn check` looks at: the first `most` rows, or all of them, checked, and the evaluation's first.

        Local data: reads no more than that (a Parquet file's first batch) and imports no `datasets`.
        """
        bad = BadRows(most=MOST_BAD) if self.streaming else BadRows()
        train = list(islice(self._source(self.path, self.split, bad, streaming=True), most))
        held_out: list[Row] = []
        whole = most is None or len(train) < most
        if source := self._eval_source:
            held_out = list(islice(self._source(*source, BadRows(), streaming=True), most))
        elif whole:
            places = self._places(row["prompt"] for row in train)
            train, held_out = [train[i] for i in places["train"]], [train[i] for i in places["eval"]]
        return Look(train, held_out, bad.left_out, whole)

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

    @property
    def local_size(self) -> int | None:
        """Bytes of the local files it reads; None where some rows come from the hub."""
        sources = [(self.path, self.split), *([self._eval_source] if self._eval_source else [])]
        if any(is_hub_id(path) for path, _ in sources):
            return None
        files = {file for source in sources for file in data_files(*source)}
        return sum(file.stat().st_size for file in files if file.is_file())

    def _places(self, prompts: Iterable[Any]) -> "dict[Split, list[int]]":
        """Where each split's rows stand, by their prompts."""
        keys = [query_key({"prompt": prompt}) for prompt in prompts]
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        wanted = 0 if self._eval_source else self.eval_rows
        if wanted and wanted >= len(first):
            raise self._too_few(len(first))
        distinct = list(first)
        held_out = set(distinct[:wanted] if self.streaming else Random(self.data_seed).sample(distinct, wanted))
        train = [place for place, key in enumerate(keys) if key not in held_out]
        return {"train": train, "eval": sorted(first[key] for key in held_out)}

    def _stream_rows(self, split: "Split") -> "list[Row] | IterableDataset":
        from datasets import IterableDataset

        head = self._head()
        if split == "eval":
            return list(head.values())
        bad = stream_rows()
        if is_hub_id(self.path):
            loaded = _load_hub(self.path, self.config, self.split, self.revision, streaming=True)
            stream = loaded.map(partial(self._hub_batch, bad), with_indices=True, batched=True, batch_size=1)
        else:
            files = [str(file) for file in data_files(self.path, self.split)]
            stream = IterableDataset.from_generator(self._local_rows, gen_kwargs={"files": files, "bad": bad})
        return stream.filter(lambda row: query_key(row) not in head)

    def _head(self) -> "dict[str, Row]":
        """The held-out rows of a stream, by their prompts. Reads on to the first other prompt."""
        wanted = 0 if self._eval_source else self.eval_rows
        head: dict[str, Row] = {}
        for row in self._source(self.path, self.split, BadRows(most=MOST_BAD), streaming=True):
            key = query_key(row)
            if key not in head and len(head) == wanted:
                return head
            head.setdefault(key, row)
        raise self._too_few(len(head))

    def _source(self, path: str, split: str, bad: BadRows, *, streaming: bool) -> "Iterator[Row]":
        """The rows of a path, one by one, checked; at least one. Local files are read as they go in either case."""
        if is_hub_id(path):
            loaded = _load_hub(path, self.config, split, self.revision, streaming=streaming)
            rows = self._usable(((f"{path}, row {i}", row) for i, row in enumerate(loaded, 1)), bad)
        else:
            for name in ("config", "revision"):
                if getattr(self, name) is not None and not is_hub_id(self.path):
                    raise UserError(f"task.{name}", f"is for data sets on the hub; {path} is local.", "Leave it out.")
            rows = self._local_rows([str(file) for file in data_files(path, split)], bad)
        first = next(rows, None)
        if first is None:
            found = f"every one of its {bad.left_out} rows is bad" if bad.left_out else "it has no rows"
            raise UserError(path, f"the data set is empty: {found}.", "Check task.path and task.split.")
        yield first
        yield from rows

    def _local_rows(self, files: list[str], bad: BadRows) -> "Iterator[Row]":
        for file in files:
            known = columns_of(Path(file))
            if known is not None:
                self._check_columns(known, file)
            located = ((f"{file}, row {number}", row) for number, row in read_rows(Path(file), bad))
            yield from self._usable(located, bad)

    def _usable(self, located: Iterable[tuple[str, Mapping[str, Any]]], bad: BadRows) -> "Iterator[Row]":
        for where, row in located:
            try:
                usable = self._row(row, where)
            except UserError as fault:
                bad.add(fault)
            else:
                bad.good += 1
                yield usable

    def _hub_rows(self) -> "Dataset":
        loaded = _load_hub(self.path, self.config, self.split, self.revision, streaming=False)
        return loaded.map(lambda row, index: self._row(row, f"{self.path}, row {index + 1}"), with_indices=True)

    def _hub_batch(self, bad: BadRows, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of one row, or of none where it is bad."""
        row = {name: values[0] for name, values in batch.items()}
        usable = list(self._usable([(f"{self.path}, row {indices[0] + 1}", row)], bad))
        return {name: [found[name] for found in usable] for name in {**row, **COLUMNS}}

    def _row(self, row: Mapping[str, Any], where: str) -> "Row":
        columns = {**COLUMNS, **self.columns}
        self._check_columns(row, where)
        found = {key: _cell(row, column, where, key) for key, column in columns.items()}
        prompt = _prompt(found["prompt"], f"{where}, column '{columns['prompt']}'", self.instruction)
        answer = _answer(found["answer"], f"{where}, column '{columns['answer']}'")
        return {**row, "prompt": prompt, "answer": answer}

    def _check_columns(self, known: Iterable[str], where: str) -> None:
        for key, column in {**COLUMNS, **self.columns}.items():
            if column not in known and column.partition(".")[0] not in known:
                fix = f"{did_you_mean(column, map(str, known))} Set task.columns.{key}."
                raise UserError(where, f"has no column '{column}' (task.columns.{key}).", fix)

    def _too_few(self, found: int) -> UserError:
        have = f"{self.path} has only {found} different prompts"
        problem = f"is {self.eval_rows}, but {have}; some must be left to train on."
        return UserError("task.eval_rows", problem, "Lower it, or give task.eval_path or task.eval_split.")


def _cell(row: Mapping[str, Any], column: str, where: str, key: str) -> Any:
    """A column, or what its dotted path leads to (`reward_model.ground_truth`)."""
    if column in row:
        return row[column]
    found: Any = row
    way = column.split(".")
    for depth, part in enumerate(way):
        if not isinstance(found, Mapping) or part not in found:
            inside = ".".join(way[:depth])
            near = did_you_mean(part, map(str, found)) if isinstance(found, Mapping) else f"It is {_kind(found)}."
            problem = f"column '{inside}' holds no '{part}' (task.columns.{key}: {column})."
            raise UserError(where, problem, near)
        found = found[part]
    return found


def _prompt(value: Any, where: str, instruction: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and CHAT_AS_TEXT.match(value):
        try:
            value = json.loads(value)
        except ValueError as error:
            problem = "holds chat messages as text that is no JSON."
            raise UserError(where, problem, "Write them as JSON, or store lists (.jsonl, .parquet).") from error
    if isinstance(value, str) and not _is_null(value):
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
    if is_answered(value):
        raise UserError(where, f"the prompt {ANSWERED}", END_IN_QUESTION)
    return value


def _answer(value: object, where: str) -> str:
    if isinstance(value, list) and len(value) > 1:
        raise UserError(where, f"expected one answer, found a list of {len(value)}.", "Leave one, or remove the row.")
    if isinstance(value, list) and value:
        (value,) = value
    # A bare number is an answer too: many data sets keep their gold answers in a column of integers.
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and isfinite(value):
        value = str(value)
    answer = gold_answer(value) if isinstance(value, str) else ""
    if not isinstance(value, str) or _is_null(answer):  # data stores write no answer as null, NaN or an empty list
        found = _kind(answer or value)
        raise UserError(where, f"expected text or a number, found {found}.", "Fill or remove the row.")
    if not answer:
        raise UserError(where, "the gold answer is empty.", "Fill or remove the row.")
    return answer


def _is_null(value: object) -> bool:
    if isinstance(value, float):
        return not isfinite(value)
    return value is None or (isinstance(value, str) and value.strip().casefold() in NULLS)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return f"{'null' if _is_null(value) else type(value).__name__} ({str(value)[:40]})"


def _load_hub(path: str, config: str | None, split: str, revision: str | None, *, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, name=config, split=split, revision=revision, streaming=streaming)
    except DatasetNotFoundError as error:
        fix = f"A local path ends in {SUPPORTED}, or exists."
        raise UserError(path, f"is no data set on the hub, or is private or gated: {error}", fix) from error
    except ConnectionError as error:
        problem = "the hub cannot be reached for this data set."
        fix = "Give a local path, or set HF_HUB_OFFLINE=1 with a cached copy."
        raise HubUnreachable(path, problem, fix) from error
    except ValueError as error:  # `datasets` says so of an unknown config or split, and lists the known ones
        raise UserError(path, str(error), "See task.config and task.split.") from error
