"""Payoff: what the task's own game pays for a completion, honest or not. For tasks with `payoff(completion, row)`."""

from dataclasses import dataclass

from rlattn.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Payoff:
    needs_of_task = ("payoff",)

    def score(self, rollout: Rollout) -> float:
        return rollout.task.payoff(rollout.completion, rollout.row)  # type: ignore[attr-defined]
