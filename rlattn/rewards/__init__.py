"""Rewards: one number a rollout. One file a reward, one line here.

A reward is a frozen dataclass; its fields are its options in a recipe (`rewards: {format: {weight: 0.2}}`).
"""

import math
from typing import Protocol, runtime_checkable

from rlattn.errors import describe
from rlattn.rewards.accuracy import Accuracy
from rlattn.rewards.format import Format
from rlattn.types import Rollout


@runtime_checkable
class Reward(Protocol):
    """What rlattn needs of a reward. A reward of your own: a class with this method, named by `python:` in a recipe."""

    def score(self, rollout: Rollout) -> float | None:
        """The reward of one rollout. `None` is neutral: it neither pays nor costs, unlike 0."""
        ...


REWARDS: dict[str, type] = {"accuracy": Accuracy, "format": Format}


def score_safely(reward: Reward, rollout: Rollout) -> tuple[float | None, str]:
    """The score, and what went wrong where it is not a finite number. A reward must not be able to end a run."""
    try:
        value = reward.score(rollout)
        if value is None:
            return None, ""
        number = float(value)
    except KeyboardInterrupt:
        raise  # the user's Ctrl-C
    except BaseException as error:
        return None, describe(error)
    return (number, "") if math.isfinite(number) else (None, f"returned {number}")
