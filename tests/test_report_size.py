"""The report of a long run: small enough to mail, made in bounded memory, and it says what it left out."""

import json
import math
import os
import random
import subprocess
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
from forked import PYTHON

from rlattn.grpo.token_log import write_tokens
from rlattn.report import page, read_run
from rlattn.report.thin import POINTS
from rlattn.run_folder.jsonl import append_row

MAILED = 15e6  # bytes


def rollout(number, tokens, prompt="2 + 2 ?"):
    noise = random.Random(number)
    names = ("advantage", "logprob", "entropy", "weight", "waad", "fai")
    signals = {name: [10 * noise.random() for _ in range(tokens)] for name in names}
    words = [f" w{noise.randrange(20_000)}" for _ in range(tokens)]
    return {
        "rollout": number, "group": number // 8, "trained": [True] * tokens, "token_id": list(range(tokens)),
        "token": words, "anchor": [True] * tokens, "preplan": [False] * tokens, "reward": 1.0,
        "rewards": {"accuracy": 1.0}, "prompt": prompt, **signals,
    }  # fmt: skip


def linked(folder, steps, rollouts):
    """The same rollouts at every step, stored once."""
    first = folder / f"tokens/step-{steps[0]:06d}.parquet"
    write_tokens(first, rollouts)
    for step in steps[1:]:
        os.link(first, folder / f"tokens/step-{step:06d}.parquet")


def test_5000_steps_and_500_rollouts_are_small_and_all_there(tmp_path):
    names = [f"{part}/m{i}" for part in ("rewards", "credit", "time", "other") for i in range(25)]
    rows = [{"step": step, **{name: math.sin(step) for name in names}} for step in range(5001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [[12.3456] * 64] * 64
    for step in range(0, 5000, 80):
        heads = {"layers": list(range(64)), "span": table, "local": table, "global": table}
        append_row(tmp_path / "heads.jsonl", {"step": step, **heads})
    linked(tmp_path, range(0, 5000, 80), [rollout(i, 480, prompt="的" * 20_000) for i in range(8)])
    data = read_run(tmp_path)
    assert len(page(data).encode()) < MAILED
    assert len(data["tokens"]["rollouts"]) == 500
    assert {one["step"] for one in data["tokens"]["rollouts"]} >= {0, 4960}
    assert not any(one["cut"] for one in data["tokens"]["rollouts"])
    assert all(len(series["points"]) <= POINTS for curve in data["curves"] for series in curve["series"])
    assert {0, 4960} <= {one["step"] for one in data["heads"]["steps"]}
    assert any("500 of the 504 rollouts of 63 of 63 logged steps, 0 of them cut" in line for line in data["missing"])


def test_thousands_of_metrics_rewards_and_endless_tokens_stay_small(tmp_path):
    names = [f"task/m{i}" for i in range(2000)]
    rows = (json.dumps({"step": step, **{name: math.sin(step) for name in names}}) for step in range(600))
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    one = rollout(0, 400)
    one |= {"token": ["x" * 5000 + str(i) for i in range(400)], "rewards": {f"r{i}": 1.0 for i in range(900)}}
    write_tokens(tmp_path / "tokens/step-000001.parquet", [one])
    data = read_run(tmp_path)
    assert len(page(data).encode()) < MAILED
    assert len(data["tokens"]["rollouts"][0]["rewards"]) == 50


def test_one_rollout_a_step_gives_as_many_rollouts(tmp_path):
    linked(tmp_path, range(900), [rollout(0, 20)])
    tokens = read_run(tmp_path)["tokens"]
    steps = [one["step"] for one in tokens["rollouts"]]
    assert len(steps) == 500 and steps == sorted(steps)
    assert max(later - step for step, later in pairwise(steps)) <= 4


def test_ten_million_tokens_in_many_files(tmp_path):
    linked(tmp_path, range(5000), [rollout(i, 250) for i in range(8)])
    data = read_run(tmp_path)
    assert len(page(data).encode()) < MAILED
    assert any("of 5000 logged steps, 0 of them cut; all is in tokens/" in line for line in data["missing"])
    assert len({one["step"] for one in data["tokens"]["rollouts"]}) > 60


def test_ten_million_tokens_in_one_file_are_not_held_in_memory(tmp_path):
    (tmp_path / "tokens").mkdir()
    million = 2**20
    numbers = pa.array([i // 1000 for i in range(million)], pa.int32())
    columns = {"rollout": numbers, "token": pa.array([f"t{i % 9973}" for i in range(million)])}
    columns |= {name: pa.array([math.sin(i) for i in range(million)], pa.float32()) for name in ("weight", "fai")}
    with pq.ParquetWriter(tmp_path / "tokens/step-000001.parquet", pa.table(columns).schema) as file:
        for part in range(10):
            numbers = pa.compute.add(columns["rollout"], pa.scalar(1049 * part, pa.int32()))
            file.write_table(pa.table({**columns, "rollout": numbers}), row_group_size=million)
    code = (
        "import sys, pyarrow; from pathlib import Path; from rlattn.report import write_report\n"
        "report = write_report(Path(sys.argv[1]))\n"
        "print(report.stat().st_size, pyarrow.default_memory_pool().max_memory())"
    )
    result = subprocess.run([*PYTHON, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    size, peak = map(int, result.stdout.split())
    assert size < MAILED and peak < 20e6
    (line,) = [line for line in read_run(tmp_path)["missing"] if "token view" in line]
    assert "240 of the 10490 rollouts of 1 of 1 logged steps" in line
