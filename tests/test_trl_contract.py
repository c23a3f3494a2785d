"""What rlattn leans on in TRL, pinned: a new TRL that changes any of it fails here, by name."""

import asyncio
import copy
import inspect
import math
from functools import partial

import pytest
import test_weight_sync as weight_sync
import torch
import trl
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rlattn import AttentionGRPOTrainer
from rlattn.errors import UserError
from rlattn.grpo.reward_hooks import guard
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


def trained(trainer_class, policy, tmp_path, resume=False, reward_funcs=(), **options):
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
        reward_funcs=list(reward_funcs) or [length_reward, parity_reward],
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
def test_without_credit_training_is_plain_trl_bit_for_bit(policy, tmp_path, options):
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


class Judge:
    """Every other way in which TRL takes a reward."""

    async def __call__(self, completion_ids, trainer_state, log_extra, log_metric, **_):
        await asyncio.sleep(0)
        log_metric("judged", float(trainer_state.global_step))
        log_extra("first", [ids[0] for ids in completion_ids])
        return [float(ids[0] % 3) for ids in completion_ids]

    def method(self, completion_ids, **_):
        return torch.tensor([float(ids[-1] % 3) for ids in completion_ids])


async def awaited(completion_ids, modulus=2, **_):
    return [None, *(float(sum(ids) % modulus) for ids in completion_ids[1:])]


WAYS = [length_reward, Judge(), Judge().method, awaited, partial(awaited, modulus=3), partial(parity_reward)]


def test_every_reward_that_trl_takes_gives_the_same_numbers_by_the_same_names(policy, tmp_path):
    logs = []
    for trainer_class in (GRPOTrainer, AttentionGRPOTrainer):
        trainer = trained(trainer_class, policy, tmp_path, max_steps=1, reward_funcs=WAYS)
        logs.append(trainer.state.log_history[0])
        assert len(trainer._logs["extra"]["first"]) == 8
    theirs, ours = logs
    names = [name for name in theirs if name.startswith("rewards/")]
    assert {name.split("/")[1] for name in names} == {"length_reward", "Judge", "method", "awaited", "parity_reward"}
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert ours["judged"] == theirs["judged"]
    assert not any(value for name, value in ours.items() if name.endswith("/failed"))


class FailingJudge(Judge):
    async def __call__(self, **_):
        raise TimeoutError("no judge")


def test_an_awaited_reward_that_fails_is_counted_and_neutral(policy, tmp_path):
    with pytest.raises(
        UserError, match=r"rewards\.FailingJudge: failed for 8 of 8 .* first with TimeoutError: no judge"
    ):
        trained(AttentionGRPOTrainer, policy, tmp_path, max_steps=1, reward_funcs=[length_reward, FailingJudge()])


def test_a_reward_is_called_as_trl_calls_it_and_may_be_called_by_hand():
    def get_reward(environments, **_):
        return [environment.get_reward() if environment else None for environment in environments]

    class Environment:
        def get_reward(self):
            return 1.0

    owned = guard(get_reward, "Environment")
    assert owned(environments=[Environment(), None]) == [1.0, None]
    assert owned(environments=[Environment(), 5]) == [None, None] and owned.failed == [True, True]
    picky = guard(lambda prompts, completions: [1.0] * len(prompts), "picky")
    assert picky(prompts=["a"], completions=["b"], rollout=["r"]) == [1.0]
    assert picky(["a"], ["b"]) == [1.0]
    with pytest.raises(TypeError):
        picky()


def test_functions_of_one_name_share_their_count_of_failures(policy, tmp_path):
    def first_fails(completion_ids, **_):
        return [math.inf, *([0.0] * (len(completion_ids) - 1))]

    other = lambda completion_ids, **_: [0.0] * len(completion_ids)  # noqa: E731
    other.__name__ = "first_fails"
    trainer = trained(AttentionGRPOTrainer, policy, tmp_path, max_steps=1, reward_funcs=[first_fails, other])
    assert trainer.state.log_history[0]["rewards/first_fails/failed"] == 1


def test_a_trainer_that_skips_our_init_is_plain_trl(policy, tmp_path):
    class Bare(AttentionGRPOTrainer):
        __init__ = GRPOTrainer.__init__

    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    plain = trained(GRPOTrainer, policy, tmp_path / "plain", **saving)
    bare = trained(Bare, policy, tmp_path / "bare", **saving)
    weights = bare.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())


def test_trl_itself_leaves_other_weights_in_a_bfloat16_base():
    """What rlattn/grpo/weight_sync.py is for."""
    policy = weight_sync.policy_of()
    trainer, before = weight_sync.trainer_of(policy, keep=lambda _: None), copy.deepcopy(weight_sync.base_of(policy))
    for _ in range(3):
        weight_sync.sync(trainer)
    assert [name for name, weight in weight_sync.base_of(policy).items() if not torch.equal(weight, before[name])]


def test_trl_reads_an_adapters_weights_by_name_between_merging_and_unmerging():
    engine = trl.generation.vllm_generation.VLLMGeneration
    assert inspect.getsource(engine.sync_weights).count("self._iter_named_params()") == 4
    source = inspect.getsource(engine._iter_named_params)
    merge, read, unmerge = (
        source.index(call)
        for call in ("model.merge_adapter()", "in model.named_parameters():", "model.unmerge_adapter()")
    )
    assert source.index("gather_params(list(model.parameters()))") < merge < read < unmerge
    assert "in module.named_parameters():" in inspect.getsource(engine._iter_fsdp2_params)


def test_peft_merges_no_adapter_where_none_is_named():
    policy = weight_sync.policy_of()
    before = copy.deepcopy(weight_sync.base_of(policy))
    policy.merge_adapter(adapter_names=[])
    weight_sync.assert_same(weight_sync.base_of(policy), before)
    assert not any(layer.merged for layer in policy.modules() if isinstance(layer, BaseTunerLayer))


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
