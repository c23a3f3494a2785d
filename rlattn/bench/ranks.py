"""`rlattn bench ranks`: strong scaling. The same step on 1 and on 2 ranks, phase by phase, in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rlattn.files import shipped_dir
from rlattn.processes.phases import TIMED
from rlattn.run_folder.jsonl import read_rows

BATCH = 32  # rollouts of a step, over all ranks
WHOLE = "step"
SESSION_SECONDS = 900


def bench_ranks(rounds: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """One row a phase: median seconds on 1 rank and on the slowest of 2, and the share that does not scale.

    The share is Amdahl's f in t2 = t1·(f + (1 - f)/2): 0 halves, 1 gains nothing, above 1 costs. A thread a rank.
    """
    seconds: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    for number in range(rounds):
        for ranks in (1, 2) if number % 2 == 0 else (2, 1):
            run = folder / f"{ranks}-ranks-{number}"
            _train(run, ranks, steps)
            for row in list(read_rows(run / "metrics.jsonl"))[2:]:  # the first step also warms up
                for phase in (*TIMED, WHOLE):
                    key = f"time/{phase}_slowest" if ranks > 1 and phase != WHOLE else f"time/{phase}"
                    seconds[ranks].setdefault(phase, []).append(row.get(key, 0.0))
    rows = []
    for phase in (*TIMED, WHOLE):
        one, two = (median(seconds[ranks][phase]) for ranks in (1, 2))
        if max(one, two) >= 0.001:
            rows.append({"phase": phase, "1 rank": one, "2 ranks": two, "unscaled": 2 * two / one - 1 if one else None})
    return rows


def _train(run: Path, ranks: int, steps: int) -> None:
    trainer = {
        "max_steps": steps, "num_generations": 8, "per_device_train_batch_size": BATCH // ranks,
        "max_completion_length": 96, "learning_rate": 1e-4, "gradient_checkpointing": False,
        "save_strategy": "no", "eval_strategy": "no",
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    recipe = str(shipped_dir("recipes") / "quickstart.yaml")
    policy = "policy={path: tiny-reasoner, warm_start: {steps: 60, batch_size: 16}}"
    task = "task={kind: arithmetic, terms: [3, 3], eval_rows: 4, train_rows: 400}"
    command = [sys.executable, *launcher, "-m", "rlattn.cli", "train", recipe, policy, task, f"output_dir={run}"]
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("w") as log:
        result = subprocess.run(
            [*command, "tracking.token_rollouts=0", f"trainer={json.dumps(trainer)}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log, stderr=log, timeout=SESSION_SECONDS, check=False,
        )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"exit code {result.returncode}; see {run.parent / f'{run.name}.log'}")
