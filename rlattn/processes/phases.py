"""Clocks what a rank does: the seconds of every phase of a step, and the phase it is in now."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

TIMED = ("generation", "reward", "waiting", "credit", "training", "evaluation", "checkpoint")


class Phases:
    """A phase inside another stops the other's clock: the seconds of a step's phases add up to the step."""

    def __init__(self) -> None:
        self.now, self.since, self.entered = "setup", time.monotonic(), 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.failed = ""  # the phase that an exception has left, until the next one begins
        self.trained = False  # whether a step has begun

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self.failed = self.now, ""
        self.enter(name)
        try:
            yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self.enter(outer)

    def enter(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[self.now] += now - self.since
        self.now, self.since, self.entered = name, now, self.entered + 1

    def take(self) -> dict[str, float]:
        """The seconds of every timed phase since the last call."""
        self.enter(self.now)
        taken, self.seconds = self.seconds, defaultdict(float)
        return {name: taken[name] for name in TIMED if name in taken}


class PhaseTimes(TrainerCallback):
    """Logs `time/<phase>`: seconds of a step, the mean over the ranks; `time/<phase>_slowest` where there are several.

    Work that a GPU still has queued counts to the phase that waits for it, a checkpoint to the step after it. One small
    gather a step.
    """

    def __init__(self, phases: Phases, log: Callable[[str, float], None]):
        self.phases, self.log = phases, log

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.phases.trained = True
        self.phases.enter("training")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        everyone: list[dict[str, float]] = gather_object([self.phases.take()])
        for name in TIMED:
            seconds = [of_rank.get(name, 0.0) for of_rank in everyone]
            if any(seconds):
                self.log(f"time/{name}", fmean(seconds))
                if len(seconds) > 1:
                    self.log(f"time/{name}_slowest", max(seconds))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.phases.enter("end")
