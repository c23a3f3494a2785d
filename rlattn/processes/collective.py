"""Keeps a reward's collective calls in step on all ranks, whatever becomes of one of them.

A rank whose `prepare` raises, or makes fewer calls than the others, would leave these waiting for ever. So with every
collective call, and at the end, the ranks tell each other how they are: where one has failed or is done already, the
call raises on all ranks at once. Cost: a gather of a word with every call, and one more a `prepare`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import gather_object

from rlattn.processes.phases import Phases
from rlattn.rank import rank

T = TypeVar("T")
CALLS, DONE = "calls", "done"


class PeerFailed(RuntimeError):
    """Another rank's `prepare` is over, so that this one's collective call cannot be made."""


class Lockstep:
    """One `prepare`, on this rank."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self.broken = ""

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all ranks, in their order."""
        return [value for of_rank in self._meet(CALLS, list(values)) for value in of_rank]

    def call(self, act: Callable[[], T]) -> T:
        """`act`, which every rank begins or none."""
        self._meet(CALLS, None)
        return act()

    def finish(self, problem: str) -> str:
        """How `prepare` ended on all ranks, told how it ended on this one: what went wrong first, or nothing."""
        if not self.broken:
            try:
                self._meet(f"rank {rank()}: {problem}" if problem else DONE, None)
            except PeerFailed:
                return problem or self.broken
        return self.broken or problem

    def _meet(self, state: str, payload: Any) -> list[Any]:
        if self.broken:
            raise PeerFailed(self.broken)
        with self.phases.phase("waiting"):
            everyone = gather_object([(state, payload)])
        states = [of_rank for of_rank, _ in everyone]
        if len(set(states)) == 1 and states[0] in (CALLS, DONE):
            return [of_rank for _, of_rank in everyone]
        failed = [of_rank for of_rank in states if of_rank not in (CALLS, DONE)]
        self.broken = failed[0] if failed else "the ranks make different numbers of collective calls"
        raise PeerFailed(self.broken)
