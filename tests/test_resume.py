"""A run that was stopped and continued is the run that was not: same parameters, same numbers."""

import re
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest
import torch
from conftest import rlattn
from safetensors.torch import load_file
from test_reward_training import LogOnly, trained, weights
from test_trl_contract import policy  # noqa: F401

from rlattn.errors import UserError
from rlattn.run_folder.jsonl import read_rows

# A generation window of four steps, an epoch of eight: checkpoint 10 lies inside a window of the second epoch.
WINDOWS = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 13, "logging_steps": 4, "train_rows": 8}
TIMED = re.compile(r"time|seconds|runtime|per_second|total_flos|train_loss|checkpoint-")


def untimed(rows):
    return [{key: value for key, value in row.items() if not TIMED.search(key)} for row in rows]


@dataclass
class Stateful(LogOnly):
    """Pays by how much it has seen, so that a lost state shows in the gradients."""

    def score(self, rollout):
        return float((sum(rollout.completion_ids) + self.total) % 3)


def test_a_run_continued_inside_a_window_of_the_second_epoch_is_the_unbroken_run(policy, tmp_path):  # noqa: F811
    saving = {**WINDOWS, "save_strategy": "steps", "save_steps": 10}
    whole = trained(policy, tmp_path, {"stateful": Stateful(lag=3)}, **saving)
    again = trained(policy, tmp_path, {"stateful": Stateful(lag=3)}, resume=str(tmp_path / "checkpoint-10"), **saving)
    assert torch.equal(weights(whole), weights(again))
    assert untimed(whole.state.log_history) == untimed(again.state.log_history)
    place = torch.load(tmp_path / "checkpoint-10/rank-0-of-1.pt", weights_only=True)
    assert place["step"] == 10
    assert len(place["rollouts"]) == 2


def test_a_window_of_another_shape_is_generated_anew_and_said(policy, tmp_path, capsys):  # noqa: F811
    saving = {**WINDOWS, "max_steps": 10, "save_strategy": "steps", "save_steps": 10}
    trained(policy, tmp_path, {"stateful": Stateful(lag=3)}, **saving)
    wider = saving | {"steps_per_generation": 4, "max_steps": 13}
    again = trained(policy, tmp_path, {"stateful": Stateful(lag=3)}, resume=str(tmp_path / "checkpoint-10"), **wider)
    assert again.state.global_step == 13
    assert "checkpoint-10 lies inside a generation window of another shape" in capsys.readouterr().out


def test_trls_count_is_exact_behind_a_last_step_of_fewer_batches(policy, tmp_path):  # noqa: F811
    # 5 windows of 3 micro-batches an epoch: the eighth step has one, where the others have two
    odd = {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "max_steps": 9, "save_strategy": "steps"}
    whole = trained(policy, tmp_path, {"counter": Stateful()}, **odd, save_steps=8)
    (tmp_path / "checkpoint-8/rank-0-of-1.pt").unlink()  # as if another number of ranks had written it
    last = {"resume": str(tmp_path / "checkpoint-8"), **odd}
    again = trained(policy, tmp_path, {"counter": Stateful()}, **last)
    assert again._step == whole._step == 17


def test_a_run_stopped_after_its_last_step_does_not_take_another(policy, tmp_path):  # noqa: F811
    saving = {**WINDOWS, "max_steps": 5, "save_strategy": "steps", "save_steps": 5}
    whole = trained(policy, tmp_path, {"stateful": Stateful(lag=3)}, **saving)
    again = trained(policy, tmp_path, {"stateful": Stateful(lag=3)}, resume=str(tmp_path / "checkpoint-5"), **saving)
    assert again.state.global_step == 5
    assert torch.equal(weights(whole), weights(again))


def test_a_reward_that_does_not_take_its_state_is_named(policy, tmp_path):  # noqa: F811
    saving = {**WINDOWS, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trained(policy, tmp_path, {"counter": Stateful()}, **saving)
    (tmp_path / "checkpoint-1/rewards.json").write_text('{"counter": {"sum": 8}}')  # as an older version wrote it
    with pytest.raises(UserError, match=r"rewards\.counter: .*checkpoint-1/rewards\.json: .* KeyError: 'total'"):
        trained(policy, tmp_path, {"counter": Stateful()}, resume=str(tmp_path / "checkpoint-1"), **saving)


def test_torchrun_restarts_killed_ranks_and_the_run_ends_bit_for_bit_as_the_unbroken_one(
    policy,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    (tmp_path / "mortal.py").write_text(
        "import os, signal\n"
        "class Mortal:\n"
        "    total = 0\n"
        "    def prepare(self, batch):\n"
        "        dies = os.environ.get('DIES', '').split(',')[int(os.environ['TORCHELASTIC_RESTART_COUNT']):]\n"
        "        if batch.step == 12 and dies and dies[0] == os.environ['RANK']:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        self.total += sum(batch.gather([len(r.completion_ids) for r in batch.rollouts]))\n"
        "        return [self.total] * len(batch.rollouts)\n"
        "    def score(self, rollout): return float((sum(rollout.completion_ids) + rollout.note) % 3)\n"
        "    def state_dict(self): return {'total': self.total}\n"
        "    def load_state_dict(self, state): self.total = state['total']\n"
    )
    recipe = (
        f"policy={{path: {policy}, lora: {{r: 4}}}}",
        "task={kind: arithmetic, terms: [3, 3], eval_rows: 4, train_rows: 8}",
        "rewards={mortal: {python: 'mortal:Mortal'}}",
        "tracking.token_every=1",
        "trainer={max_steps: 13, num_generations: 4, per_device_train_batch_size: 4, max_completion_length: 24,"
        " steps_per_generation: 2, num_iterations: 2, learning_rate: 1e-2, gradient_checkpointing: false,"
        " eval_steps: 7, save_steps: 5, per_device_eval_batch_size: 8, ddp_find_unused_parameters: false}",
    )  # three ranks: a sum of two has no order
    whole = rlattn("train", "quickstart", *recipe, "output_dir=whole", cwd=tmp_path, ranks=3)
    assert whole.returncode == 0, whole.stderr
    monkeypatch.setenv("DIES", "2,0")
    killed = rlattn("train", "quickstart", *recipe, "output_dir=killed", cwd=tmp_path, ranks=3, restarts=2)
    assert killed.returncode == 0, killed.stderr
    assert killed.stdout.count(f"continuing from {tmp_path}/killed/checkpoints/checkpoint-10") == 2
    models = [load_file(tmp_path / run / "model/adapter_model.safetensors") for run in ("whole", "killed")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    rows = [untimed(read_rows(tmp_path / run / "metrics.jsonl")) for run in ("whole", "killed")]
    assert [row["step"] for row in rows[0]] == list(range(14))
    assert rows[0] == rows[1]
    tokens = [sorted((tmp_path / run / "tokens").glob("*.parquet")) for run in ("whole", "killed")]
    assert [file.name for file in tokens[0]] == [f"step-{step:06d}.parquet" for step in range(1, 14)]
    assert [file.name for file in tokens[0]] == [file.name for file in tokens[1]]
    for files in zip(*tokens, strict=True):  # 11 and 12 train on rollouts that the checkpoint carried
        first, second = (pq.read_table(file).to_pylist() for file in files)
        assert repr(first) == repr(second)
