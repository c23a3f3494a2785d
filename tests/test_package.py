"""The wheel: everything it needs is inside, and what must be quick imports nothing heavy."""

import os
import subprocess
import sys
import zipfile

import pytest
import typer
from conftest import REPO, SMALL, command_without, without
from typer.testing import CliRunner

from rlattn.cli import app


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPO)], check=True
    )
    wheel = next(folder.glob("*.whl"))
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    return wheel, site


def run(site, cwd, *arguments):
    command = [sys.executable, "-m", "rlattn.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{site}:{os.environ['PYTHONPATH']}"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_ships_recipes_launch_files_and_data(installed):
    wheel, _ = installed
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = (
        "recipes/quickstart.yaml",
        "launch/deepspeed/zero3.json",
        "launch/slurm.sbatch",
        "data/word_problems.jsonl",
    )
    for name in shipped:
        assert f"rlattn/shipped/{name}" in names
    assert {f"rlattn/report/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert not any(name.startswith(("tests/", "data/", "recipes/")) for name in names)


def test_it_runs_from_an_empty_folder(installed, tmp_path):
    _, site = installed
    where = run(site, tmp_path, "recipes")
    assert "quickstart" in where.stdout
    data = (
        "task={kind: dataset, path: data/chat_sample.jsonl, eval_rows: 2}",
        "rewards={accuracy: {}}",
        "policy={path: Qwen/Qwen3-0.6B}",
    )
    checked = run(site, tmp_path, "check", "recipes/quickstart.yaml", *data)
    assert checked.returncode == 0, checked.stderr
    assert run(site, tmp_path, "check", "math_4b", "--ranks", "8").returncode == 0
    trained = run(site, tmp_path, "train", "recipes/quickstart.yaml", *SMALL, "trainer.max_steps=1")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs/quickstart/model/model.safetensors").is_file()


def test_every_command_has_help():
    def paths(group, before=()):
        yield before
        for name, command in getattr(group, "commands", {}).items():
            yield from paths(command, (*before, name))

    found = list(paths(typer.main.get_command(app)))
    assert ("bench", "credit") in found and ("schema",) in found
    for path in found:
        result = CliRunner().invoke(app, [*path, "--help"])
        assert result.exit_code == 0, path
        told = result.stdout.split("Usage: ")[1].splitlines()[1:]
        assert len(" ".join(told).split()) > 8, path  # what it does, and its options


@pytest.mark.parametrize("command", [["--help"], ["check", "quickstart"], ["recipes"]], ids=" ".join)
def test_what_must_be_quick_imports_neither_torch_nor_trl(command, tmp_path):
    command_without({"torch", "trl", "transformers", "datasets", "matplotlib"}, *command, cwd=tmp_path)


def test_pure_modules_need_torch_and_nothing_else(tmp_path):
    code = (
        "import rlattn.credit.advantages, rlattn.rewards, rlattn.types\n"
        "import rlattn.attention.metrics, rlattn.attention.heads, rlattn.inspection.rhythm_stats, rlattn.credit"
    )
    without({"trl", "transformers", "datasets", "accelerate"}, code, cwd=tmp_path)
