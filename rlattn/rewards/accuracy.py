"""Accuracy: 1 where the task's verifier accepts the final answer, else 0. Cost: the verifier's."""

from dataclasses import dataclass

from rlattn.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    judges_answer = True

    def score(self, rollout: Rollout) -> float:
        return float(rollout.task.verify(rollout.completion, rollout.row))
