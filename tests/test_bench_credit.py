"""`rlattn bench credit` on recipes, runs and checkpoints, as a user starts it."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, rlattn, torchrun
from test_trl_contract import policy  # noqa: F401

from rlattn.bench.credit import _check_memory, rules_of
from rlattn.bench.credit_oracle import check_whole_groups
from rlattn.bench.credit_subject import check_recipe, subject_of
from rlattn.credit import CREDIT_RULES
from rlattn.errors import UserError
from rlattn.recipe.load import load_recipe
from rlattn.report import read_run

OPTIONS = ("attention={horizon: [2, 10]}", "trainer.save_steps=2")
WRITTEN = ("--json", "found.json", "--figure", "found.png")
LORA = "policy.lora={r: 4}"


def measured(*arguments, cwd):
    result = rlattn("bench", "credit", *map(str, arguments), "--batches", "4", *WRITTEN, cwd=cwd)
    assert result.returncode == 0, result.stderr
    found = json.loads((cwd / "found.json").read_text())
    assert (cwd / "found.png").read_bytes().startswith(b"\x89PNG")
    assert set(found["rules"]) >= {*CREDIT_RULES, "permuted"} - {"uniform"}
    assert found["batches"] + found["silent_batches"] == 4 and -1 < found["uniform"] < 1
    for one in found["rules"].values():
        assert one["low"] <= one["difference"] <= one["high"] and one["alone"]["bias"] <= 1.0001
    assert found["rules"]["random"]["bias"] > found["rules"]["random"]["alone"]["bias"]
    for name in ("entropy", "FAI", "WAAD", "change of WAAD", "position"):
        fifths = found["carriers"][name]
        assert sum(one["share"] for one in fifths) == pytest.approx(1)
        assert sum(one["tokens"] for one in fifths) == pytest.approx(1)
    assert {one["signal"] for one in found["carriers"]["heads"]} == {"FAI", "WAAD"}
    assert "Who carries the gradient" in result.stdout
    assert "Fidelity of credit rules" in result.stdout and all(line in result.stdout for line in found["verdict"])
    return found


def test_a_recipe_and_a_checkpoint_of_an_adapter(tmp_path):
    lora = rlattn("train", "quickstart", *SMALL, *OPTIONS, LORA, "output_dir=run", cwd=tmp_path)
    assert lora.returncode == 0, lora.stderr
    rule = "credit={kind: local_chunk, top_fraction: 0.2}"
    recipe = measured("quickstart", *SMALL, *OPTIONS, LORA, rule, cwd=tmp_path)
    assert "local_chunk (recipe)" in recipe["rules"]
    assert recipe["oracle"] is None
    assert not (tmp_path / "runs").exists()  # of what was measured nothing is left
    checkpoint = measured("run/checkpoints/checkpoint-2", cwd=tmp_path)
    assert recipe["uniform"] != checkpoint["uniform"]  # another policy
    (kept,) = (tmp_path / "run/fidelity").iterdir()
    assert kept.name == "step-000002.json" and json.loads(kept.read_text()) == checkpoint
    (table,) = read_run(tmp_path / "run")["tables"]
    assert table["columns"] == ["rule", "step 2"] and table["rows"][0] == ["uniform", f"{checkpoint['uniform']:.3f}"]
    assert {row[0] for row in table["rows"]} == {"uniform", *checkpoint["rules"]}
    kept.write_text("{")
    assert "fidelity/step-000002.json cannot be read." in read_run(tmp_path / "run")["missing"]


def test_two_ranks_measure_together_with_an_oracle_and_tell_of_weights_that_training_refuses(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rlattn.types import Credit\n"
        "class Negative:\n"
        "    def __call__(self, signals): return Credit(weights_BN=signals.mask_BN * -1.0)\n"
    )
    rule = "credit={python: 'mine:Negative'}"
    options = ("--batches=3", "--json=two.json", "--oracle=3")
    short = ("trainer.max_completion_length=8", "trainer.num_generations=2")
    program = ("-m", "rlattn.cli", "bench", "credit", "quickstart", *SMALL, *OPTIONS, *short, rule, *options)
    result = torchrun(*program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Fidelity of credit rules, ") == 1
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["batches"] + found["silent_batches"] == 3
    assert found["oracle"]["groups"] == 3 and "Oracle: " in result.stdout
    refused = 16 * found["batches"]  # every rollout of both ranks
    assert f"mine:Negative: on {refused} rollouts its weights are negative or not finite" in result.stdout
    assert found["rules"]["mine:Negative"]["difference"] == pytest.approx(0, abs=1e-4)  # float32


def test_rewards_that_pay_all_alike_have_no_gradient_to_measure(tmp_path):
    (tmp_path / "alike.py").write_text("class Alike:\n    def score(self, rollout): return 1.0\n")
    rewards = "rewards={alike: {python: 'alike:Alike'}}"
    result = rlattn("bench", "credit", "quickstart", *SMALL, rewards, "--batches", "3", cwd=tmp_path)
    assert result.returncode == 2
    assert "3 of 3 batches hold no group whose rollouts were paid differently" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.deepspeed=launch/deepspeed/zero3.json"], "trainer.deepspeed=null"),
        (["trainer.fsdp=full_shard"], "trainer.fsdp=null"),
        (["trainer.importance_sampling_level=sequence", "credit=null"], "Use token"),
    ],
)
def test_what_has_no_gradient_a_token_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        check_recipe(load_recipe("quickstart", overrides))


def test_gradients_that_do_not_fit_are_told_with_their_size():
    port = SimpleNamespace(device=torch.device("cpu"), gather=lambda values: values)
    _check_memory(port, 32, 8, 1_000_000)
    with pytest.raises(UserError, match=r"32 batches and 8 rules keep 352000\.0 GB of gradients.*policy\.lora"):
        _check_memory(port, 32, 8, 10**12)


def test_groups_that_straddle_ranks_have_no_oracle():
    sizes = SimpleNamespace(per_device_train_batch_size=6, steps_per_generation=1)
    check_whole_groups(SimpleNamespace(args=sizes, group_size=3))
    with pytest.raises(UserError, match=r"a rank has 6 rollouts, no multiple of trainer\.num_generations=4"):
        check_whole_groups(SimpleNamespace(args=sizes, group_size=4))


def test_a_dialogue_has_no_oracle():
    recipe = load_recipe("questions_tiny", [])
    check_recipe(recipe)
    with pytest.raises(UserError, match="a dialogue cannot be gone on with from its middle"):
        check_recipe(recipe, oracle=8)


def test_a_model_outside_of_a_run_has_no_recipe(policy):  # noqa: F811
    with pytest.raises(UserError, match="lies in no run's folder"):
        subject_of(str(policy), [])


def test_the_recipes_rule_stands_beside_the_shipped_ones_where_it_is_another():
    shipped = rules_of(CREDIT_RULES["coupled_rhythm"](), "coupled_rhythm")
    assert list(shipped) == [name for name in CREDIT_RULES if name != "uniform"]
    assert list(rules_of(CREDIT_RULES["uniform"](), "uniform")) == list(shipped) == list(rules_of(None, ""))
    other = CREDIT_RULES["coupled_rhythm"](alpha=0.1)
    assert rules_of(other, "coupled_rhythm")["coupled_rhythm (recipe)"] == other
    own = object()
    assert rules_of(own, "mine:Rule")["mine:Rule"] is own
