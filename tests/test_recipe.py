"""Recipes: numbers are numbers, text is text, paths resolve, and the resolved recipe is the recipe."""

import re
from importlib.util import find_spec

import pytest

from rlattn.errors import UserError
from rlattn.files import find_recipe, shipped_dir
from rlattn.preflight.check import check
from rlattn.recipe.build import build_credit, build_rewards, build_task
from rlattn.recipe.constraints import check_installed
from rlattn.recipe.grpo_fields import load_fields
from rlattn.recipe.load import differences, load_recipe
from rlattn.types import CreditOptions

SHIPPED = sorted(shipped_dir("recipes").glob("*.yaml"))

BASE = """
name: mine
policy: {path: tiny-reasoner}
task: {kind: arithmetic}
rewards: {accuracy: }
trainer: {max_steps: 10}
"""


def write(folder, text=BASE):
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_recipe_passes_check(file):
    gpus = re.search(r"on (\d+) GPUs of (\d+) GB", file.read_text())
    ranks, memory = map(int, gpus.groups()) if gpus else (1, 3)
    lines = check(load_recipe(file), ranks=ranks, gpu_memory=memory)
    assert any(line.startswith("policy") for line in lines)
    assert re.match(r"# \S.{20,}", file.read_text()), "the first line of a recipe says what it is"


def test_yaml_1_2_numbers_and_text(tmp_path):
    recipe = load_recipe(
        write(tmp_path, BASE.replace("mine", "no")), ["trainer.learning_rate=1e-6", "trainer.beta=0", "seed=7"]
    )
    assert recipe.name == "no"
    assert recipe.trainer["learning_rate"] == 1e-6
    assert recipe.trainer["beta"] == 0
    assert recipe.seed == 7


def test_logging_every_step_unless_set(tmp_path):
    assert load_recipe(write(tmp_path)).trainer["logging_steps"] == 1
    assert load_recipe(write(tmp_path), ["trainer.logging_steps=5"]).trainer["logging_steps"] == 5


def test_the_resolved_recipe_is_the_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path), ["rewards.format={weight: 0.5, tags: [think]}", "policy.system_prompt=no"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_reach_any_depth_and_make_sections(tmp_path):
    recipe = load_recipe(write(tmp_path), ["policy.lora.r=8", "tracking.report_to=[tensorboard]"])
    assert recipe.policy.lora.r == 8
    assert recipe.tracking.report_to == ("tensorboard",)


def test_local_paths_resolve_beside_the_recipe_then_shipped(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 3)
    file = write(tmp_path / "sub", BASE.replace("kind: arithmetic", "kind: dataset, path: rows.jsonl, eval_rows: 1"))
    monkeypatch.chdir(tmp_path)
    assert load_recipe(file).task.options["path"] == str(tmp_path / "sub" / "rows.jsonl")
    shipped = load_recipe(file, ["task.path=data/word_problems.jsonl"]).task.options["path"]
    assert shipped == str(shipped_dir("data") / "word_problems.jsonl")


def test_shipped_recipes_go_by_name():
    assert find_recipe("quickstart") == find_recipe("recipes/quickstart.yaml")


def test_two_rewards_of_one_kind_side_by_side(tmp_path):
    recipe = load_recipe(
        write(tmp_path), ["rewards.tags={kind: format, weight: 0.1}", "rewards.thought={kind: format, tags: [think]}"]
    )
    rewards = build_rewards(recipe)
    assert rewards["tags"].tags == ("think", "answer")
    assert rewards["thought"].tags == ("think",)


def test_a_reward_and_a_task_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_plugins.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Brevity:\n"
        "    words: int = 5\n"
        "    def score(self, rollout): return float(len(rollout.completion.split()) <= self.words)\n"
        "class Echo:\n"
        "    def rows(self, split): return [{'prompt': f'{split} a'}]\n"
        "    def verify(self, completion, row): return 1.0\n"
        "    def gold(self, row): return 'a'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe(
        write(tmp_path), ["rewards.short={python: my_plugins:Brevity, words: 3}", "task={python: my_plugins:Echo}"]
    )
    assert build_rewards(recipe)["short"].words == 3
    assert build_task(recipe).gold({}) == "a"
    with pytest.raises(UserError, match=r"rewards.short.wrds: unknown option of Brevity. Did you mean 'words'\?"):
        build_rewards(load_recipe(tmp_path / "mine.yaml", ["rewards.short={python: my_plugins:Brevity, wrds: 3}"]))


def test_differences_leave_out_where_and_how_a_run_is_shown(tmp_path):
    one = load_recipe(write(tmp_path))
    two = load_recipe(write(tmp_path), ["output_dir=elsewhere", "tracking.project=x", "trainer.max_steps=20", "seed=1"])
    assert differences(one, two) == {"seed": (0, 1), "trainer.max_steps": (10, 20)}


def test_a_credit_rule_and_what_it_reads(tmp_path):
    credit = "credit={kind: coupled_rhythm, amplification: 2, sign: positive, warmup: 0.1}"
    recipe = load_recipe(write(tmp_path), [credit, "attention={layers: [1], horizon: [2, 20]}"])
    rule = build_credit(recipe)
    assert (rule.amplification, rule.lookback) == (2, 3)
    assert recipe.credit.applied == CreditOptions(sign="positive", warmup=0.1)
    assert recipe.attention.horizon == (2, 20)
    assert build_credit(load_recipe(write(tmp_path))) is None


def test_a_package_is_missed_before_a_model_loads_wherever_transformers_would_miss_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    for name in load_fields()["optim"].choices or ():
        arguments.optim = name
        problem = ""
        try:
            Trainer.get_optimizer_cls_and_kwargs(arguments)
        except (ImportError, ValueError) as error:
            problem = str(error)
        recipe = load_recipe("quickstart", [f"trainer.optim={name}", "trainer.optim_target_modules=all-linear"])
        if re.search("install|import", problem):
            with pytest.raises(UserError, match=rf"trainer\.optim: {name} needs .* pip install"):
                check_installed(recipe)
        else:
            check_installed(recipe)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("trainer.use_liger_kernel=true", "liger-kernel"),
        ("policy.attn_implementation=flash_attention_2", "flash-attn"),
        ("policy.attn_implementation=flash_attention_3", "flash-attn-3"),
    ],
)
def test_a_kernel_package_that_is_not_installed_is_named(key, told):
    modules = {"liger-kernel": "liger_kernel", "flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}
    if find_spec(modules[told]):
        pytest.skip(f"{told} is installed here")
    with pytest.raises(UserError, match=rf"{key.split('=')[0]}: {told} is not installed\. Run: pip install {told}"):
        check_installed(load_recipe("quickstart", [key]))
