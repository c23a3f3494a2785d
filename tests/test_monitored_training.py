"""The self-monitor inside real GRPO steps: log-only, state in a checkpoint, the policy of step 0, two ranks."""

import json

import pytest
import torch
from conftest import rlattn
from test_reward_training import Parity, weights
from transformers import AutoTokenizer
from trl import GRPOConfig

from rlattn import AttentionGRPOTrainer
from rlattn.grpo.reward_function import RewardFunction
from rlattn.grpo.trl_rows import train_data
from rlattn.policy.tiny import tiny_policy
from rlattn.recipe.schema import Policy
from rlattn.rewards.payoff import Payoff
from rlattn.rewards.self_monitor import SelfMonitor, next_multiplier
from rlattn.tasks import Ledger
from rlattn.types import WarmStart

TASK = Ledger(train_rows=32, eval_rows=8)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(TASK, warm_start=WarmStart(steps=40, batch_size=8, learning_rate=1e-2, noise=0.5))


def trained(policy, folder, rewards, *, resume=False, **settings):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    trainer = AttentionGRPOTrainer(
        model=str(policy),
        reward_funcs=[RewardFunction(name, reward, TASK, tokenizer, {}) for name, reward in rewards.items()],
        args=GRPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=1,
            gradient_checkpointing=False, learning_rate=2e-3, num_generations=4, per_device_train_batch_size=8,
            max_completion_length=32, **{"max_steps": 3, "save_strategy": "no", **settings},
        ),
        train_dataset=train_data(TASK, Policy(path=str(policy))),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_log_only_changes_nothing(policy, tmp_path):
    action = {"payoff": Payoff(), "parity": Parity()}
    plain = trained(policy, tmp_path / "plain", action)
    logged = trained(policy, tmp_path / "log", {**action, "monitor": SelfMonitor(mode="log", lag=2, max_new_tokens=12)})
    assert torch.equal(weights(plain), weights(logged))
    assert any(0 < log["self_monitor/flag_rate"] < 1 for log in logged.state.log_history[:3])
    rewarded = trained(
        policy, tmp_path / "reward", {**action, "monitor": SelfMonitor(constraint="penalty", max_new_tokens=12)}
    )
    assert not torch.equal(weights(plain), weights(rewarded))


class Remembering(SelfMonitor):
    """Keeps what the policy of step 0 wrote about two fixed thoughts."""

    def prepare(self, batch):
        prompts = [TASK.rows("train")[i]["prompt"] + " <think> I claim 40 . </think> <monitor>" for i in (0, 1)]
        self.first = batch.generate(prompts, max_new_tokens=12, first_policy=True)
        self.now = batch.generate(prompts, max_new_tokens=12)
        return super().prepare(batch)


def test_lambda_and_the_held_out_policy_survive_a_resume(policy, tmp_path):
    def monitor():
        return Remembering(lag=2, max_new_tokens=12, held_out_every=2)

    saving = {"save_strategy": "steps", "save_steps": 1}
    before, after = monitor(), monitor()
    trained(policy, tmp_path, {"parity": Parity(), "monitor": before}, max_steps=3, **saving)
    stored = json.loads((tmp_path / "checkpoint-3" / "rewards.json").read_text())["monitor"]
    assert stored == before.state_dict() and stored["multiplier"] > 0 and stored["batches"] == 3
    assert not (tmp_path / "checkpoint-3" / "lagged-0.safetensors").exists()  # what policy.path gives again
    resumed = trained(policy, tmp_path, {"parity": Parity(), "monitor": after}, resume=True, max_steps=4, **saving)
    logs = [log for log in resumed.state.log_history if "self_monitor/lambda" in log]
    assert len(logs) == 4
    value = 0.0
    for log in logs:
        value = next_multiplier(value, log["self_monitor/flag_rate"], 0.05, 0.1, 5)
        assert log["self_monitor/lambda"] == pytest.approx(value)
        assert log["rewards/monitor/weight"] == pytest.approx(value)
    assert ["self_monitor/held_out_flag_rate" in log for log in logs] == [True, False, True, False]
    assert after.first == before.first != after.now


def test_two_ranks_agree_on_lambda(policy, tmp_path):
    result = rlattn(
        "train", "ledger_tiny", f"policy={{path: '{policy}'}}", "task={kind: ledger, train_rows: 32, eval_rows: 8}",
        "trainer={max_steps: 2, num_generations: 8, per_device_train_batch_size: 4, max_completion_length: 32,"
        " gradient_checkpointing: false, save_strategy: 'no', per_device_eval_batch_size: 4}",
        cwd=tmp_path, ranks=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/ledger-tiny/metrics.jsonl").read_text().splitlines()]
    value = 0.0
    for row in rows[1:]:
        value = next_multiplier(value, row["self_monitor/flag_rate"], 0.05, 0.1, 5)
        assert row["self_monitor/lambda"] == pytest.approx(value)
        # one group straddles the ranks: its mean reward is that of all of its rollouts
        assert row["rewards/self_monitor/mean"] == pytest.approx(-row["self_monitor/flag_rate"])
    assert {"eval/false_claims", "eval/dtr", "eval/truth_accuracy"} <= rows[-1].keys() | rows[0].keys()
