"""Shows the live table on a terminal: step and time left, numbers with their course so far, the last completion."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.progress import duration, visible

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a sparkline, in characters
SHOWN = 400  # characters of the completion
# (metric, label, digits)
NUMBERS = (
    ("reward", "reward", 3),
    ("eval_accuracy", "held-out accuracy", 3),
    ("completions/mean_length", "completion length", 0),
    ("entropy", "entropy, nats", 3),
    ("groups_without_signal", "groups without a signal", 2),
    ("grad_norm", "gradient norm", 3),
    ("step_time", "seconds a step", 1),
)


class LiveTable(TrainerCallback):
    """Rank 0, where standard error is a terminal; `rlattn.run.callbacks.Progress` elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.completion: Callable[[], str] = str  # the last one; set once the trainer exists
        self.values: dict[str, list[float]] = {}
        self.start, self.began = 0, time.monotonic()
        self.live = Live(console=self.console, refresh_per_second=4)  # another callback may log before it starts

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start, self.began = state.global_step, time.monotonic()
        self.live.start()
        self.live.update(self.table(state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, value in kwargs["logs"].items():
            if isinstance(value, int | float):
                self.values.setdefault(name, []).append(float(value))
        self.live.update(self.table(state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.live.update(self.table(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.live.stop()

    def table(self, state: TrainerState) -> Group:
        done, total = state.global_step, max(1, state.max_steps)
        since = done - self.start
        left = (time.monotonic() - self.began) / since * (total - done) if since else 0.0
        head = Table.grid(padding=(0, 1))
        time_left = f"{duration(left)} left" if since and done < total else ""
        head.add_row(f"train {done}/{total}", ProgressBar(total=total, completed=done, width=WIDTH), time_left)
        numbers = Table.grid(padding=(0, 2))
        for name, label, digits in NUMBERS:
            if found := self.values.get(name):
                numbers.add_row(label, f"{found[-1]:.{digits}f}", sparkline(found))
        return Group(head, numbers, Text(visible(self.completion()[:SHOWN]), style="dim"))


def sparkline(values: list[float], width: int = WIDTH) -> str:
    """The course of the values, oldest first; each character is the mean of a stretch. What is not finite is a gap."""
    stretch = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for i in range(0, len(values), stretch) if (part := values[i : i + stretch])]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((m - low) * scale)] if abs(m) < float("inf") else " " for m in means)
