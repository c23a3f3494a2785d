"""Rows of local data files, one by one, with their numbers; every fault names its file and row."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rlattn.errors import UserError, describe, did_you_mean
from rlattn.files import is_there
from rlattn.tasks.bad_rows import BadRows

BINARY = (".parquet", ".arrow")
SUFFIXES = (".jsonl", ".json", ".csv", *BINARY)
SUPPORTED = f"{', '.join(SUFFIXES)}, and .gz of the first three"
OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval"}
STATE = "state.json"
SPLITS = "dataset_dict.json"
WRITTEN_BESIDE = {STATE, SPLITS, "dataset_info.json", "dataset_infos.json"}  # by `datasets`, about the rows

LONGEST_HUB_ID = 96  # characters, as the hub has it

csv.field_size_limit(2**31 - 1)  # of the process: Python's default refuses cells beyond 128 KB


def kind_of(path: str | Path) -> str:
    """Which of SUFFIXES a file's name says that it holds, plain or packed by gzip; "" for none."""
    name = Path(path).name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES and not (name.endswith(".gz") and suffix in BINARY) else ""


def is_hub_id(path: str) -> bool:
    """Whether `path` is a hub id (`gsm8k`, `openai/gsm8k`): neither there on disk nor written like a local path."""
    return (
        re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
        and len(path) <= LONGEST_HUB_ID
        and not kind_of(path)
        and not is_there(Path(path))
    )


def data_files(path: str, split: str) -> list[Path]:
    """The files of a local path that hold `split`, in order. A single file is one split, `train`."""
    where = Path(path).expanduser()
    if where.is_dir():
        return _saved(where, split) or _of_split(where, split)
    if not is_there(where):
        folder = where.parent
        if not folder.is_dir():
            raise UserError(path, f"no such file: the folder {folder} does not exist.")
        raise UserError(path, "no such file.", did_you_mean(where.name, _data_names(folder)))
    if not where.is_file():
        raise UserError(path, "is no regular file.", "Name a file or a folder of files.")
    if not kind_of(where):
        raise UserError(path, f"cannot read '{''.join(where.suffixes[-2:])}' files.", f"Supported: {SUPPORTED}.")
    if split != "train":
        fix = "Name the split's own file in task.path or task.eval_path."
        raise UserError(path, f"is a single file and has no split '{split}'.", fix)
    return [where]


def _saved(folder: Path, split: str) -> list[Path]:
    """The files of a folder that `save_to_disk` wrote, of one data set or one of its splits; none of another folder."""
    if (folder / SPLITS).is_file():
        splits = sorted(state.parent.name for state in folder.glob(f"*/{STATE}"))
        if split not in splits:
            fix = f"{did_you_mean(split, splits)} Set task.split or task.eval_split."
            raise UserError(str(folder), f"the saved data set has no split '{split}'.", fix)
        folder = folder / split
    elif not (folder / STATE).is_file() or not (folder / "dataset_info.json").is_file():
        return []
    elif split != "train":
        fix = "Name the split's own folder in task.path or task.eval_path."
        raise UserError(str(folder), f"is a single saved data set and has no split '{split}'.", fix)
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is damaged: {describe(error)}."
        raise UserError(str(folder / STATE), problem, "Save the data set anew (save_to_disk).") from error
    if state.get("_indices_files"):
        problem = "holds a choice of rows that is not written out."
        raise UserError(str(folder), problem, "Save it anew after flatten_indices().")
    return files


def _of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if _is_data(file.relative_to(folder)) and file.is_file())
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) != 1:
        found = f"holds both {' and '.join(kinds)} files" if kinds else f"holds no {', '.join(SUFFIXES)} file"
        raise UserError(str(folder), f"{found}.", "Name one file, or a folder of one kind.")
    for file in files:
        if file.suffix == ".gz" and file.with_suffix("") in files:
            raise UserError(str(folder), f"holds {file.stem} twice, packed and not.", "Move one away.")
    words = {file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower())) for file in files}
    chosen = [file for file in files if split.lower() in words[file]]
    if chosen:
        return chosen
    if split == "train" and not any(words[file] & OTHER_SPLITS for file in files):
        return files
    fix = f"Set task.split or task.eval_split. Files: {_names(files)}."
    raise UserError(str(folder), f"no file here is named for the split '{split}'.", fix)


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)  # .git, .cache, .ipynb_checkpoints
    return bool(kind_of(file)) and not hidden and file.name not in WRITTEN_BESIDE


def _data_names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if kind_of(file) or file.is_dir()]


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:5]) + (", …" if len(files) > 5 else "")


def columns_of(file: Path) -> list[str] | None:
    """The columns that a file declares, without reading its rows; None for JSON and empty files, which declare none."""
    if kind_of(file) in BINARY:
        return _binary(file)[0]
    if kind_of(file) == ".csv":
        with _text(file, newline="") as lines:
            return next(_readable(csv.reader(lines), file), None)
    return None


def read_rows(file: Path, bad: BadRows | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a file; in JSON lines the number is the line's. What is no row goes to `bad`, or is
    refused.

    Reads line by line or batch by batch, save a JSON list, which is read whole.
    """
    bad = bad or BadRows()
    if kind_of(file) in BINARY:
        rows: Iterator[tuple[int, Any]] = enumerate((row for batch in _binary(file)[1] for row in batch.to_pylist()), 1)
    else:
        rows = (_csv_rows if kind_of(file) == ".csv" else _json_rows)(file, bad)
    for number, row in _readable(rows, file):
        if isinstance(row, dict):
            yield number, row
        else:
            bad.add(UserError(f"{file}, row {number}", f"expected an object, found {type(row).__name__}."))


def _text(file: Path, newline: str | None = None) -> IO[str]:
    reader: Any = gzip.open if file.suffix.lower() == ".gz" else open
    return reader(file, "rt", encoding="utf-8-sig", newline=newline)


def _readable(rows: Iterator[Any], file: Path) -> Iterator[Any]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(str(file), "is not UTF-8 text.", "Save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(str(file), f"is not readable as CSV: {error}.", "Is a quote left open?") from error
    except (EOFError, zlib.error) as error:
        raise UserError(str(file), f"is a damaged .gz file: {describe(error)}.", "Copy or pack it anew.") from error
    except (OSError, ValueError, NotImplementedError, OverflowError) as error:  # pyarrow's words for damage, too
        raise UserError(str(file), f"cannot be read: {describe(error)}.") from error


def _binary(file: Path) -> tuple[list[str], Iterator[Any]]:
    """The columns and the batches of a Parquet or Arrow file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    what = "Parquet" if kind_of(file) == ".parquet" else "Arrow"
    try:
        if what == "Parquet":
            parquet = ParquetFile(file)
            return parquet.schema_arrow.names, parquet.iter_batches(batch_size=256)
        source = pyarrow.memory_map(str(file))
        if source.read(6) != b"ARROW1":  # a stream, as `datasets` saves them
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            return stream.schema.names, iter(stream)
        arrow = pyarrow.ipc.open_file(source)
        return arrow.schema.names, (arrow.get_batch(i) for i in range(arrow.num_record_batches))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(str(file), f"is no readable {what} file: {describe(error)}.") from error


def _csv_rows(file: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    with _text(file, newline="") as lines:
        # strict: a quote that is never closed would make one cell of the rest of the file
        for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
            if None in row:
                where = f"{file}, row {number}"
                bad.add(UserError(where, "has more cells than the header.", "Quote cells that hold commas."))
            else:
                yield number, row


def _json_rows(file: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Of a JSON list, or of one object a line, whichever the file holds: both are called .json in the wild."""
    with _text(file) as lines:
        if kind_of(file) == ".jsonl":
            yield from _json_lines(lines, file, bad)
            return
        text = lines.read()
    if text.lstrip().startswith("[") or _is_one_object(text):
        found = _parsed(text, file, 1)
        yield from enumerate(found if isinstance(found, list) else [found], 1)
    else:
        yield from _json_lines(text.split("\n"), file, bad)


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(lines: Iterable[str], file: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line.strip(), file, number)
        except UserError as fault:
            bad.add(fault)
        else:
            yield number, row


def _parsed(text: str, file: Path, line: int) -> Any:
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair of escapes, which no tokenizer takes
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError:
        fix = "Write the character itself, or both halves."
        where = str(file) if "\n" in text else f"{file}, line {line}"
        raise UserError(where, "holds half of a surrogate pair (\\ud800 and the like).", fix) from None
    except (ValueError, RecursionError) as error:
        at = line + getattr(error, "lineno", 1) - 1
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        problem = f"bad JSON: {getattr(error, 'msg', reason)}."
        fix = "Expected one object a line, or in .json one list of objects."
        raise UserError(f"{file}, line {at}", problem, fix) from error
