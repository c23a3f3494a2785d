"""The shipped table of GRPOConfig fields: a contract with the installed TRL, and the checks made from it."""

import json

import pytest
from conftest import without

from rlattn.recipe.grpo_fields import TABLE, generate_fields, load_fields, validate


def test_the_shipped_table_is_the_one_of_the_installed_trl():
    shipped, installed = json.loads(TABLE.read_text()), json.loads(json.dumps(generate_fields()))
    names = sorted(shipped.keys() | installed.keys())
    changed = [f"{n}: {shipped.get(n)} -> {installed.get(n)}" for n in names if shipped.get(n) != installed.get(n)]
    assert not changed, "\n".join(["run `python -m rlattn.recipe.grpo_fields`; TRL changed", *changed])


def test_grpo_config_takes_every_default_and_so_does_the_table(tmp_path):
    from trl import GRPOConfig

    needed = {"output_dir": str(tmp_path), "use_cpu": True}  # bf16, on by default, asks for a GPU or use_cpu
    defaults = {name: field.default for name, field in load_fields().items()}
    GRPOConfig(**{**defaults, **needed})
    for name, field in load_fields().items():
        GRPOConfig(**{**needed, name: needed.get(name, field.default)})
        if field.init:
            assert validate(name, field.default) == field.default


@pytest.mark.parametrize(
    "name", ["loss_type", "lr_scheduler_type", "optim", "scale_rewards", "vllm_importance_sampling_mode"]
)
def test_every_choice_is_one_trl_takes(name: str, tmp_path):
    from trl import GRPOConfig

    choices = load_fields()[name].choices
    assert choices
    for choice in choices:
        evaluated = {"eval_strategy": "steps"} if choice in ("reduce_lr_on_plateau", "greedy") else {}
        config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: choice}, **evaluated)
        assert getattr(config, name) == choice


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1e-6), ("learning_rate", 1), ("max_steps", -1), ("max_steps", 40), ("bf16", False),
        ("bf16", None), ("scale_rewards", True), ("scale_rewards", "batch"), ("eval_strategy", "no"),
        ("model_init_kwargs", {"dtype": "bfloat16"}), ("lr_scheduler_kwargs", None), ("pad_to_multiple_of", 8),
        ("label_names", ["a"]), ("save_steps", 0.25), ("report_to", "none"), ("top_p", 1), ("optim", "adamw_torch"),
    ],
)  # fmt: skip
def test_good_values_come_back_unchanged(name: str, value: object):
    assert validate(name, value) is value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "fast", "expected a number, got text 'fast'"),
        ("learning_rate", "1e-6", "expected a number, got text '1e-6'. Write 1e-6 without quotes."),
        ("learning_rate", True, "expected a number, got true"),
        ("learning_rate", 0, "expected a number above 0, got 0"),
        ("learning_rate", float("nan"), "expected a finite number, got nan"),
        ("learning_rate", None, "expected a number, got nothing (null)"),
        ("num_generations", 8.0, "expected a whole number, got 8.0. Write 8."),
        ("num_generations", True, "expected a whole number, got true"),
        ("num_generations", 1, "expected at least 2, got 1"),
        ("max_steps", 0, "expected at least 1, or -1 to train for num_train_epochs; got 0"),
        ("top_p", 1.5, "expected at most 1, got 1.5"),
        ("top_p", 0, "expected a number above 0, got 0"),
        ("beta", -0.1, "expected at least 0, got -0.1"),
        ("save_steps", 2.5, "expected a whole number of steps, or a share of all steps below 1; got 2.5"),
        ("bf16", "true", "expected true or false, got text 'true'. Write true without quotes."),
        ("bf16", 1, "expected true or false, got 1"),
        ("importance_sampling_level", "tokn", "expected one of 'token', 'sequence'; got 'tokn'. Did you mean 'token'?"),
        ("importance_sampling_level", 3, "expected one of 'token', 'sequence', got 3"),
        ("scale_rewards", "std", "expected one of 'group', 'batch', 'none'; got 'std'"),
        ("eval_strategy", False, "expected one of 'no', 'steps', 'epoch', got false. "
                                 'Write "no" in quotes: a bare no is YAML for false.'),
        ("reward_weights", [1.0, "2"], 'expected a list of numbers, got a list ([1.0, "2"])'),
        ("generation_kwargs", [1], "expected a mapping or text, got a list ([1])"),
        ("parallelism_config", {}, "takes a Python object and cannot be set from a recipe"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_the_reason(name: str, value: object, message: str):
    with pytest.raises(ValueError) as error:
        validate(name, value)
    assert str(error.value) == message


def test_validation_imports_neither_torch_nor_trl_nor_transformers():
    code = "import rlattn.preflight.memory; from rlattn.recipe.grpo_fields import validate; validate('beta', 0.1)"
    without({"torch", "trl", "transformers"}, code)
