"""UserError: an error that the user can fix, told in one message with exit code 2, never as a traceback."""

import errno
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

# where code lies that is not the user's
LIBRARIES = tuple({*(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
                   str(Path(__file__).parent)})  # fmt: skip


# a disk's refusals, which need not name a file
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)


class UserError(Exception):
    """An error that the user can fix: what is wrong, where, and how to fix it. The command line exits with 2.

    Args:
        where: the key path, file or option at fault (`trainer.max_steps`, `data/train.jsonl, row 3`).
        problem: what was found and what was expected.
        fix: what to do about it; may be empty.
    """

    def __init__(self, where: str, problem: str, fix: str = ""):
        self.where, self.problem, self.fix = where, problem, fix
        super().__init__(" ".join(part for part in (f"{where}: {problem}", fix) if part))


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the nearest valid name, else the list of valid ones."""
    valid = sorted(valid)
    near = get_close_matches(str(name), valid, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Valid: {', '.join(valid)}." if 0 < len(valid) <= 30 else ""


@contextmanager
def file_faults(where: str | Path) -> Iterator[None]:
    """What a file or a disk refuses inside of this becomes a UserError that names the file, or `where` if the system
    does not say which.
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None or (error.filename is None and error.errno not in DISK):
            raise
        raise UserError(str(error.filename or where), f"cannot be read or written: {error.strerror}.") from None


@contextmanager
def names_too_long() -> Iterator[None]:
    """A name longer than the file system allows becomes a UserError: asking whether such a file exists raises too."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or error.filename is None:
            raise
        raise UserError(f"{str(error.filename)[:80]}…", "is a longer name than the file system allows.") from None


class HubUnreachable(UserError):
    """A hub id that cannot be looked up for want of a network: `rlattn check` goes on, a run does not."""


def describe(error: BaseException) -> str:
    """An exception of somebody's code on one line, even one that cannot print itself; with the line of the user's file
    that it came through last, where there is one.
    """
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in lines if not file.startswith(("<", *LIBRARIES))]
    return f"{what} ({Path(own[-1][0]).name}, line {own[-1][1]})" if own else what
