"""Starts the process group where transformers alone would start none, or one that never comes together."""

import os
import socket
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed import PrefixStore, Store, TCPStore

from rlattn.rank import is_main, restarts, say


@cache  # rank 0 keeps it open
def renew_store() -> Store | None:
    """A store of their own for ranks that torchrun has started anew, before they form the process group.

    torchrun keeps one store for all its restarts, and torch looks there for the other ranks' addresses under names that
    do not change: a new rank would find those of dead ones, and fail or wait. So rank 0 opens a store at a free port of
    MASTER_ADDR, and tells the others through torchrun's. DeepSpeed names its shared memory after the port, too.
    """
    if not restarts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    address = os.environ["MASTER_ADDR"]
    store = TCPStore(address, int(os.environ["MASTER_PORT"]))
    words = PrefixStore(f"rlattn-store-{restarts()}", store)
    if is_main():
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        words.set("port", str(store.port))
    os.environ |= {"MASTER_PORT": words.get("port").decode(), "TORCHELASTIC_USE_AGENT_STORE": str(False)}
    return store


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
