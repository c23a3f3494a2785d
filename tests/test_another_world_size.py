"""Going on with another number of ranks, keeping the best checkpoint, and the kills of `rlattn bench resume`."""

import json
import subprocess

from conftest import rlattn
from forked import PYTHON

from rlattn.bench import resume as bench_resume
from rlattn.run_folder.jsonl import read_rows

SMALL = (
    "policy={path: tiny-reasoner, warm_start: {steps: 20, batch_size: 8}}",
    "task={kind: arithmetic, terms: [2, 2], eval_rows: 16, train_rows: 16}",
    "output_dir=run", "resume.allow_changed=[trainer.max_steps, trainer.per_device_train_batch_size]",
)  # fmt: skip


def trainer(steps, batch, **more):
    settings = {
        "max_steps": steps, "num_generations": 4, "per_device_train_batch_size": batch, "max_completion_length": 32,
        "learning_rate": 1e-3, "gradient_checkpointing": False, "save_steps": 1, "eval_steps": 1,
        "per_device_eval_batch_size": 16, **more,
    }  # fmt: skip
    return f"trainer={json.dumps(settings)}"


def steps_of(run):
    return [row["step"] for row in read_rows(run / "metrics.jsonl")]


def test_a_run_of_two_ranks_goes_on_with_one_and_says_what_is_not_exact(tmp_path):
    first = rlattn("train", "quickstart", *SMALL, trainer(2, 4), cwd=tmp_path, ranks=2)
    assert first.returncode == 0, first.stderr
    again = rlattn("train", "quickstart", *SMALL, trainer(4, 8), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "checkpoint-2 was not written by 1 rank(s)" in again.stdout
    assert steps_of(tmp_path / "run") == [0, 1, 2, 3, 4]


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    kept = ("resume={keep_last: 1, keep_best: true}",)
    result = rlattn("train", "quickstart", *SMALL[:3], *kept, trainer(5, 8), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if row["step"]]
    best = max(rows, key=lambda row: (row["eval/accuracy"], row["step"]))["step"]
    assert {path.name for path in (tmp_path / "run/checkpoints").glob("checkpoint-*")} == {
        f"checkpoint-{s}" for s in (best, 5)
    }


def test_a_run_killed_under_deepspeed_ends_bit_for_bit_as_the_unbroken_one_and_keeps_its_ranks(tmp_path, monkeypatch):
    setting = bench_resume.Setting(2, 2, False)
    monkeypatch.setattr(bench_resume, "SETTINGS", (setting,))
    monkeypatch.setattr(bench_resume, "PYTHON", PYTHON)
    (row,) = bench_resume.bench_resume(1, 0, tmp_path, print)
    assert row["kills"] == 1
    assert {name: row[name] for name in bench_resume.CHECKS} == dict.fromkeys(bench_resume.CHECKS, True)
    (folder,) = (path.parent for path in tmp_path.glob("*/killed"))
    longer = (f"trainer.max_steps={bench_resume.STEPS + 1}", "trainer.per_device_train_batch_size=8", SMALL[-1])
    recipe = bench_resume._recipe(setting, folder)
    alone = rlattn("train", "quickstart", "output_dir=killed", *recipe, *longer, cwd=folder)
    assert alone.returncode == 2
    assert "trainer.deepspeed: 2 ranks wrote" in alone.stderr and "Start it on 2" in alone.stderr


def test_ranks_that_see_different_run_folders_are_told_so(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    first = rlattn("train", "quickstart", *SMALL, trainer(1, 8), cwd=tmp_path / "0")
    assert first.returncode == 0, first.stderr
    apart = f'cd "{tmp_path}/$RANK" && exec "$@"'  # as on nodes that share no folder
    launcher = [*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    command = [*PYTHON, "-m", "rlattn.cli", "train", "quickstart", *SMALL, trainer(2, 4)]
    result = subprocess.run(
        [*launcher, "bash", "-c", apart, "-", *command], capture_output=True, text=True, timeout=300
    )
    assert result.returncode != 0
    assert "output_dir: the ranks find different checkpoints" in result.stderr
