"""The gradients that `bench credit` compares: TRL's own where no rule shapes them, linear in the weights."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trl_contract import length_reward, parity_reward, policy  # noqa: F401
from transformers import AutoTokenizer
from trl import GRPOConfig

from rlattn import AttentionGRPOTrainer
from rlattn.grpo.oracle import groups_with_signal, oracle_factors
from rlattn.grpo.shaped_gradients import roll_out, shaped_gradients, token_products
from rlattn.tasks.arithmetic import Arithmetic
from rlattn.types import AttentionOptions

ATTENTION = AttentionOptions(horizon=(2, 8))


def made(policy, tmp_path, peft_config=None, **options):  # noqa: F811
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in list(Arithmetic().rows("train"))[:32]]
    torch.manual_seed(0)
    trainer = AttentionGRPOTrainer(
        model=str(policy),
        reward_funcs=[length_reward, parity_reward],
        args=GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
            num_generations=4, max_completion_length=24, per_device_train_batch_size=8, **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
        peft_config=peft_config,
    )  # fmt: skip
    trainer.port.policy.train()
    return trainer


def measured(trainer):
    port = trainer.port
    kept = []
    original = port.roll_out
    port.roll_out = lambda inputs: kept.append(original(inputs)) or kept[-1]
    batch = roll_out(port, next(port.generation_inputs()), ATTENTION)
    return batch, kept[0]


def of_trl(trainer, out):
    """The gradient of TRL's own loss over a generation batch, trained as one micro-batch."""
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.port.policy
    model.zero_grad()
    trainer._compute_loss(model, copy.copy(out)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "grpo"}, {"loss_type": "bnpo"}, {"loss_type": "dr_grpo"}, {"loss_type": "cispo"},
     {"gradient_checkpointing": False, "temperature": 0.7}],
    ids=str,
)  # fmt: skip
def test_equal_credit_has_the_direction_of_trls_gradient(policy, tmp_path, options):  # noqa: F811
    trainer = made(policy, tmp_path, beta=0.0, **options)
    batch, out = measured(trainer)
    (ours_P,) = shaped_gradients(trainer.port, batch, [torch.ones_like(batch.factor_BT)])
    assert torch.cosine_similarity(ours_P, of_trl(trainer, out), dim=0) > 1 - 1e-5


def test_gradients_are_linear_in_the_weights_and_taken_of_what_is_trained(policy, tmp_path):  # noqa: F811
    trainer = made(policy, tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in trainer.port.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # at 0, lora_A has no gradient
    batch, out = measured(trainer)
    one_BT, other_BT = torch.rand(2, *batch.factor_BT.shape)
    given = [one_BT, other_BT, one_BT - 2 * other_BT, torch.zeros_like(one_BT), torch.ones_like(one_BT)]
    one_P, other_P, both_P, none_P, equal_P = shaped_gradients(trainer.port, batch, given)
    torch.testing.assert_close(both_P, one_P - 2 * other_P, rtol=1e-3, atol=1e-6)
    assert not none_P.any()
    assert torch.cosine_similarity(equal_P, of_trl(trainer, out), dim=0) > 1 - 1e-5
    assert len(one_P) == sum(p.numel() for p in trainer.port.policy.parameters() if p.requires_grad)


def test_a_rank_whose_rollouts_have_no_advantage_adds_nothing(policy, tmp_path):  # noqa: F811
    trainer = made(policy, tmp_path)
    batch, _ = measured(trainer)
    silent = replace(batch, factor_BT=torch.zeros_like(batch.factor_BT))
    assert not silent.speaks
    assert not shaped_gradients(trainer.port, silent, [torch.ones_like(batch.factor_BT)]).any()


def test_signals_are_those_of_the_policy_on_its_rollouts(policy, tmp_path):  # noqa: F811
    from rlattn.attention import rhythm_signals

    trainer = made(policy, tmp_path)
    batch, out = measured(trainer)
    ids, masks = (torch.cat([out[f"prompt_{what}"], out[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
    response = torch.cat([torch.zeros_like(out["prompt_mask"]), out["completion_mask"]], dim=1)
    expected = rhythm_signals(trainer.port.policy, ids, masks, response, entropy=True, options=ATTENTION)
    for name in ("waad_BN", "fai_BN", "entropy_BN"):
        torch.testing.assert_close(
            getattr(batch.signals, name), getattr(expected, name), equal_nan=True, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])], ids=["whole", "lora"])
def test_the_tokens_products_are_those_of_their_own_gradients_and_leave_the_policy_as_it_was(
    policy,  # noqa: F811
    tmp_path,
    adapter,
):
    trainer = made(policy, tmp_path, peft_config=adapter)
    batch, _ = measured(trainer)
    before = [parameter.clone() for parameter in trainer.port.policy.parameters()]
    batch.factor_BT[0] = 0  # no advantage
    places = batch.factor_BT.nonzero()[::37]
    alone = torch.zeros(len(places), *batch.factor_BT.shape)
    for number, (row, token) in enumerate(places):
        alone[number, row, token] = 1 / batch.factor_BT[row, token]
    gradients_RP = -shaped_gradients(trainer.port, batch, list(alone))
    direction_P = gradients_RP.sum(dim=0) + 0.1 * gradients_RP.norm() * torch.randn_like(gradients_RP[0]) / 300
    product_BT = token_products(trainer.port, batch, direction_P)
    expected = gradients_RP @ direction_P
    assert len(places) > 3
    torch.testing.assert_close(product_BT[*places.T], expected, rtol=0.02, atol=2e-3 * expected.abs().max().item())
    assert not product_BT[0].any()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.port.policy.parameters(), strict=True))


def first_token_reward(completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]


def test_the_oracle_pays_the_token_that_decides_and_no_other(policy, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("test_shaped_gradients.length_reward", first_token_reward)
    monkeypatch.setattr("test_shaped_gradients.parity_reward", first_token_reward)
    trainer = made(policy, tmp_path)
    batch, _ = measured(trainer)
    groups = list(groups_with_signal(batch, 4))
    assert groups and all(batch.factor_BT[group].any() for group in groups)
    factor_2BT = oracle_factors(trainer.port, batch, groups[0])
    assert not factor_2BT[:, :, 1:].any()  # whatever follows, the reward is settled
    others = [row for row in range(len(batch.factor_BT)) if row not in groups[0]]
    assert not factor_2BT[:, others].any()
    reward_G, first_2G = batch.reward_B[groups[0]], factor_2BT[:, groups[0], 0]
    right_G = reward_G == reward_G.max()
    assert (first_2G[:, right_G] >= 0).all() and (first_2G[:, ~right_G] <= 0).all() and first_2G.any()
    # a whole step from the worse to the better is what equal credit gives every token of a rollout
    step = batch.factor_BT[groups[0], 0][right_G].max() - batch.factor_BT[groups[0], 0][~right_G].min()
    assert first_2G.abs().max() <= step * 1.001
