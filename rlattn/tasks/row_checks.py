"""How many rows a generated task may be asked for: all of them are made at once and held in memory."""

from typing import Protocol

MOST_ROWS = 1_000_000


class Sized(Protocol):
    @property
    def train_rows(self) -> int: ...

    @property
    def eval_rows(self) -> int: ...


def check_row_counts(task: Sized) -> None:
    """Raises ValueError where `train_rows` or `eval_rows` is not 1 to MOST_ROWS."""
    for name, count in (("train_rows", task.train_rows), ("eval_rows", task.eval_rows)):
        if not 1 <= count <= MOST_ROWS:
            raise ValueError(f"{name}: expected 1 to {MOST_ROWS}, found {count}")
