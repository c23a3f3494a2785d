"""Ends a run in which a rank failed or hangs. A thread on every rank, and a word in the launcher's store.

Where a rank ends with an error, the others learn of it within a second, tell it as their last line and exit; so they
do where its process is killed on their machine, and where torchrun starts another machine's ranks anew. Where a rank
stays in one phase for `resume.stall_seconds`, all exit, and the rank and its phase are named. Where a rank is not heard
of for five minutes, as when its machine lost power, the others exit. Where `rlattn train --ranks` is killed, its ranks
save and stop, as at SIGTERM. The store is the launcher's (`MASTER_ADDR`, `MASTER_PORT`); a single process only watches
itself. Cost: a few small requests a second.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from torch.distributed import PrefixStore, Store, TCPStore

from rlattn.errors import UserError, describe
from rlattn.processes.phases import TIMED, Phases
from rlattn.rank import orphaned, rank, restarts, say, world_size

POLL_SECONDS = 1.0
PATIENCE = 5.0  # for a rank that meets the same error by itself, with a better message
CONNECT_TIME = timedelta(seconds=20)  # of one attempt
FAILURE, FINISHED = "failure", "finished"  # keys of the store
# A rank that is not heard of for so many polls of one's own is gone (seconds would count what Ctrl-Z stopped). Long, as
# some calls let no other thread run; loading and writing files can take even longer, so nobody is missed there.
SILENT_POLLS = 300
ABSENT_POLLS = 60  # between two words about ranks that have not come
AUDIBLE = {*TIMED} - {"checkpoint"}


class OtherRankFailed(RuntimeError):
    """What this rank met is an echo: another rank failed first, as the message says."""


class Watchdog:
    """`with Watchdog(…):` around training. An exception that leaves the block is told to the other ranks.

    Args:
        phases: what this rank is doing.
        stall_seconds: longest stay in one phase; a warning comes at half of it.
    """

    def __init__(self, phases: Phases, stall_seconds: float):
        self.phases, self.stall_seconds = phases, stall_seconds
        self.launcher = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")  # which renew_store changes
        self.store: Store | None = None
        self.place = _place()
        self.polls = 0
        self.heard: dict[int, tuple[bytes, int]] = {}  # of a rank: its last word, and polls since
        self.over = threading.Event()
        self.connected = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        own = first = ""
        if isinstance(error, Exception):
            self.connected.wait(PATIENCE)
            own = f"rank {rank()} failed in {self.phases.failed or self.phases.now}: {describe(error)}"
            first = self._tell(own)
        self.over.set()
        self.thread.join(PATIENCE)  # the interpreter must not end while it is in a call of the store's
        # what this rank met can be an echo of the first failure, such as a lost peer
        if first != own and not isinstance(error, UserError):
            print(f"rlattn (rank {rank()}): {first}", file=sys.stderr, flush=True)
            raise OtherRankFailed(first) from None
        self.phases.enter("end")
        with contextlib.suppress(RuntimeError):
            self._speak()  # nobody shall wait for the next word

    def wait_for_rank_0(self) -> None:
        """Until rank 0 comes here too. It writes the report alone, and a scheduler may end a job's other processes soon
        after the first has ended.
        """
        self.connected.wait(PATIENCE)
        store = self.store
        try:
            if store and rank() == 0:
                store.set(FINISHED, "yes")
            while store and rank() > 0 and self._silence(0) < SILENT_POLLS and not store.check([FINISHED]):
                time.sleep(POLL_SECONDS)
        except RuntimeError:
            return  # the launcher is gone

    def _watch(self) -> None:
        while world_size() > 1 and self.store is None and not self.over.is_set() and not orphaned():
            self.store = _store(*self.launcher)  # rank 0 may take its time before it offers one
            self.over.wait(0 if self.store else POLL_SECONDS)
        self.connected.set()
        warned, lost, last, polls = -1, False, -1, 0
        while not self.over.wait(POLL_SECONDS):
            if orphaned():
                say("\nrlattn: the process that started the ranks is gone: they save and stop.")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            entered, phase = self.phases.entered, self.phases.now
            polls, last = (polls + 1 if entered == last else 0), entered
            # in polls: a clock would count what Ctrl-Z or a scheduler stopped; loading may take its time
            stayed = polls * POLL_SECONDS if phase in TIMED else 0.0
            if lost and phase in TIMED:
                self._leave("the launcher or rank 0 is gone")
            try:
                if self.store and self.store.check([FAILURE]):
                    self._leave(self.store.get(FAILURE).decode())
                self._speak()
                if self.polls % ABSENT_POLLS == 0 and (absent := self._absent()):
                    ranks = ", ".join(map(str, absent[:8])) + (" …" if len(absent) > 8 else "")
                    waited = self.polls * POLL_SECONDS
                    say(f"rlattn: waiting for rank {ranks} of {world_size()}, not heard of in {waited:.0f} s.")
                if missing := self._missing():
                    self._leave(self._tell(missing))
                if stayed > self.stall_seconds:
                    self._leave(self._tell(f"no progress for {stayed:.0f} s: {self._stalled()}"))
                if stayed > self.stall_seconds / 2 and warned != entered and rank() == 0:
                    warned = entered
                    print(
                        f"rlattn: warning: no progress for {stayed:.0f} s: {self._stalled()}; the run ends at "
                        f"resume.stall_seconds = {self.stall_seconds:g}.",
                        file=sys.stderr,
                        flush=True,
                    )
            except RuntimeError:
                self.store, lost = None, True  # a killed launcher's store goes a moment before the launcher does

    def _speak(self) -> None:
        self.polls += 1
        if self.store:
            word = [self.phases.entered, self.phases.now, self.polls, socket.gethostname(), self.place, os.getpid()]
            self.store.set(f"rank-{rank()}", json.dumps(word))

    def _missing(self) -> str | None:
        """The rank that is gone or silent. Rank 0 looks after all, the others after rank 0: so requests stay few."""
        if self.store is None:
            return None
        others = range(1, world_size()) if rank() == 0 else [0]
        keys = [f"rank-{other}" for other in others]
        words = self.store.multi_get(keys) if self.store.check(keys) else [b""] * len(keys)  # until all have begun
        for other, word in zip(others, words, strict=True):
            last, silent = self.heard.get(other, (b"", 0))
            silent = silent + 1 if word == last else 0
            self.heard[other] = word, silent
            _, phase, _, host, place, process = json.loads(word) if word else (0, "end", 0, "", "", 0)
            if phase != "end" and place == self.place and not _runs(process):
                return f"rank {other} is gone: its process, {process} on {host}, has ended without a word, in {phase}"
            if silent >= SILENT_POLLS and phase in AUDIBLE:
                return (
                    f"rank {other} on {host} has not been heard of for {silent * POLL_SECONDS:.0f} s, in {phase}: its "
                    "machine is gone, or a call lets no other thread run there"
                )
        return None

    def _absent(self) -> list[int]:
        """The ranks that have not come yet, for rank 0 to tell."""
        if self.store is None or rank() > 0:
            return []
        return [other for other in range(1, world_size()) if not self.store.check([f"rank-{other}"])]

    def _silence(self, of_rank: int) -> int:
        return self.heard.get(of_rank, (b"", 0))[1]

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
            tuple(json.loads(self.store.get(key))[:2]) if self.store.check([key]) else (-1, "no phase yet")
            for key in keys
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


def _store(address: str | None, port: str | None) -> Store | None:
    if world_size() == 1 or not address or not port:
        return None
    try:
        store = TCPStore(address, int(port), timeout=CONNECT_TIME)
        for earlier in range(restarts()):  # on other machines ranks may wait for those that this start has replaced
            _words(store, earlier).compare_set(FAILURE, "", "torchrun starts the ranks of another machine anew")
    except (RuntimeError, ValueError):
        return None
    return _words(store, restarts())


def _words(store: Store, start: int) -> Store:
    """What the ranks of one start tell each other: torchrun's store outlives them."""
    return PrefixStore(f"rlattn-{start}", store)


def _place() -> str:
    """The same for processes that see each other's numbers."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.is_symlink() else ''}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        pass  # another user's
    except ProcessLookupError:
        return False
    return True
