"""A task's own methods, which must not be able to end a run, as its rewards must not."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from rlattn.errors import describe

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class Safe(Generic[Result]):
    """A method of a task. Where it raises, or `read` refuses what it gives, the result is None and counts for nothing;
    such calls are counted, and the first cause is told.

    Attributes: `failed`, how often it did; `problem`, the first cause.
    """

    def __init__(self, name: str, method: Callable[..., Any], read: Callable[[Any], Result]):
        self.name, self.method, self.read = name, method, read
        self.failed, self.problem = 0, ""

    def __call__(self, *given: Any) -> Result | None:
        try:
            return self.read(self.method(*given))
        except KeyboardInterrupt:
            raise  # the user's Ctrl-C
        except BaseException as error:
            if not self.failed:
                self.problem = describe(error)
                on = f", on {given[0][:200]!r}" if isinstance(given[0], str) else ""
                logger.warning("the task's %s() is left out where it fails: %s%s", self.name, self.problem, on)
            self.failed += 1
            return None


def safe_verify(task: Any) -> Safe[float]:
    """(completion, row) -> the verifier's score."""
    return Safe("verify", task.verify, _finite)


def shares_of(task: Any) -> frozenset[str]:
    """The metrics that a task says are shares."""
    return frozenset(getattr(task, "shares", ()))


def safe_metrics(metrics: Callable[[str, Any], Any], shares: frozenset[str] = frozenset()) -> Safe[dict[str, float]]:
    """(completion, row) -> a task's own numbers; those in `shares` lie in 0 to 1."""
    return Safe("metrics", metrics, partial(_numbers, shares))


def metrics_of(task: Any) -> Safe[dict[str, float]]:
    """The same of a task that need not have any."""
    return safe_metrics(getattr(task, "metrics", lambda completion, row: {}), shares_of(task))


def safe_text(task: Any, name: str) -> Safe[str]:
    """`gold` or `trace`, with their arguments."""
    return Safe(name, getattr(task, name), str)


def _finite(score: Any) -> float:
    number = float(score)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}")
    return number


def _numbers(shares: frozenset[str], found: Any) -> dict[str, float]:
    numbers = {str(name): float(value) for name, value in found.items()}
    for name in shares & numbers.keys():
        if numbers[name] < 0 or numbers[name] > 1:  # NaN: undefined for this completion
            raise ValueError(f"{name} is {numbers[name]}, and a share lies in 0 to 1")
    return numbers
