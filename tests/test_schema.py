"""The shipped JSON schema: as the code makes it, accepted by every recipe, and as strict about one key as `check`."""

import ast
import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from rlattn.errors import UserError
from rlattn.formats.yaml import override, parse_yaml
from rlattn.recipe.build import build_credit, build_rewards, build_task
from rlattn.recipe.json_schema import recipe_schema
from rlattn.recipe.load import load_recipe, parse_recipe
from rlattn.recipe.schema import (
    CreditSpec,
    Lora,
    Plugin,
    Policy,
    Recipe,
    Resume,
    Rewards,
    RewardSpec,
    TaskSpec,
    Tracking,
)
from rlattn.types import AttentionOptions, WarmStart

RECIPES = Path(__file__).parents[1] / "recipes"
SECTIONS = (Recipe, Policy, Lora, Plugin, TaskSpec, Rewards, RewardSpec, CreditSpec, Tracking, Resume)
SCHEMA = json.loads((RECIPES / "schema.json").read_text(encoding="utf-8"))


def test_the_command_prints_the_shipped_file_whatever_the_order_of_sets():
    command = [sys.executable, "-m", "rlattn.cli", "schema"]
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert printed == (RECIPES / "schema.json").read_text(encoding="utf-8")


def errors(data):
    return list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(data))


def quickstart():
    return parse_yaml((RECIPES / "quickstart.yaml").read_text(encoding="utf-8"), "quickstart")


def built(data):
    recipe = parse_recipe(copy.deepcopy(data))
    return build_task(recipe), build_rewards(recipe), build_credit(recipe)


def test_the_shipped_schema_is_what_rlattn_schema_prints():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(recipe_schema())) == SCHEMA


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_names_the_schema_and_fits_it_as_written_and_as_resolved(file):
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    assert errors(parse_yaml(text, file.name)) == []
    assert errors(load_recipe(file).model_dump(mode="json", exclude_none=True)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "sed=1",
        "policy.lora={rank: 8}",
        "task.numbers=[3, 4]",  # of countdown, and the kind is arithmetic
        "task.terms=many",
        "rewards.format={tag: [think]}",
        "rewards.mine={kind: brevity, budgets: 4}",
        "credit={kind: local_chunk, lookback: 3}",
        "attention={window: ten}",
        "trainer.learning_rat=1e-3",
        "trainer.loss_type=mine",
        "trainer.seed=3",
        "tracking={report_to: [mlflow]}",
        "resume={keep: 2}",
    ],
)
def test_what_check_refuses_of_one_key_the_schema_refuses_too(wrong):
    data = quickstart()
    override(data, wrong)
    assert errors(data) != []
    with pytest.raises(UserError):
        built(data)


@pytest.mark.parametrize(
    "right",
    [
        "rewards.mine={python: 'my:Reward', anything: 4}",
        "rewards.format={kind: brevity, budget: 4}",
        "rewards.format=null",
        "task={python: 'my:Task', deep: {er: 1}}",
        "credit={python: 'my:Rule', sign: positive, own: 1}",
        "trainer.learning_rate=1e-6",
    ],
)
def test_what_is_allowed_is_not_marked(right):
    data = quickstart()
    override(data, right)
    assert errors(data) == []


@pytest.mark.parametrize("section", [*SECTIONS, WarmStart, AttentionOptions], ids=lambda section: section.__name__)
def test_every_key_of_a_section_says_below_what_it_is(section):
    body = ast.parse(inspect.getsource(section)).body[0].body
    keys = [place for place, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    undocumented = [
        body[place].target.id
        for place in keys
        if not body[place].target.id.startswith("_")
        and not (isinstance(body[place + 1], ast.Expr) and isinstance(body[place + 1].value, ast.Constant))
    ]
    assert keys and undocumented == []
