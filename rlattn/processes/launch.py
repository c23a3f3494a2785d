"""`rlattn train --ranks N`: starts and watches the ranks of one machine. Several machines: launch/torchrun.sh.

torchrun would do, but it ends with exit code 1 whatever its ranks end with, and hands Ctrl-C to ranks that should save.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rlattn.errors import UserError
from rlattn.rank import LAUNCHER, world_size

# What the ranks are told when this process gets a signal: both make them save and stop (rlattn.processes.signals).
PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGUSR1}  # exit codes of ranks that were told to
MISTAKE = 2  # exit code of a UserError, which has been said
PATIENCE = 15.0  # seconds that the others get once a rank has failed, to tell the cause, write the report and end


def ranks_to_start(ranks: int | None) -> int:
    """How many ranks this process shall start; 0 where it trains itself, alone or as one of a launcher's ranks.

    Raises:
        UserError: a launcher has started this process among another number of ranks.
    """
    if ranks is None:
        return 0
    if "WORLD_SIZE" in os.environ:
        if world_size() != ranks:
            raise UserError(
                "--ranks", f"{ranks}, but a launcher such as torchrun has started {world_size()} (WORLD_SIZE).",
                "Under a launcher leave --ranks out; it starts the ranks of one machine by itself.",
            )  # fmt: skip
        return 0
    return ranks if ranks > 1 else 0


def strategy_of_accelerate() -> list[str]:
    """What the configuration of `accelerate launch` says of weights and states, as overrides of the recipe.

    So the run folder records it, and every check sees it. Raises UserError for what could not be taken over.
    """
    environment = os.environ
    file = environment.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)  # else accelerate reads it as well, from here
    if file:
        return ["trainer.fsdp=null", f"trainer.deepspeed={file}"]
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in environment:
        raise UserError(
            "accelerate", "its configuration describes DeepSpeed itself.",
            "Name a deepspeed_config_file there, as launch/accelerate/zero3.yaml does.",
        )  # fmt: skip
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        if environment.get("FSDP_VERSION") != "2":
            raise UserError("accelerate", "its configuration asks for FSDP 1.", "Set fsdp_version: 2.")
        return ["trainer.deepspeed=null", "trainer.fsdp=true"]
    return []


def launch(arguments: Sequence[str], *, ranks: int, grace_seconds: float, on_gpus: bool) -> int:
    """Runs `rlattn train ARGUMENTS` on as many local ranks. Main thread only.

    SIGTERM, SIGUSR1, SIGHUP and Ctrl-C reach all ranks, which save and stop; Ctrl-C again ends them at once.

    Args:
        grace_seconds: what ranks get to stop once one has stopped.
        on_gpus: a rank takes a GPU of its own.

    Returns:
        The exit code of the rank that failed or stopped first; 0 where all ran to their end.
    """
    import torch

    gpus = torch.cuda.device_count()
    if on_gpus and 0 < gpus < ranks:
        raise UserError("--ranks", f"{ranks}, but this machine shows {gpus} GPU{'s' * (gpus > 1)}.", "One rank a GPU.")
    # As torchrun does: the store lives here, where its port is known to be free, and the ranks are its clients.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: str(os.getpid()),
    }
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    heeded = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]  # nohup's is not
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the ranks inherit it: a terminal signals them too
    command = [sys.executable, "-m", "rlattn.cli", "train", *arguments]
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own))
        for number in heeded:
            signal.signal(number, note)
        return watch(processes, received, grace_seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def watch(processes: list[subprocess.Popen], received: list[int], grace_seconds: float) -> int:
    """Until all have ended, or one has failed and the time of the others is over. Returns the first one's exit code."""
    passed_on, code, deadline = 0, 0, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for number in received[passed_on:]:
            if received.count(signal.SIGINT) > 1:
                _say("ended by Ctrl-C; the same command goes on from the last checkpoint.")
                return 128 + signal.SIGINT
            if number == signal.SIGINT:
                _say("all ranks stop after the step in progress, with a checkpoint; Ctrl-C again ends them at once.")
            for process in processes:
                process.send_signal(PASSED_ON[signal.Signals(number)])
            passed_on += 1
        if not code and (code := _first_code(processes)):
            said = code == MISTAKE and processes[0].poll() is not None  # by rank 0, for all
            patience = grace_seconds if code in STOPPED else 0 if said else PATIENCE
            deadline = time.monotonic() + patience
        time.sleep(0.1)
    return code or _first_code(processes)


def _first_code(processes: list[subprocess.Popen]) -> int:
    """The exit code of a rank that has not ended well, as a shell gives it; 0 where there is none so far."""
    for rank, process in enumerate(processes):
        if process.poll():
            code = process.returncode if process.returncode > 0 else 128 - process.returncode
            if code not in STOPPED | {MISTAKE}:
                _say(f"rank {rank} failed first, with exit code {code}; what it said stands above.")
            return code
    return 0


def _say(text: str) -> None:
    print(f"rlattn: {text}", file=sys.stderr, flush=True)
