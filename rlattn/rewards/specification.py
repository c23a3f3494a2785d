"""The terminal reward of a dialogue: the share of attributes that the written specification has right.

`accuracy` pays for a specification that is right throughout, which a policy that guesses half of it seldom meets; this
share gives every rollout something to learn from. Cost: parsing text. Logged: `rewards/specification/mean`.
"""

from dataclasses import dataclass
from typing import Any

from rlattn.types import Rollout


@dataclass(frozen=True, kw_only=True)
class SpecificationShare:
    """In [0, 1]; 0 where no specification ends the dialogue."""

    judges_answer = True
    needs = ("environment",)
    needs_of_task = ("metrics",)

    def score(self, rollout: Rollout) -> float:
        task: Any = rollout.task
        return task.metrics(rollout.completion, rollout.row)["attributes_right"]
