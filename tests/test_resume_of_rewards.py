"""Every reward module's recipe, gone on with from an early checkpoint: the same policy, numbers and state."""

import re
import shutil

import pytest
from conftest import rlattn
from safetensors.torch import load_file
from test_resume import untimed

from rlattn.run_folder.jsonl import read_rows

SMALL = (
    "policy.warm_start.steps=8", "policy.warm_start.batch_size=8", "policy.supervised_control=false",
    "trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_steps=2",
    "trainer.learning_rate=1e-3", "trainer.per_device_train_batch_size=8", "trainer.num_generations=4",
    "trainer.per_device_eval_batch_size=8", "task.eval_rows=4", "output_dir=run", "resume.keep_last=2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("effort_tiny", ("task.rl_rows=2", "task.train_rows=40")),
        ("ledger_tiny", ("task.train_rows=40", "rewards.self_monitor.lag=3", "rewards.self_monitor.held_out_every=2")),
        ("questions_tiny", ("trainer.max_completion_length=100",)),
    ],
)
def test_a_run_gone_on_with_from_an_early_checkpoint_is_the_unbroken_one(recipe, more, tmp_path):
    command = ("train", recipe, *SMALL, *more)
    first = rlattn(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "run").rename(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for left in ("checkpoints/checkpoint-4", "model"):  # what a kill after step 2 leaves, and rows of a step too many
        shutil.rmtree(tmp_path / "run" / left)
    (tmp_path / "run/summary.json").unlink()
    again = rlattn(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert re.search(r"continuing from .*checkpoint-2", again.stdout)
    models = [load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "run")]
    assert all(models[0][name].equal(models[1][name]) for name in models[0])
    assert untimed(read_rows(tmp_path / "whole/metrics.jsonl")) == untimed(read_rows(tmp_path / "run/metrics.jsonl"))
    states = [tmp_path / run / "checkpoints/checkpoint-4/rewards.json" for run in ("whole", "run")]
    assert states[0].is_file() == states[1].is_file() == (recipe != "questions_tiny")
    if states[0].is_file():
        assert states[0].read_text() == states[1].read_text()
