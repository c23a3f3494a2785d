"""Durable checkpoints: whole or not there, checked before they are read, rotated only once the next one is safe.

Written into `.partial/`, listed with sizes and SHA-256 in `manifest.json`, flushed to the disk, renamed. What is in
`.partial/` is never read. Every rank must see the same folder. Cost: each file is read once after it was written, and
once more, on rank 0, before a run goes on.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlattn.errors import UserError, describe
from rlattn.formats.strict_json import to_json

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def checkpoints(folder: Path) -> list[Path]:
    """What is called a checkpoint in there, oldest first, sound or not."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,12}", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_ranks(checkpoint: Path) -> int | None:
    """How many ranks wrote it."""
    found = [re.fullmatch(r"rank-0-of-(\d+)\.pt", path.name) for path in checkpoint.glob("rank-0-of-*.pt")]
    return next((int(match[1]) for match in found if match), None)


def seal(folder: Path, name: str) -> None:
    """Makes `folder/.partial/name` the checkpoint `folder/name`, whole or not at all. One rank, once all have written.

    Raises:
        OSError: the disk is full, or fails.
    """
    partial, final = folder / PARTIAL / name, folder / name
    files = _files(partial)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda file: file_digest(partial / file), files))
    listed = {file: [(partial / file).stat().st_size, digest] for file, digest in zip(files, digests, strict=True)}
    (partial / MANIFEST).write_text(to_json({"files": listed}, indent=1), encoding="utf-8")
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    if os.path.lexists(final):  # a damaged one, or of a course that was given up
        os.replace(final, folder / PARTIAL / f"{name}-replaced")
    os.replace(partial, final)
    _flush(folder)


def problem(checkpoint: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint; None where every byte is as it was written (every size, without `hashes`)."""
    try:
        if not (checkpoint / MANIFEST).is_file():
            return f"{MANIFEST} is missing or damaged"
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(file): (int(size), str(digest)) for file, (size, digest) in listed.items()}
        there = set(_files(checkpoint))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or damaged"
    for file in sorted(expected.keys() - there):
        return f"{file} is missing"
    for file in sorted(there - expected.keys()):
        return f"{file} is not in {MANIFEST}"
    if checkpoint_ranks(checkpoint) is None:
        return "no rank's own file is there"
    try:
        for file, (size, _) in expected.items():
            if (found := (checkpoint / file).stat().st_size) != size:
                return f"{file} has {found} bytes instead of {size}"
        if hashes:
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(lambda file: file_digest(checkpoint / file), expected))
            for file, digest in zip(expected, digests, strict=True):
                if digest != expected[file][1]:
                    return f"the contents of {file} have changed"
    except OSError as error:
        return describe(error)
    return None


def newest_sound(folder: Path, *, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, None where there is none at all; and a line for each damaged newer one.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    skipped: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        wrong = problem(checkpoint, hashes=hashes)
        if wrong is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} is damaged and skipped: {wrong}")
    if skipped:
        raise UserError(
            str(folder), f"no checkpoint is whole ({'; '.join(skipped)}).", "Restore one, or remove it to start over."
        )
    return None, []


def rotate(folder: Path, step: int, *, keep_last: int | None, best_step: int | None = None) -> None:
    """Removes checkpoints older than the last `keep_last` up to `step`, but the best; and those of later steps.

    A later step is of a course that was given up, as when its checkpoint was damaged. One rank, after `seal`.
    """
    found = checkpoints(folder)
    steps = [checkpoint_step(path) for path in found]
    kept = {*[s for s in steps if s <= step][-(keep_last or len(steps)) :], best_step}
    (folder / PARTIAL).mkdir(exist_ok=True)
    for path, of_step in zip(found, steps, strict=True):
        if of_step not in kept:
            os.replace(path, folder / PARTIAL / f"{path.name}-removed")  # at once: never half a checkpoint
    clear(folder)


def clear(folder: Path) -> None:
    """Removes what an interrupted or failed save left."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def is_full_disk(error: BaseException) -> bool:
    """Whether there is no room left; safetensors tells it in words alone."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = tuple(f"os error {number}" for number in full)
    return any(getattr(c, "errno", None) in full or any(word in str(c) for word in words) for c in _causes(error))


def is_write_failure(error: BaseException) -> bool:
    """Whether the disk is at fault: full, over quota, or failing. Torch and safetensors have errors of their own."""
    words = ("PytorchStreamWriter", "inline_container", "iostream error")
    return any(
        isinstance(c, OSError) or type(c).__name__ == "SafetensorError" or any(word in str(c) for word in words)
        for c in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """It and what led to it: torch raises a second error, about the file it could not end."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(path for path in found if path != MANIFEST)


def file_digest(file: Path) -> str:
    with file.open("rb") as contents:
        return hashlib.file_digest(contents, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
