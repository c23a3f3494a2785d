"""Runs every part in a process of its own, so that one failure is one row; prints a table, writes gpu_smoke.json.

Exit code 0: nothing failed (a missed target or a missing package is said, not failed). 1: something failed. 2: no GPU.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from rlattn.bench.gpu.shared import Scale, Skipped
from rlattn.formats.strict_json import to_json

PARTS = {  # name -> its function, what it shows, the most seconds it may take
    "capture": ("attention.capture_eager", "bf16 capture against eager maps", 300),
    "flash": ("attention.capture_flash", "flash-attention capture", 300),
    "flash_train": ("training.flash", "credit with flash-attention", 300),
    "flex": ("attention.capture_flex", "flex-attention capture", 600),
    "triton": ("attention.triton_accuracy", "Triton kernels against torch", 600),
    "zero3": ("training.zero3", "credit under ZeRO-3, one rank", 600),
    "fsdp2": ("training.fsdp2", "credit under FSDP2, one rank", 600),
    "triton_speed": ("attention.triton_speed", "Triton kernels' speed, 8 x 8192 tokens", 300),
    "long_step": ("training.long_step", "the metrics' share of what follows generation, 8 x 8192 tokens", 600),
    "bench": ("attention.bench", "rlattn bench attention", 600),
    "train": ("training.train", "GRPO steps with and without credit", 600),
    "written_step": ("training.written_step", "the metrics' share of a whole step, 8 x 8192 tokens", 1200),
}
DISTRIBUTED = ("zero3", "fsdp2")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STARTING = threading.Lock()  # held while a part starts: a signal must end all that have started
TIMED = ("triton_speed", "long_step", "train", "bench", "written_step")  # one at a time; the others first, side by side


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlattn.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all unless given: {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that the parts run at all")
    parser.add_argument("--out", type=Path, default=Path("gpu_smoke.json"))
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of one part, in its own process
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if given.out.is_dir() or not os.access(given.out.parent, os.W_OK):
        parser.error(f"--out: {given.out} cannot be written; name a file in a folder that can")
    scale = Scale(device=given.device, small=given.small)
    if given.result:
        given.result.write_text(to_json(_result(given.parts[0], scale)), encoding="utf-8")
        return 0
    machine = _machine(given.device)
    if machine is None:
        print("gpu_smoke: no GPU that torch can use; --device cpu --small runs what a CPU can.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _stopped)
    names = [*dict.fromkeys(given.parts or PARTS)]
    for row in _rows(names, scale):  # written as they end: a run that is cut short keeps what it found
        rows = sorted([*rows, row], key=lambda found: names.index(found["part"]))
        given.out.write_text(to_json({"machine": machine, **asdict(scale), "parts": rows}, indent=1) + "\n", "utf-8")
    _print(rows, machine)
    print(f"Every figure: {given.out}")
    return int(any(row["status"] == "failed" for row in rows))


def _rows(names: list[str], scale: Scale) -> Iterator[dict[str, Any]]:
    def row(name: str) -> dict[str, Any]:
        print(f"{name}: {PARTS[name][1]} ...", flush=True)
        found = _run(name, scale)
        print(f"{name}: {found['status']} after {found['seconds']} s. {found['detail']}", flush=True)
        return {"part": name, "what": PARTS[name][1], **found}

    for together, workers in (
        ([n for n in names if n not in TIMED], len(PARTS)),
        ([n for n in names if n in TIMED], 1),
    ):
        with ThreadPoolExecutor(workers if scale.device == "cuda" else 1) as threads:
            for done in as_completed([threads.submit(row, name) for name in together]):
                yield done.result()


def _run(name: str, scale: Scale) -> dict[str, Any]:
    """The part's result, whatever becomes of its process."""
    patience = PARTS[name][2]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"] if name in DISTRIBUTED else []
        command = [sys.executable, *launcher, "-m", "rlattn.bench.gpu", name, f"--device={scale.device}"]
        command += ["--small"] * scale.small + [f"--result={result}"]
        environment = dict(os.environ)
        if scale.device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
            if name == "triton":
                environment["TRITON_INTERPRET"] = "1"
        began = time.monotonic()
        with STARTING:
            started = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C comes here alone
            )  # fmt: skip
        with started as part:
            try:
                output, _ = part.communicate(timeout=patience)
                found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
                found = found or {"status": "failed", "detail": f"exit code {part.returncode}: {_last_line(output)}"}
            except subprocess.TimeoutExpired:
                _end(part.pid)
                output, _ = part.communicate()
                found = {"status": "failed", "detail": f"still running after {patience} s"}
    found["seconds"] = round(time.monotonic() - began, 1)
    return found if found["status"] in ("ok", "skipped") else {**found, "output": output[-8000:]}


def _end(pid: int) -> None:
    """A part and what it has started: torchrun gives its workers a session of their own."""
    with suppress(psutil.NoSuchProcess):
        part = psutil.Process(pid)
        for one in (part, *part.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _stopped(number: int, _: object) -> None:
    for heeded in STOPPING:  # a second one would wait for what the first one holds
        signal.signal(heeded, signal.SIG_IGN)
    STARTING.acquire()  # for good: nothing starts any more
    for part in psutil.Process().children():
        _end(part.pid)
    print("\nstopped; the file holds the parts that have ended", file=sys.stderr, flush=True)
    os._exit(128 + number)  # the threads wait for parts that are gone


def _result(name: str, scale: Scale) -> dict[str, Any]:
    module, function = PARTS[name][0].split(".")
    try:
        outcome = getattr(import_module(f"rlattn.bench.gpu.{module}"), function)(scale)
    except Skipped as reason:
        return {"status": "skipped", "detail": str(reason)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"status": "failed", "detail": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {"status": "ok" if outcome.met else "missed", "detail": outcome.detail, "figures": outcome.figures}


def _machine(device: str) -> dict[str, str] | None:
    """None where the device is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": card, "torch": torch.__version__, "python": platform.python_version()}


def _print(rows: list[dict[str, Any]], machine: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="GPU smoke", caption=", ".join(f"{name} {value}" for name, value in machine.items()))
    for column in ("part", "status", "seconds", "detail"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["part"], row["status"], str(row["seconds"]), row["detail"])
    Console().print(table)


def _last_line(output: str) -> str:
    return next((line.strip()[:300] for line in reversed(output.splitlines()) if line.strip()), "no output")


if __name__ == "__main__":
    sys.exit(main())
