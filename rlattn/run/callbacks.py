"""Callbacks of a run, at every step: held-out evaluation, metrics.jsonl, alarms, progress."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.grpo.held_out import Evaluation, evaluate
from rlattn.grpo.port import Port
from rlattn.progress import progress
from rlattn.rank import say
from rlattn.report.alarms import enough_for_alarms, find_alarms
from rlattn.run_folder.folder import ALARMS
from rlattn.run_folder.jsonl import append_row, named_as_in_file, read_rows
from rlattn.types import Example, Task


class HeldOutEvaluation(TrainerCallback):
    """Greedy accuracy before training, every `every` steps and after the last; it becomes part of that step's log."""

    def __init__(self, task: Task, examples: Sequence[Example], *, every: int | None, samples: int, run_dir: Path):
        self.task, self.examples, self.every, self.samples = task, examples, every, samples
        self.samples_file = run_dir / "samples.jsonl"
        self.port: Port | None = None  # set once the trainer exists; TRL wants callbacks before
        self.latest: Evaluation | None = None
        self.latest_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            assert self.port is not None
            self.port.log_line(self._evaluate(state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if last or (self.every and state.global_step % self.every == 0):
            assert self.port is not None
            for key, value in self._evaluate(state).items():
                self.port.log_to_step(key, value)
            control.should_log = True
        if last:
            control.should_save = args.save_strategy != "no"  # so that a longer run can go on from the end of this one

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.latest is None and state.global_step >= state.max_steps:  # resumed after the last step
            assert self.port is not None
            self.latest, self.latest_step = evaluate(self.port, self.task, self.examples)[0], state.global_step

    def _evaluate(self, state: TrainerState) -> dict[str, float]:
        began = time.monotonic()
        assert self.port is not None
        self.latest_step = state.global_step
        self.latest, samples = evaluate(self.port, self.task, self.examples, samples=self.samples)
        if state.is_world_process_zero:
            for sample in samples:
                append_row(self.samples_file, {"step": state.global_step, **sample})
        return {**self.latest.metrics(), "eval_seconds": time.monotonic() - began}


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one object a log line, which may speak for several steps; `eval/…` where it was evaluated."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / "metrics.jsonl"
        self.began = time.monotonic()
        self.seconds: list[float] = []  # of the steps since the last line

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if not state.is_world_process_zero or "train_runtime" in logs:  # transformers' closing totals are no step
            return
        row: dict[str, Any] = {"step": state.global_step, **named_as_in_file(logs)}
        if self.seconds:
            row["time/step"] = fmean(self.seconds)
            self.seconds.clear()
        append_row(self.path, row)


class Alarms(TrainerCallback):
    """Says once when a run shows a sign of collapse, with what to do about it. Rank 0."""

    def __init__(self, run_dir: Path):
        self.file = run_dir / ALARMS
        self.rows = list(read_rows(run_dir / "metrics.jsonl"))  # of an earlier session
        self.told = {row.get("name") for row in read_rows(self.file)}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.rows = enough_for_alarms([*self.rows, {**named_as_in_file(kwargs["logs"]), "step": state.global_step}])
        for alarm in find_alarms(self.rows):
            if alarm.name not in self.told:
                self.told.add(alarm.name)
                append_row(self.file, {"step": state.global_step, **asdict(alarm)})
                say(f"warning, step {state.global_step}: {alarm}")


class Progress(TrainerCallback):
    """Steps, reward, held-out accuracy and the time left, on rank 0."""

    def __init__(self, evaluation: HeldOutEvaluation):
        self.evaluation = evaluation
        self.reward = "reward -"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.context = progress("train", state.max_steps, start=state.global_step)
        self.update = self.context.__enter__()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if logs.get("reward") is not None and state.global_step:
            self.reward = f"reward {logs['reward']:.3f}"
            self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not control.should_log:
            self._show(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.context.__exit__(None, None, None)

    def _show(self, state: TrainerState) -> None:
        latest = self.evaluation.latest
        when = f"after step {self.evaluation.latest_step}" if self.evaluation.latest_step else "before training"
        share = latest.accuracy if latest else None
        accuracy = "" if share is None else f", held-out accuracy {100 * share:.1f} % {when}"
        self.update(state.global_step, self.reward + accuracy)
