"""Ends a run after the step in progress on SIGTERM, SIGUSR1 or a closed terminal: all ranks save and stop alike;
so does Ctrl-C where there is one process.

The ranks agree at the end of every step (one number a rank), so that none saves or stops alone. A signal is seen by a
thread of its own: the main one may sit in a collective call that never returns, where Python runs no handlers.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.rank import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
CTRL_C = signal.SIGINT  # of many ranks, launchers make a SIGTERM of it


class StopSignals(TrainerCallback):
    """From `listen` to `leave` the process no longer ends at these signals; `stopped_by` is the one that ended the run.

    One that is ignored already stays so: SIGHUP under nohup and in the ranks of `--ranks`, whose parent passes it on.
    Where the ranks do not come to the end of a step within `grace_seconds`, the process exits by itself: the run then
    goes on from the last checkpoint; after Ctrl-C it waits, and Ctrl-C again ends it. Exit code: 128 + the signal's
    number, 143 for SIGTERM.
    """

    def __init__(self, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.stopped_by: signal.Signals | None = None
        self._received = 0
        self._agreed = threading.Event()

    def listen(self) -> None:
        """Main thread only."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._former_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._former: dict[int, Any] = {}
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._heed(number, lambda *_: None)
        threading.Thread(target=self._wait_for_signal, daemon=True).start()

    def _heed(self, number: int, handler: Callable[..., Any]) -> None:
        self._former[number] = signal.signal(number, handler)

    def leave(self) -> None:
        """The handlers are again those from before `listen`."""
        signal.set_wakeup_fd(self._former_fd)
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by code that is not Python
        self._agreed.set()
        self._writer.close()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        new = CTRL_C not in self._former and world_size() == 1 and signal.getsignal(CTRL_C) != signal.SIG_IGN
        if new:  # before the first step there is nothing to save, and it just ends
            self._heed(CTRL_C, lambda *_: signal.signal(CTRL_C, signal.default_int_handler))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        received = torch.tensor(self._received, device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        if not received.item():
            return
        self._agreed.set()
        if state.global_step < state.max_steps:  # else there is nothing left to go on with
            self.stopped_by = signal.Signals(int(received.item()))
            control.should_save = control.should_training_stop = True

    def _wait_for_signal(self) -> None:
        number = 0
        while number not in SIGNALS:
            received = self._reader.recv(1)
            if not received:  # `leave`
                return self._reader.close()
            number = received[0]
            if number in self._former and not self._received:
                self._received = number
                if number == CTRL_C:
                    text = "stops after the step in progress, with a checkpoint; Ctrl-C again ends it at once."
                    print(f"\nrlattn: {text}", file=sys.stderr, flush=True)
        if not self._agreed.wait(self.grace_seconds):
            print(
                f"rlattn: {signal.Signals(number).name}, but the step did not end on all ranks within "
                f"resume.grace_seconds = {self.grace_seconds:g}; the same command goes on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(128 + number)
