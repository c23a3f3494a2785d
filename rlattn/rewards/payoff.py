"""Payoff: what the task's own game pays for a completion, honest or not. For tasks with `payoff(completion, row)`.

In a self-monitoring response (`rlattn/formats/monitored_response.py`) it speaks for thought and output only: paid for
what they led to, the critique and the label would drift, and with them the monitor that the policy is. Cost: a few
decodes a rollout.
"""

from dataclasses import dataclass

from rlattn.formats.monitored_response import outside_monitor
from rlattn.types import RewardBatch, Rollout


@dataclass(frozen=True, kw_only=True)
class Payoff:
    needs_of_task = ("payoff",)

    def prepare(self, batch: RewardBatch) -> list[list[bool] | None]:
        return [outside_monitor(rollout, batch.decode) for rollout in batch.rollouts]

    def score(self, rollout: Rollout) -> float:
        return rollout.task.payoff(rollout.completion, rollout.row)  # type: ignore[attr-defined]

    def tokens(self, rollout: Rollout) -> list[bool] | None:
        return rollout.note
