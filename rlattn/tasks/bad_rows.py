"""What becomes of rows that cannot be used: the first one is refused; a stream's are counted, told and left out."""

from collections.abc import Callable
from dataclasses import dataclass

from rlattn.errors import UserError
from rlattn.rank import say

MOST_BAD = 0.01  # of a stream's rows: more are no slip of the data's but a recipe that reads it wrongly
ENOUGH = 1000  # rows: a share of fewer says nothing


@dataclass(kw_only=True)
class BadRows:
    """The count of one data set's bad rows. `most`: the share of its rows that is left out before a row is refused."""

    most: float = 0.0
    tell: bool = False
    good: int = 0
    left_out: int = 0

    def passes(self, check: Callable[[], object]) -> bool:
        """Whether a row passes `check`, which raises UserError where it is bad."""
        try:
            check()
        except UserError as fault:
            self.add(fault)
            return False
        self.good += 1
        return True

    def add(self, fault: UserError) -> None:
        """Counts a row that is left out. Raises `fault` where no more may be."""
        if not self.most:
            raise fault
        self.left_out += 1
        rows = self.good + self.left_out
        if self.left_out > self.most * max(rows, ENOUGH):
            problem = f"{fault.problem} It is bad row {self.left_out} of {rows} of the stream: too many to leave out."
            raise UserError(fault.where, problem, fault.fix)
        if self.tell and str(self.left_out).strip("0") == "1":  # 1, 10, 100, …
            say(f"warning: {self.left_out} of {rows} rows of the stream left out so far, the last one: {fault}")


def stream_rows() -> BadRows:
    """For the rows of a stream that a run trains on."""
    return BadRows(most=MOST_BAD, tell=True)
