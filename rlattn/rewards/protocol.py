"""What rlattn asks of a reward beyond its score, and the guarded call of it."""

import math
from typing import Any

from rlattn.errors import describe
from rlattn.types import Reward, Rollout

LARGEST = 1e12  # its square still fits float32


def lags_of(reward: Reward) -> set[int]:
    """The lagged policies that a reward asks for, by how often they are refreshed; 0: the policy of step 0."""
    lag: int = getattr(reward, "lag", 0) or 0
    return ({lag} if lag else set()) | ({0} if getattr(reward, "first_policy", False) else set())


def score_safely(reward: Reward, rollout: Rollout) -> tuple[float | None, str]:
    """The score, and what went wrong where it is not a finite number. A reward must not be able to end a run."""
    try:
        return checked_score(reward.score(rollout))
    except KeyboardInterrupt:
        raise  # the user's Ctrl-C
    except BaseException as error:
        return None, describe(error)


def checked_score(value: Any) -> tuple[float | None, str]:
    """What a reward returned, as a number or None (neutral), and what is wrong with it."""
    if value is None:
        return None, ""
    try:
        number = float(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of a user's own __float__
        return None, describe(error)
    if not math.isfinite(number):
        return None, f"returned {number}"
    return (number, "") if abs(number) <= LARGEST else (None, f"returned {number:g}, too large for float32 statistics")
