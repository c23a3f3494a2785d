"""Glue: no rank waits for one that failed or hangs. A thread on every rank, and a word in the launcher's store.

Where a rank ends with an error, the others learn of it within a second, tell it as their last line and exit. Where a
rank stays in one phase for `resume.stall_seconds`, all exit, and the rank and its phase are named. Where
`rlattn train --ranks` is killed, its ranks save and stop, as at SIGTERM. The store is the launcher's (`MASTER_ADDR`,
`MASTER_PORT`); a single process only watches itself. Cost: a few small requests a second.
"""

import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

from torch.distributed import PrefixStore, Store, TCPStore

from rlattn.errors import UserError, describe
from rlattn.phases import TIMED, Phases
from rlattn.ranks import orphaned, rank, say, world_size

POLL_SECONDS = 1.0
PATIENCE = 5.0  # for a rank that meets the same error by itself, with a better message
CONNECT_TIME = timedelta(seconds=20)  # of one attempt
FAILURE = "failure"


class Watchdog:
    """`with Watchdog(…):` around training. An exception that leaves the block is told to the other ranks.

    Args:
        phases: what this rank is doing.
        stall_seconds: longest stay in one phase; a warning comes at half of it.
    """

    def __init__(self, phases: Phases, stall_seconds: float):
        self.phases, self.stall_seconds = phases, stall_seconds
        self.store: Store | None = None
        self.over = threading.Event()
        self.connected = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self.connected.wait(PATIENCE)
            own = f"rank {rank()} failed in {self.phases.now}: {describe(error)}"
            first = self._tell(own)
            self.over.set()
            if first != own and not isinstance(error, UserError):  # what it met is an echo of it, such as a lost peer
                print(f"rlattn (rank {rank()}): {first}", file=sys.stderr, flush=True)
                raise SystemExit(1) from None
        self.over.set()

    def _watch(self) -> None:
        while world_size() > 1 and self.store is None and not self.over.is_set() and not orphaned():
            self.store = _store()  # rank 0 may take its time before it offers one
            self.over.wait(0 if self.store else POLL_SECONDS)
        self.connected.set()
        warned, lost = -1, False
        while not self.over.wait(POLL_SECONDS):
            if orphaned():
                say("\nrlattn: the process that started the ranks is gone: they save and stop.")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            entered, phase = self.phases.entered, self.phases.now
            stayed = time.monotonic() - self.phases.since if phase in TIMED else 0.0  # loading may take its time
            if lost and phase in TIMED:
                self._leave("the launcher or rank 0 is gone")
            try:
                if self.store and self.store.check([FAILURE]):
                    self._leave(self.store.get(FAILURE).decode())
                if self.store:
                    self.store.set(f"rank-{rank()}", json.dumps([entered, phase]))
                if stayed > self.stall_seconds:
                    self._leave(self._tell(f"no progress for {stayed:.0f} s: {self._stalled()}"))
            except RuntimeError:
                self.store, lost = None, True  # a killed launcher's store goes a moment before the launcher does
            if stayed > self.stall_seconds / 2 and warned != entered and rank() == 0:
                warned = entered
                print(
                    f"rlattn: warning: no progress for {stayed:.0f} s: {self._stalled()}; the run ends at "
                    f"resume.stall_seconds = {self.stall_seconds:g}.",
                    file=sys.stderr,
                    flush=True,
                )

    def _tell(self, failure: str) -> str:
        """The first failure of all ranks, which may be this one."""
        if self.store is None:
            return failure
        try:
            return self.store.compare_set(FAILURE, "", failure).decode()
        except RuntimeError:
            return failure

    def _stalled(self) -> str:
        """Who is behind: every rank goes through the same phases, so whoever has entered fewest."""
        if self.store is None:
            return f"{self.phases.now} does not end" if world_size() == 1 else f"rank {rank()} is in {self.phases.now}"
        keys = [f"rank-{r}" for r in range(world_size())]
        known: list[tuple[int, str]] = [
            tuple(json.loads(self.store.get(key))) if self.store.check([key]) else (-1, "no phase yet") for key in keys
        ]
        behind = [r for r, (entered, _) in enumerate(known) if entered == min(known)[0]]
        waiting = "" if len(behind) == len(known) else "; the others wait for it"
        return f"rank {', '.join(map(str, behind))} is in {known[behind[0]][1]}{waiting}"

    def _leave(self, failure: str) -> None:
        """Ends this process from its thread: the main one may sit in a call that never returns."""
        if self.over.wait(PATIENCE if world_size() > 1 else 0):
            return
        print(
            f"rlattn (rank {rank()}): {failure}. The same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _store() -> Store | None:
    if world_size() == 1 or "MASTER_ADDR" not in os.environ:
        return None
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=CONNECT_TIME)
    except (RuntimeError, ValueError, KeyError):
        return None
    return PrefixStore(f"rlattn-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
