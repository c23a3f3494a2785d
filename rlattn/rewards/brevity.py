"""Brevity: the fewer tokens, the more points; an easy reward of many values. Cost: none.

`points` for an empty completion, falling in a line to 0 at `budget` tokens. It pays wrong answers too: add
`requires: accuracy` to pay right ones only, or see `adaptive_effort`. In a plain sum, many points drown accuracy's 0
and 1; under `combine: decoupled` (GDPO, arXiv 2601.05242) every reward has its own scale.
"""

from dataclasses import dataclass

from rlattn.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Brevity:
    budget: int = 1024
    """Tokens from which on there are no points."""
    points: float = 1.0

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget: expected at least 1, got {self.budget}")
        if not abs(self.points) <= 1e6:
            raise ValueError(f"points: expected a number of at most 1e6, got {self.points}")

    def score(self, rollout: Rollout) -> float | None:
        if rollout.completion and not rollout.completion_ids:
            return None  # stored text: its tokens are not known
        return self.points * max(0.0, 1 - len(rollout.completion_ids) / self.budget)
