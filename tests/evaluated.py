"""Run folders around tiny policies, made without training: what `rlattn eval` is given in its tests."""

import json
import shutil

import pytest

from rlattn.cli import main
from rlattn.policy.load import make_tiny_policy
from rlattn.recipe.build import build_task
from rlattn.recipe.load import load_recipe
from rlattn.run.build import taught_task


def make_run(folder, recipe, *overrides):
    """A run folder whose policy has only had its warm start."""
    parsed = load_recipe(recipe, [*overrides, f"output_dir={folder}"])
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text('{"rlattn": "0"}')
    (folder / "recipe.yaml").write_text(parsed.to_yaml())
    task = build_task(parsed)
    shutil.copytree(make_tiny_policy(parsed.policy, taught_task(parsed, task)), folder / "model")
    return folder


def evaluate(*arguments):
    """Runs the command; it must succeed."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, arguments)])
    assert ended.value.code == 0


def report_in(folder):
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


def answers_in(folder):
    lines = (folder / "eval-samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
