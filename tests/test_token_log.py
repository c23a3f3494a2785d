"""The token files: what the loss really used, for a few sampled rollouts, without touching training."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from conftest import torchrun
from test_trl_contract import policy, trained  # noqa: F401
from trl import GRPOTrainer

from rlattn import AttentionGRPOTrainer
from rlattn.credit import CREDIT_RULES
from rlattn.grpo.token_log import FRACTION, SCHEMA, TokenLog, _fraction, token_texts
from rlattn.run_folder.folder import token_files
from rlattn.types import AttentionOptions, CreditOptions

BOTH_PLACES = {"in the training forward": {}, "in the rollouts' pass": {"num_iterations": 2, "max_steps": 4}}


def logged(folder, rule="coupled_rhythm", every=2, rollouts=4, **arguments):
    """A trainer class that keeps tokens, and every advantage table that its loss read."""

    class Logged(AttentionGRPOTrainer):
        def __init__(self, *args, **kwargs):
            credit = {"credit": rule and CREDIT_RULES[rule](), "attention": AttentionOptions(horizon=(2, 8))}
            log = TokenLog(folder, rollouts=rollouts, every=every, seed=0)
            super().__init__(*args, **kwargs, **credit, **arguments, token_log=log)

    return Logged


@pytest.mark.parametrize("mode", BOTH_PLACES)
@pytest.mark.parametrize("rule", ["coupled_rhythm", None])
def test_the_files_hold_what_was_trained(policy, tmp_path, mode, rule):  # noqa: F811
    trained(logged(tmp_path, rule), policy, tmp_path / "out", **BOTH_PLACES[mode])
    last = BOTH_PLACES[mode].get("max_steps", 3)
    assert [step for step, _ in token_files(tmp_path)] == sorted({1, 2, last})
    table = pq.read_table(token_files(tmp_path)[0][1]).to_pandas()
    assert set(SCHEMA.names) < set(table.columns)
    assert {"reward/length_reward", "reward/parity_reward"} < set(table.columns)
    assert table.rollout.nunique() == 4
    assert (table.group == table.rollout // 4).all()
    for _, rollout in table.groupby("rollout"):
        assert rollout.position.tolist() == list(range(len(rollout)))
        assert rollout.prompt.notna().tolist() == [True] + [False] * (len(rollout) - 1)
        assert rollout.reward.iloc[0] == pytest.approx(len(rollout) / 32 + rollout.token_id.sum() % 2)
    assert (table.logprob < 0).all() and (table.entropy > 0).all()
    if rule:
        assert set(table.weight.unique()) >= {1.0, 1.5}
        assert table.anchor.mean() > 0.3 and table.preplan.mean() > 0.3
        assert table[~table.anchor & ~table.preplan].weight.max() == 1
        heads = [json.loads(line) for line in (tmp_path / "heads.jsonl").read_text().splitlines()]
        assert [row["step"] for row in heads] == [step for step, _ in token_files(tmp_path)]
        assert len(heads[0]["span"]) == len(heads[0]["layers"])
    else:
        assert (table.weight == 1).all()
        assert table.waad.isna().all() and table.anchor.isna().all()
        assert not (tmp_path / "heads.jsonl").exists()


def test_rollouts_of_all_generations_of_a_step_have_numbers_of_their_own(policy, tmp_path):  # noqa: F811
    several = {"gradient_accumulation_steps": 3, "steps_per_generation": 1, "max_steps": 1}
    trained(logged(tmp_path, rollouts=24), policy, tmp_path / "out", **several)
    table = pq.read_table(token_files(tmp_path)[0][1]).to_pandas()
    assert table.rollout.nunique() == 24 == (table.position == 0).sum()
    groups = table.groupby("group")
    assert groups.prompt.first().nunique() == 6 and groups.rollout.nunique().eq(4).all()


# micro-batches of 4 rollouts a step and a generation, iterations: rollouts a step, generation batches in steps 1 and 2
SHAPES = {
    (1, 2, 1): (4, 1, 1),
    (2, 2, 1): (8, 1, 1),
    (2, 4, 1): (8, 1, 1),
    (4, 2, 1): (16, 2, 2),
    (2, 3, 1): (8, 1, 2),  # the second step begins with the rest of the first generation batch
    (2, 1, 2): (4, 1, 1),  # both iterations lie in one step, and each rollout is logged once
    (2, 2, 2): (8, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompts_rollouts_are_one_group_whatever_a_step_holds(policy, tmp_path, shape):  # noqa: F811
    accumulated, per_generation, iterations = shape
    trained(
        logged(tmp_path, None, every=1, rollouts=99), policy, tmp_path / "out", max_steps=2, loss_type="grpo",
        per_device_train_batch_size=4, gradient_accumulation_steps=accumulated, steps_per_generation=per_generation,
        num_iterations=iterations,
    )  # fmt: skip
    count, *generations = SHAPES[shape]
    for (_, file), held in zip(token_files(tmp_path), generations, strict=True):
        starts = pq.read_table(file).to_pandas().query("position == 0")
        assert len(starts) == starts.rollout.nunique() == count
        assert (starts.rollout // (4 * per_generation)).nunique() == held
        assert starts.groupby("prompt").group.nunique().eq(1).all()
        assert starts.groupby("group").prompt.nunique().eq(1).all()


def test_an_epochs_last_step_of_fewer_micro_batches_keeps_as_many_rollouts(policy, tmp_path):  # noqa: F811
    odd = {"gradient_accumulation_steps": 3, "steps_per_generation": 1, "max_steps": 6}  # 16 micro-batches an epoch
    trained(logged(tmp_path, None, every=6, rollouts=8), policy, tmp_path / "out", **odd)
    _, file = token_files(tmp_path)[-1]
    assert pq.read_table(file).to_pandas().rollout.nunique() == 8


def test_weights_are_those_that_count(policy, tmp_path):  # noqa: F811
    options = CreditOptions(sign="positive")
    trained(logged(tmp_path, credit_options=options, rollouts=8), policy, tmp_path / "out", max_steps=1)
    table = pq.read_table(token_files(tmp_path)[0][1]).to_pandas()
    assert (table[table.advantage <= 0].weight == 1).all()
    assert table[table.advantage > 0].weight.max() > 1


@pytest.mark.parametrize("fraction", [None, (0.2, 0.4), -1, "many"])
def test_a_rule_of_ones_own_may_mean_something_else_by_top_fraction(fraction):
    class Own(CREDIT_RULES["uniform"]):
        top_fraction = fraction

    assert _fraction(Own()) == FRACTION
    assert _fraction(CREDIT_RULES["local_chunk"](top_fraction=0.25)) == 0.25


@pytest.mark.parametrize("rule", ["uniform", None])
def test_keeping_tokens_leaves_training_bit_for_bit_as_it_was(policy, tmp_path, rule):  # noqa: F811
    plain = trained(GRPOTrainer, policy, tmp_path / "a").model.state_dict()
    ours = trained(logged(tmp_path, rule, every=1), policy, tmp_path / "b").model.state_dict()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_a_character_of_several_tokens_goes_to_its_last_one():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode(errors="replace")

    text = "a→b" * 20
    texts = token_texts(Bytes(), list(text.encode()))
    assert "".join(texts) == text
    assert texts[:5] == ["a", "", "", "→", "b"]


TWO_RANKS = """
import sys
from pathlib import Path
import conftest, test_token_log, test_trl_contract as contract

folder = Path(sys.argv[2])
# with groups of 4, the second of every three straddles the ranks
contract.trained(test_token_log.logged(folder, rollouts=12), sys.argv[1], folder / "out", per_device_train_batch_size=6)
more = {"max_steps": 1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}  # one generation batch
contract.trained(test_token_log.logged(folder / "more", rollouts=24), sys.argv[1], folder / "out", **more)
conftest.leave_ranks()
"""


def test_two_ranks_write_one_file_a_step(policy, tmp_path):  # noqa: F811
    (tmp_path / "two.py").write_text(TWO_RANKS)
    (tmp_path / "more").mkdir()
    result = torchrun("two.py", str(policy), str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [step for step, _ in token_files(tmp_path)] == [1, 2, 3]
    table = pq.read_table(token_files(tmp_path)[0][1]).to_pandas()
    assert sorted(table.rollout.unique()) == list(range(12))
    assert table.groupby("group").prompt.nunique().tolist() == [1, 1, 1]
    assert len((tmp_path / "heads.jsonl").read_text().splitlines()) == 3
    more = pq.read_table(token_files(tmp_path / "more")[0][1]).to_pandas()
    assert sorted(more.rollout.unique()) == list(range(24))
    assert more.groupby("group").prompt.nunique().tolist() == [1] * 6
