"""No file of rlattn's holds `NaN` or `Infinity`, and files that hold them are read all the same."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO
from test_report import run_folder

from rlattn.formats.strict_json import to_json
from rlattn.grpo.port import Port
from rlattn.grpo.reward_function import RewardFunction
from rlattn.grpo.reward_hooks import RewardHooks
from rlattn.processes.phases import Phases
from rlattn.recipe.load import load_recipe
from rlattn.report import read_run, write_report
from rlattn.run_folder.folder import start_run
from rlattn.run_folder.jsonl import append_row
from rlattn.tasks import Arithmetic
from rlattn.tasks.rows import storable

NAN, INF = float("nan"), float("inf")


def strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def test_null_at_every_depth():
    value = {"a": [NAN, (INF, {"b": -INF})], 1: NAN, "c": np.float64("nan"), "d": [1.5, True, None, "NaN"]}
    assert strict(to_json(value)) == {
        "a": [None, [None, {"b": None}]], "1": None, "c": None, "d": [1.5, True, None, "NaN"],
    }  # fmt: skip
    assert np.isnan(value["c"])  # the value itself stays


def test_every_file_is_written_by_to_json():
    written = re.compile(r"write\w*\([^\n]*json\.dump")
    sources = (REPO / "rlattn").rglob("*.py")
    assert [file.name for file in sources if written.search(file.read_text())] == []


def test_rows_of_a_log_and_those_that_an_older_version_wrote(tmp_path):
    recipe = load_recipe("quickstart", [f"output_dir={tmp_path}"])
    start_run(recipe, 0, 1)
    append_row(tmp_path / "heads.jsonl", {"step": 1, "span": [[NAN, 2.0]]})
    with (tmp_path / "heads.jsonl").open("a") as lines:
        lines.write('{"step": 2, "span": [[NaN, 2.0]]}\n')
    start_run(recipe, 2, 1)
    rows = [strict(line) for line in (tmp_path / "heads.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "span": [[None, 2.0]]} for step in (1, 2)]


def test_a_report_shows_heads_that_no_rollout_defines(tmp_path):
    run = run_folder(tmp_path)
    with (run / "heads.jsonl").open("a") as lines:
        lines.write('{"step": 3, "layers": [1], "span": [[NaN, 7.0]], "local": [[0, 0]], "global": [[0, 1]]}\n')
    assert [step["span"] for step in read_run(run)["heads"]["steps"]] == [[[2, 9]], [[None, 7]]]
    embedded = re.search(r'type="application/json"[^>]*>(.*?)</script>', write_report(run).read_text(), re.DOTALL)
    assert strict(embedded[1])["heads"]["steps"][1]["span"] == [[None, 7]]


def test_a_row_keeps_its_columns():
    row = {"prompt": "1 + 1", "weights": [1.0, NAN], "array": np.array([INF, 2]), "image": object()}
    assert storable(row) == {"prompt": "1 + 1", "weights": [1.0, None], "array": [None, 2.0]}


class Holds:
    def __init__(self, state):
        self.state = state

    def score(self, rollout):
        return 0.0

    def state_dict(self):
        return self.state


def test_a_rewards_state_that_is_not_finite_is_told(tmp_path: Path, caplog):
    rewards = {"sound": Holds({"best": 1.0}), "odd": Holds({"best": [-INF]})}
    functions = [RewardFunction(name, reward, Arithmetic(), None, {}) for name, reward in rewards.items()]
    trainer = SimpleNamespace(reward_func_names=[*rewards], reward_funcs=functions)
    RewardHooks(Port(trainer, Phases())).save(tmp_path)
    assert strict((tmp_path / "rewards.json").read_text()) == {"sound": {"best": 1.0}, "odd": {"best": [None]}}
    assert "'odd'" in caplog.text and "not finite" in caplog.text and "'sound'" not in caplog.text
