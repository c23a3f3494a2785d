"""Rewards: one number a rollout. One file a reward, one line here.

A reward is a dataclass; its fields are its options in a recipe (`rewards: {format: {weight: 0.2}}`). Besides `score` it
may have:

- `needs`: a tuple of `group` (statistics over a group, through `prepare`), `policy` (second rollouts), `environment`
  (dialogues), `images` (`rollout.images`); said by `rlattn score`, which has none of them.
- `needs_of_task`: names of methods that the task must have, beyond the protocol's.
- `prepare(batch: RewardBatch) -> list`: collective, once a generation batch on every rank, before `score`; one note a
  rollout, which `score` finds as `rollout.note`.
- `tokens(rollout) -> list[bool] | None`: the completion tokens it speaks for, all where None.
- `parts(rollout) -> list[tuple[float | None, list[bool]]]`: values for stretches of the completion, such as turns, at
  most `part_count` of them; each is compared with the same part of its group's other rollouts and adds
  `part_weight` times that to the advantage of its tokens.
- `lag`: it asks for second rollouts of a policy refreshed every `lag` steps; `first_policy`: of the one of step 0.
- `multiplier`: a factor of its weight that moves during the run.
- `state_dict() -> dict` and `load_state_dict(state)`: plain JSON data that a checkpoint keeps, the same on every rank.
- `bind(trainer)`: called once, before training.
"""

import math
from typing import Protocol, runtime_checkable

from rlattn.errors import describe
from rlattn.rewards.accuracy import Accuracy
from rlattn.rewards.adaptive_effort import AdaptiveEffort
from rlattn.rewards.brevity import Brevity
from rlattn.rewards.format import Format
from rlattn.rewards.information_gain import InformationGain
from rlattn.rewards.payoff import Payoff
from rlattn.rewards.self_monitor import SelfMonitor
from rlattn.rewards.specification import SpecificationShare
from rlattn.types import Rollout

LARGEST = 1e12  # its square still fits float32


@runtime_checkable
class Reward(Protocol):
    """What rlattn needs of a reward. A reward of your own: a class with this method, named by `python:` in a recipe."""

    def score(self, rollout: Rollout) -> float | None:
        """The reward of one rollout. `None` is neutral: it neither pays nor costs, unlike 0. Pure."""
        ...


REWARDS: dict[str, type] = {
    "accuracy": Accuracy,
    "adaptive_effort": AdaptiveEffort,
    "brevity": Brevity,
    "format": Format,
    "information_gain": InformationGain,
    "payoff": Payoff,
    "self_monitor": SelfMonitor,
    "specification": SpecificationShare,
}


def lags_of(reward: Reward) -> set[int]:
    """The lagged policies that a reward asks for, by how often they are refreshed; 0: the policy of step 0."""
    lag: int = getattr(reward, "lag", 0) or 0
    return ({lag} if lag else set()) | ({0} if getattr(reward, "first_policy", False) else set())


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
    if not math.isfinite(number):
        return None, f"returned {number}"
    return (number, "") if abs(number) <= LARGEST else (None, f"returned {number:g}, too large for float32 statistics")
