"""Accuracy: 1 where the task's verifier accepts the final answer, else 0. Cost: the verifier's."""

from dataclasses import dataclass

from rlattn.formats.thought import with_opened_thought
from rlattn.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    judges_answer = True

    def score(self, rollout: Rollout) -> float:
        completion = with_opened_thought(rollout.completion, rollout.prompt_text)
        return float(rollout.task.verify(completion, rollout.row))
