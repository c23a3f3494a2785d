"""`rlattn bench resume`: kills real runs with SIGKILL at random moments, goes on, and compares with the unbroken run.

Every setting (ranks, strategy, LoRA or all weights) trains once unbroken and once with its share of the kills, in small
generation windows with a checkpoint every second step, credit and a reward with a state of its own. A kill falls
into a phase (generation, reward, credit, training, checkpoint, or between them) at a random time after its start.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlattn.files import shipped_dir
from rlattn.formats.strict_json import to_json
from rlattn.grpo.port import Port
from rlattn.recipe.schema import TINY_POLICY
from rlattn.run_folder.jsonl import read_rows
from rlattn.types import RewardBatch, Rollout

STEPS = 12
MOMENT = "RLATTN_BENCH_KILL"  # rank, step, phase and milliseconds, in the environment of a session to be killed
PHASES = ("generation", "reward", "credit", "training", "checkpoint", "between")
UNTIMED = re.compile(r"time|seconds|runtime|per_second|total_flos|train_loss|num_tokens")
SESSION_SECONDS = 600
LATE = 10  # kills of a setting that may come after the end of the run


@dataclass(frozen=True)
class Setting:
    ranks: int
    zero: int
    """ZeRO stage; 0 for none."""
    lora: bool

    def __str__(self) -> str:
        strategy = f"ZeRO-{self.zero}" if self.zero else "DDP" if self.ranks > 1 else "plain"
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {strategy}, {'LoRA' if self.lora else 'all weights'}"


SETTINGS = tuple(Setting(r, z, lora) for r, z in ((1, 0), (2, 0), (2, 2), (2, 3)) for lora in (False, True))


class Mortal:
    """A reward whose values depend on all that it has seen, and that ends its process where MOMENT says."""

    total = 0

    def bind(self, trainer: Any) -> None:
        text = os.environ.get(MOMENT)
        if text and text.split()[0] == os.environ.get("RANK", "0"):
            threading.Thread(target=self._die, args=(trainer.port, *text.split()[1:]), daemon=True).start()

    def prepare(self, batch: RewardBatch) -> list[int]:
        self.total += sum(batch.gather([len(rollout.completion_ids) for rollout in batch.rollouts]))
        return [self.total] * len(batch.rollouts)

    def score(self, rollout: Rollout) -> float:
        return float((sum(rollout.completion_ids) + rollout.note) % 3)

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]

    def _die(self, port: Port, step: str, phase: str, milliseconds: str) -> None:
        while port.step < int(step) or (phase != "between" and port.phases.now != phase):
            time.sleep(0.0005)
        time.sleep(float(milliseconds) / 1000)
        os.kill(os.getpid(), signal.SIGKILL)


def bench_resume(kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a setting: kills, the phases they fell into, and whether parameters, metrics and tokens are the same.

    Raises:
        RuntimeError: a session ended in another way than it should.
    """
    draw = random.Random(seed)
    share = [kills // len(SETTINGS) + (i < kills % len(SETTINGS)) for i in range(len(SETTINGS))]
    rows = []
    for setting, count in zip(SETTINGS, share, strict=True):
        if not count:
            continue
        began = time.monotonic()
        here = folder / re.sub(r"\W+", "-", str(setting))
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        _session(setting, here, "whole")
        killed: list[str] = []
        late = 0
        while len(killed) < count:
            for moment in _moments(draw, setting, count - len(killed)):
                if _session(setting, here, "killed", moment) == 0:  # the run was over first: it starts anew
                    shutil.rmtree(here / "killed")
                    late += 1
                    break
                killed.append(moment.split()[2])
                say(f"{setting}: killed in {killed[-1]} ({len(killed)} of {count})")
            if late > LATE:
                raise RuntimeError(f"{setting}: {late} kills came too late; see {here}/killed.log")
        if _session(setting, here, "killed"):
            raise RuntimeError(f"{setting}: the run did not go on; see {here}/killed.log")
        same = {name: compare(here / "whole", here / "killed") for name, compare in CHECKS.items()}
        rows.append({"setting": str(setting), "kills": len(killed), "in": " ".join(killed), **same})
        say(f"{setting}: {len(killed)} kills, {same}, {time.monotonic() - began:.0f} s")
    return rows


def _moments(draw: random.Random, setting: Setting, count: int) -> Iterator[str]:
    """Every kill lets the run get a little further: steps rise, so that all sessions together stay short."""
    steps = sorted(draw.randrange(STEPS - 2) for _ in range(count))  # every phase comes once more
    for step in steps:
        yield f"{draw.randrange(setting.ranks)} {step} {draw.choice(PHASES)} {draw.random() * 60:.1f}"


def _session(setting: Setting, folder: Path, run: str, moment: str = "") -> int:
    """Starts or goes on with a run; its exit code."""
    command = [sys.executable, "-m", "rlattn.cli"]
    if setting.ranks > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={setting.ranks}", "--standalone"]
        command = [sys.executable, *launcher, "-m", "rlattn.cli"]
    command += [
        "train",
        str(shipped_dir("recipes") / "quickstart.yaml"),
        f"output_dir={run}",
        *_recipe(setting, folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({MOMENT: moment} if moment else {})}
    environment["RLATTN_CACHE"] = str(folder.parent / "cache")
    with (folder / f"{run}.log").open("a") as log:
        code = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=SESSION_SECONDS, check=False
        ).returncode
    if code and not moment:
        raise RuntimeError(f"{setting}: exit code {code}; see {folder}/{run}.log")
    return code


def _recipe(setting: Setting, folder: Path) -> list[str]:
    trainer: dict[str, Any] = {
        "max_steps": STEPS, "num_generations": 4, "per_device_train_batch_size": 8 // setting.ranks,
        "max_completion_length": 24, "steps_per_generation": 2, "num_iterations": 2, "learning_rate": 0.01,
        "gradient_checkpointing": False, "eval_steps": 5, "save_steps": 2, "per_device_eval_batch_size": 8,
    }  # fmt: skip
    if setting.zero:
        config = json.loads((shipped_dir("launch") / "deepspeed" / "zero3.json").read_text())
        config["zero_optimization"] |= {"stage": setting.zero}
        (folder / "deepspeed.json").write_text(to_json(config))
        trainer["deepspeed"] = str(folder / "deepspeed.json")
    policy = {"path": TINY_POLICY, "warm_start": {"steps": 30, "batch_size": 8}}
    return [
        "policy=" + json.dumps(policy | ({"lora": {"r": 4}} if setting.lora else {})),
        "task={kind: arithmetic, terms: [3, 3], eval_rows: 4, train_rows: 8}",
        "rewards={mortal: {python: 'rlattn.bench.resume:Mortal'}}",
        "tracking.token_every=1",
        "trainer=" + json.dumps(trainer),
    ]


def _same_parameters(whole: Path, killed: Path) -> bool:
    from safetensors.torch import load_file
    from torch import equal

    files = [sorted((run / "model").glob("*.safetensors")) for run in (whole, killed)]
    first, second = ({name: t for file in of_run for name, t in load_file(file).items()} for of_run in files)
    return bool(first) and first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


def _same_metrics(whole: Path, killed: Path) -> bool:
    """Every step once, with the same numbers."""
    rows = [
        [{k: v for k, v in row.items() if not UNTIMED.search(k)} for row in read_rows(run / "metrics.jsonl")]
        for run in (whole, killed)
    ]
    return [row["step"] for row in rows[0]] == list(range(STEPS + 1)) and rows[0] == rows[1]


def _same_tokens(whole: Path, killed: Path) -> bool:
    """The sampled rollouts of every step, token by token."""
    import pyarrow.parquet as pq

    files = [sorted((run / "tokens").glob("*.parquet")) for run in (whole, killed)]
    names = [[file.name for file in of_run] for of_run in files]
    tables = [[repr(pq.read_table(file).to_pylist()) for file in of_run] for of_run in files]
    return len(names[0]) == STEPS and names[0] == names[1] and tables[0] == tables[1]


def _same_heads(whole: Path, killed: Path) -> bool:
    rows = [list(read_rows(run / "heads.jsonl")) for run in (whole, killed)]
    return [row["step"] for row in rows[0]] == list(range(1, STEPS + 1)) and rows[0] == rows[1]


CHECKS = {"parameters": _same_parameters, "metrics": _same_metrics, "tokens": _same_tokens, "heads": _same_heads}
