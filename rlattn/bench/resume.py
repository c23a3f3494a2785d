"""`rlattn bench resume`: kills real runs with SIGKILL at random moments, goes on, and compares with the unbroken run.

Every setting (ranks, strategy, LoRA or all weights) trains once unbroken and once with its share of the kills, in small
generation windows with a checkpoint every second step, credit and a reward with a state of its own. A kill falls
into a phase (generation, reward, credit, training, checkpoint, or between them) at a random time after its start.
In some settings the same command goes on, in others torchrun starts the ranks anew, which must train within a minute.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlattn.files import shipped_dir
from rlattn.formats.strict_json import to_json
from rlattn.grpo.port import Port
from rlattn.rank import rank, restarts
from rlattn.recipe.schema import TINY_POLICY
from rlattn.run_folder.jsonl import read_rows
from rlattn.types import RewardBatch, Rollout

STEPS = 12
PYTHON = (sys.executable, "-u")  # a killed rank has said all
# In the environment of a session to be killed: rank, step, phase and milliseconds; a line for every start of its ranks.
MOMENTS = "RLATTN_BENCH_KILLS"
KILLS, STARTS = "kills", "starts"  # files in a run's folder: the time of every kill, and of rank 0's first steps
PHASES = ("generation", "reward", "credit", "training", "checkpoint", "between")
UNTIMED = re.compile(r"time|seconds|runtime|per_second|total_flos|train_loss|num_tokens")
SESSION_SECONDS = 600
LATE = 10  # kills of a setting that may come after the end of the run
RESTART_SECONDS = 60.0  # from a kill to the next step


@dataclass(frozen=True)
class Setting:
    ranks: int
    zero: int
    """ZeRO stage; 0 for none."""
    lora: bool
    restarts: bool = False
    """torchrun starts the ranks anew."""

    def __str__(self) -> str:
        strategy = f"ZeRO-{self.zero}" if self.zero else "DDP" if self.ranks > 1 else "plain"
        weights = "LoRA" if self.lora else "all weights"
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {strategy}, {weights}{', restarts' * self.restarts}"


SETTINGS = tuple(Setting(r, z, lora) for r, z in ((1, 0), (2, 0), (2, 2), (2, 3)) for lora in (False, True))
SETTINGS += (Setting(2, 0, False, True), Setting(3, 0, True, True), Setting(2, 3, False, True))


class Mortal:
    """A reward whose values depend on all that it has seen, and that ends its process where MOMENTS says."""

    total = 0

    def bind(self, trainer: Any) -> None:
        if rank() == 0 and restarts():
            threading.Thread(target=self._tell, args=(trainer.port,), daemon=True).start()
        moments = os.environ.get(MOMENTS, "").splitlines()[restarts() :]
        if moments and moments[0].split()[0] == str(rank()):
            threading.Thread(target=self._die, args=(trainer.port, *moments[0].split()[1:]), daemon=True).start()

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
        while restarts() and not port.phases.trained:
            time.sleep(0.0005)
        time.sleep(float(milliseconds) / 1000)
        _append_time(port, KILLS)
        os.kill(os.getpid(), signal.SIGKILL)

    def _tell(self, port: Port) -> None:
        while not port.phases.trained:
            time.sleep(0.01)
        _append_time(port, STARTS)


def _append_time(port: Port, name: str) -> None:
    with (Path(port.args.output_dir).parent / name).open("a") as times:
        times.write(f"{time.time()}\n")


def _times(run: Path, name: str) -> list[float]:
    file = run / name
    return [float(line) for line in file.read_text().split()] if file.is_file() else []


def bench_resume(kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a setting: kills, the phases they fell into, whether parameters, metrics and tokens are the same, and the
    longest time that a restart took.

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
        killed = (_restarted if setting.restarts else _started_again)(draw, setting, here, count, say)
        same = {name: compare(here / "whole", here / "killed") for name, compare in CHECKS.items()}
        died, started = (_times(here / "killed", name) for name in (KILLS, STARTS))
        slowest = max(min(s for s in started if s > kill) - kill for kill in died) if setting.restarts else 0.0
        rows.append({"setting": str(setting), "kills": count, "in": " ".join(killed), **same, "restart": slowest})
        say(f"{setting}: {count} kills, {same}, {time.monotonic() - began:.0f} s")
    return rows


def _started_again(
    draw: random.Random, setting: Setting, here: Path, count: int, say: Callable[[str], None]
) -> list[str]:
    """Kills a run, and goes on with it by the same command. The phases of the kills."""
    killed: list[str] = []
    late = 0
    while len(killed) < count:
        for moment in _moments(draw, setting, count - len(killed)):
            if _session(setting, here, "killed", [moment]) == 0:  # the run was over first: it starts anew
                late = _too_late(setting, here, late)
                break
            killed.append(moment.split()[2])
            say(f"{setting}: killed in {killed[-1]} ({len(killed)} of {count})")
    _session(setting, here, "killed")
    return killed


def _restarted(draw: random.Random, setting: Setting, here: Path, count: int, say: Callable[[str], None]) -> list[str]:
    """Kills a run under one torchrun, which starts its ranks anew. The phases of the kills."""
    late = 0
    while True:
        moments = list(_moments(draw, setting, count))
        if _session(setting, here, "killed", moments):
            raise RuntimeError(f"{setting}: the run did not go on; see {here}/killed.log")
        if len(_times(here / "killed", KILLS)) == count:
            return [moment.split()[2] for moment in moments]
        late = _too_late(setting, here, late)


def _too_late(setting: Setting, here: Path, late: int) -> int:
    """The run was over before it was killed: it starts anew."""
    if late == LATE:
        raise RuntimeError(f"{setting}: {late} kills came too late; see {here}/killed.log")
    shutil.rmtree(here / "killed")
    return late + 1


def _moments(draw: random.Random, setting: Setting, count: int) -> Iterator[str]:
    """Every kill lets the run get a little further: steps rise, so that all sessions together stay short. Every rank is
    killed in turn.
    """
    steps = sorted(draw.randrange(STEPS - 2) for _ in range(count))  # every phase comes once more
    first = draw.randrange(setting.ranks)
    for number, step in enumerate(steps):
        yield f"{(first + number) % setting.ranks} {step} {draw.choice(PHASES)} {draw.random() * 60:.1f}"


def _session(setting: Setting, folder: Path, run: str, moments: Sequence[str] = ()) -> int:
    """Starts or goes on with a run; its exit code."""
    recipe = str(shipped_dir("recipes") / "quickstart.yaml")
    command = [*PYTHON, "-m", "rlattn.cli", "train", recipe, f"output_dir={run}", *_recipe(setting, folder)]
    if setting.ranks > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={setting.ranks}", "--standalone", "--no-python"]
        launcher += [f"--max-restarts={len(moments)}"] if setting.restarts else []
        command = [*PYTHON, *launcher, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MOMENTS: "\n".join(moments)}
    environment["RLATTN_CACHE"] = str(folder.parent / "cache")
    with (folder / f"{run}.log").open("a") as log:
        code = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=log,
            timeout=SESSION_SECONDS * max(1, len(moments)), check=False,
        ).returncode  # fmt: skip
    if code and not moments:
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
