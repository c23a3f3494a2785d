"""Mistakes of the user's: one clear message, exit code 2, never a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What is wrong, where, and how to mend it. The command line prints it as one message and exits with 2.

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
    return f"Valid: {', '.join(valid)}." if len(valid) <= 30 else ""


class HubUnreachable(UserError):
    """A hub id that cannot be looked up for want of a network: `rlattn check` goes on, a run does not."""


def describe(error: BaseException) -> str:
    """An exception of somebody's code on one line, even one that cannot print itself."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
