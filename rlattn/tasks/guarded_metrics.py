"""A task's metrics, which must not be able to end a run, as its rewards must not."""

import logging
from collections.abc import Callable
from typing import Any

from rlattn.errors import describe

logger = logging.getLogger(__name__)


class SafeMetrics:
    """`metrics(completion, row)` of a task. Where it raises or gives what is no mapping to numbers, that completion has
    none; the first cause is told.
    """

    def __init__(self, metrics: Callable[[str, Any], Any]):
        self.metrics = metrics
        self.told = False

    def __call__(self, completion: str, row: Any) -> dict[str, float]:
        try:
            return {str(name): float(value) for name, value in self.metrics(completion, row).items()}
        except KeyboardInterrupt:
            raise  # the user's Ctrl-C
        except BaseException as error:
            if not self.told:
                cause = describe(error)
                logger.warning("the task's metrics are left out where they fail: %s, on %r", cause, completion[:200])
            self.told = True
            return {}
