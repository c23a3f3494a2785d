"""What rlattn leans on in TRL, pinned: a new TRL that changes any of it fails here, by name."""

import inspect

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rlattn import AttentionGRPOTrainer
from rlattn.policy.tiny import tiny_policy
from rlattn.tasks import Arithmetic
from rlattn.types import WarmStart


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    task = Arithmetic(terms=(3, 3), eval_rows=8)
    return tiny_policy(task, warm_start=WarmStart(steps=20, batch_size=16))


def length_reward(completion_ids, **_):
    return [len(ids) / 32 for ids in completion_ids]


def parity_reward(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def trained(trainer_class, policy, tmp_path, resume=False, **options):
    torch.manual_seed(0)
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in list(Arithmetic().rows("train"))[:32]]
    config = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-2,
        num_generations=4,
        max_completion_length=24,
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            **options,
        },
    )
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=[length_reward, parity_reward],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "num_iterations": 2, "max_steps": 4},
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.3]},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none", "loss_type": "dr_grpo"},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "loss_type": "cispo", "epsilon_high": 5.0},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "gradient_accumulation_steps": 2},
        {"beta": 0.04, "loss_type": "bnpo"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_uniform_credit_is_plain_trl_bit_for_bit(policy, tmp_path, options):
    plain = trained(GRPOTrainer, policy, tmp_path / "plain", **options)
    ours = trained(AttentionGRPOTrainer, policy, tmp_path / "ours", **options)
    for (name, expected), (_, actual) in zip(
        plain.model.state_dict().items(), ours.model.state_dict().items(), strict=True
    ):
        assert torch.equal(expected, actual), name
    rewards = [log["reward"] for log in plain.state.log_history if "reward" in log]
    assert rewards == [log["reward"] for log in ours.state.log_history if "reward" in log]
    assert any(log.get("grad_norm", 0) > 0 for log in ours.state.log_history)


def test_advantages_reach_the_loss_as_a_token_table(policy, tmp_path):
    seen = []

    class Spy(AttentionGRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append((inputs["advantages"], inputs["completion_ids"]))
            return super()._compute_loss(model, inputs)

    trained(Spy, policy, tmp_path, max_steps=1)
    advantages_BT, completion_ids_BT = seen[0]
    assert advantages_BT.shape == completion_ids_BT.shape
    assert advantages_BT.abs().max() > 0


def test_the_methods_we_override_have_the_signatures_we_call():
    expected = {
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_generate_single_turn": [
            "self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images",
        ],
    }  # fmt: skip
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters, name


def test_vllm_reads_its_temperature_at_every_call():
    source = inspect.getsource(trl.generation.vllm_generation.VLLMGeneration.generate)
    assert "temperature = self.temperature" in source


def test_none_is_neutral(policy, tmp_path):
    calls = []

    def sometimes(completion_ids, **_):
        calls.append(len(completion_ids))
        return [None if index % 4 == 0 else 1.0 for index in range(len(completion_ids))]

    class Spy(AttentionGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            calls.append(out["advantages"].abs().max().item())
            return out

    global length_reward
    keep, length_reward = length_reward, sometimes
    try:
        trainer = trained(Spy, policy, tmp_path, max_steps=1, reward_weights=[1.0, 0.0])
    finally:
        length_reward = keep
    assert calls[0] == 8
    assert calls[1] == 0
    assert trainer.state.log_history[0]["rewards/sometimes/neutral"] == 2
