"""Starts DeepSpeed's process group where transformers alone would not start one."""

import os
import socket
from pathlib import Path

import torch
from accelerate import PartialState

from rlattn.rank import say


def stale_locks() -> list[Path]:
    """Locks of torch's extension builder that are there now: one that a killed process left is waited for for ever."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return sorted(Path(folder).glob("**/deepspeed_*/lock"))


def start_deepspeed() -> dict[str, bool]:
    """Makes DeepSpeed's process group for this process; what GRPOConfig's `accelerator_config` must then say.

    A single process without a launcher becomes rank 0 of 1. On a CPU accelerate would start a gloo group that DeepSpeed
    does not know, so that it sees one rank: the state is configured here instead. On a GPU transformers does it all.
    """
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if torch.cuda.is_available():
        return {}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    for lock in stale_locks():
        say(f"DeepSpeed waits for {lock}: another process compiles. If none does, it was killed: remove that file.")
    PartialState(backend="gloo")
    return {"use_configured_state": True}
