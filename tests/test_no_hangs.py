"""Two real ranks, one of which fails, ends early or hangs: the other never waits for it."""

import json
import time

import pytest
from conftest import rlattn

REWARD = """
import os, time
RANK = os.environ.get("RANK")

class Collective:
    total = 0
    def prepare(self, batch):
        self.total += 1
        batch.gather([1])
        if RANK == "1" and batch.step == 1:
            {fault}
        batch.gather([2])
        batch.generate(["4 + 4"], max_new_tokens=2)
        return [sum(batch.gather([3]))] * len(batch.rollouts)
    def score(self, rollout): return float(len(rollout.completion_ids) % 3)
    def state_dict(self): return {{"total": self.total}}
    def load_state_dict(self, state): self.total = state["total"]

from rlattn.types import Credit
class FailsOnOneRank:
    def __call__(self, signals):
        if RANK != "0":
            raise ValueError("no such head")
        return Credit(weights_BN=signals.mask_BN.float())
"""
FAILING_EVALUATION = """
import rlattn.grpo.held_out
def fail(*_): raise ValueError("no such answer")
if RANK == "1":
    rlattn.grpo.held_out.generate_greedy = fail
"""
RUN = (
    "policy={path: tiny-reasoner, warm_start: {steps: 2, batch_size: 4}}", "resume.stall_seconds=8",
    "rewards={collective: {python: 'own:Collective'}}", "rewards.max_failed_share=1",
    "task={kind: arithmetic, terms: [2, 2], eval_rows: 4, train_rows: 8}",
    "trainer={max_steps: 3, num_generations: 4, per_device_train_batch_size: 4, max_completion_length: 8,"
    " learning_rate: 1e-3, gradient_checkpointing: false, save_steps: 3, per_device_eval_batch_size: 8}",
)  # fmt: skip


def run(folder, fault, *more, ranks=2, beside=""):
    (folder / "own.py").write_text(REWARD.format(fault=fault) + beside)
    return rlattn("train", "quickstart", *RUN, "output_dir=run", *more, cwd=folder, ranks=ranks)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("raise ValueError('boom')", "rank 1: ValueError: boom"), ("return [1] * 4", "different numbers of collective")],
)
def test_a_prepare_that_fails_on_one_rank_is_neutral_on_all_and_the_run_goes_on(tmp_path, fault, problem):
    result = run(tmp_path, fault)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["rewards/collective/failed"] for row in rows[1:]] == [0, 8, 0]
    assert problem in result.stderr
    (first,) = [json.loads(line) for line in (tmp_path / "run/failures.jsonl").read_text().splitlines()]
    assert (first["step"], first["reward"], first["failed"]) == (2, "collective", 8) and problem in first["problem"]
    assert first["completion"] and problem in (tmp_path / "run/report.html").read_text()
    stored = json.loads((tmp_path / "run/checkpoints/checkpoint-3/rewards.json").read_text())
    assert stored == {"collective": {"total": 2}}  # of the two batches that were prepared
    phases = {"generation", "reward", "credit", "training"}
    for row in rows[1:]:
        assert {f"time/{phase}" for phase in phases} <= row.keys()
        assert all(0 < row[f"time/{phase}"] <= row[f"time/{phase}_slowest"] for phase in phases)
        assert sum(row[f"time/{phase}"] for phase in phases) < 1.5 * row["time/step"]


def test_an_error_on_one_rank_ends_the_other_and_is_told_last(tmp_path):
    began = time.monotonic()
    result = run(tmp_path, "pass", beside=FAILING_EVALUATION)
    assert result.returncode != 0
    assert "rlattn (rank 0): rank 1 failed in evaluation: ValueError: no such answer" in result.stderr
    assert "no such answer" in result.stderr[result.stderr.rindex("Root Cause") :]
    assert time.monotonic() - began < 90  # far below the 1,800 s after which torch itself would have given up


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_credit_rule_that_fails_on_its_first_step_ends_every_rank(tmp_path, ranks):
    began = time.monotonic()
    result = run(tmp_path, "pass", "credit={python: 'own:FailsOnOneRank'}", ranks=ranks)
    assert result.returncode == (1 if ranks else 2), result.stderr  # 1: torchrun's own
    said = "credit: the rule FailsOnOneRank fails on its first step: ValueError: no such head (own.py, line"
    assert said in result.stderr
    assert ranks or "Traceback" not in result.stderr
    assert time.monotonic() - began < 90


@pytest.mark.parametrize(("ranks", "said"), [(2, "rank 1 is in reward; the others wait for it"), (1, "does not end")])
def test_a_rank_that_hangs_ends_the_run_and_is_named(tmp_path, ranks, said):
    fault = "time.sleep(1000)"
    if ranks == 1:
        (tmp_path / "own.py").write_text(REWARD.format(fault=fault).replace('RANK == "1"', "True"))
        result = rlattn("train", "quickstart", *RUN, "output_dir=run", cwd=tmp_path)
    else:
        result = run(tmp_path, fault)
    assert result.returncode != 0
    assert "no progress for" in result.stderr
    assert said in result.stderr
