"""Rows of local data files, one by one, with their numbers; every fault names its file and row."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlattn.errors import UserError, describe, did_you_mean

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval"}


def is_hub_id(path: str) -> bool:
    """Whether `path` is a hub id (`gsm8k`, `openai/gsm8k`): neither there on disk nor written like a local path."""
    return (
        re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
        and Path(path).suffix.lower() not in SUFFIXES
        and not Path(path).exists()
    )


def data_files(path: str, split: str) -> list[Path]:
    """The files of a local path that hold `split`, in order. A single file is one split, `train`."""
    where = Path(path).expanduser()
    if where.is_dir():
        return _of_split(where, split)
    if not where.exists():
        folder = where.parent
        if not folder.is_dir():
            raise UserError(path, f"no such file: the folder {folder} does not exist.")
        raise UserError(path, "no such file.", did_you_mean(where.name, _data_names(folder)))
    if not where.is_file():
        raise UserError(path, "is no regular file.", "Name a file or a folder of files.")
    if where.suffix.lower() not in SUFFIXES:
        raise UserError(path, f"cannot read '{where.suffix}' files.", f"Supported: {', '.join(SUFFIXES)}.")
    if split != "train":
        fix = "Name the split's own file in task.path or task.eval_path."
        raise UserError(path, f"is a single file and has no split '{split}'.", fix)
    return [where]


def _of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1:
        found = f"holds both {' and '.join(kinds)} files" if kinds else f"holds no {', '.join(SUFFIXES)} file"
        raise UserError(str(folder), f"{found}.", "Name one file, or a folder of one kind.")
    words = {file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower())) for file in files}
    chosen = [file for file in files if split.lower() in words[file]]
    if chosen:
        return chosen
    if split == "train" and not any(words[file] & OTHER_SPLITS for file in files):
        return files
    fix = f"Set task.split or task.eval_split. Files: {_names(files)}."
    raise UserError(str(folder), f"no file here is named for the split '{split}'.", fix)


def _data_names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES or file.is_dir()]


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:5]) + (", …" if len(files) > 5 else "")


def columns_of(file: Path) -> list[str] | None:
    """The columns that a file declares, without reading its rows; None for JSON and empty files, which declare none."""
    if file.suffix.lower() == ".parquet":
        return _parquet(file).schema_arrow.names
    if file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return next(_readable(csv.reader(lines), file), None)
    return None


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a file; in JSON lines the number is the line's.

    Reads line by line or batch by batch, save a JSON list, which is read whole.
    """
    read = {".parquet": _parquet_rows, ".csv": _csv_rows}.get(file.suffix.lower(), _json_rows)
    for number, row in _readable(read(file), file):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}", f"expected an object, found {type(row).__name__}.")
        yield number, row


def _readable(rows: Iterator[Any], file: Path) -> Iterator[Any]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(str(file), "is not UTF-8 text.", "Save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(str(file), f"is not readable as CSV: {error}.") from error
    except OSError as error:  # pyarrow's word for a damaged page, too
        raise UserError(str(file), f"cannot be read: {describe(error)}.") from error


def _parquet(file: Path) -> Any:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise UserError(str(file), f"is no readable Parquet file: {describe(error)}.") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    yield from enumerate((row for batch in _parquet(file).iter_batches(batch_size=256) for row in batch.to_pylist()), 1)


def _csv_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 1):
            if None in row:
                where = f"{file}, row {number}"
                raise UserError(where, "has more cells than the header.", "Quote cells that hold commas.")
            yield number, row


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Of a JSON list, or of one object a line, whichever the file holds: both are called .json in the wild."""
    with file.open(encoding="utf-8-sig") as lines:
        if file.suffix.lower() == ".json":
            text = lines.read()
            if text.lstrip().startswith("["):
                yield from enumerate(_parsed(text, file, 1), 1)
                return
            yield from _json_lines(text.split("\n"), file)
        else:
            yield from _json_lines(lines, file)


def _json_lines(lines: Iterable[str], file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _parsed(line.strip(), file, number)


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
