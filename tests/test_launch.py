"""Ranks that `rlattn train --ranks N` starts: real processes, real signals."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import SMALL, rlattn

from rlattn.errors import UserError
from rlattn.processes import launch
from rlattn.recipe.load import load_recipe
from rlattn.run_folder.jsonl import read_rows

STOPPING = """
import atexit, json, os, time
if os.environ.get("RANK") == "1":
    atexit.register(lambda: open("left", "w").write(",".join(json.load(open("run/summary.json")))))
class Stopping:
    def prepare(self, batch):
        number = int(os.environ.get("STOP", "0"))
        if number and batch.step == 1 and os.environ["RANK"] == "0":
            os.kill(os.getppid(), number)
            time.sleep(4)  # the parent looks ten times a second, its ranks look for it once
        return [None] * len(batch.rollouts)
    def score(self, rollout): return float(len(rollout.completion_ids) % 2)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ranks_whose_parent_is_told_to_stop_or_killed_save_and_the_same_command_goes_on(
    number, code, tmp_path, monkeypatch
):
    (tmp_path / "stopping.py").write_text(STOPPING)
    command = (
        "train", "quickstart", *SMALL, "output_dir=run", "trainer.save_steps=50",
        "rewards={accuracy: {}, stopping: {python: 'stopping:Stopping'}}", "trainer.per_device_train_batch_size=4",
        "policy.warm_start={steps: 2, batch_size: 4}", "task.eval_rows=2", "trainer.max_completion_length=24",
        "policy.supervised_control=true",
    )  # fmt: skip
    monkeypatch.setenv("STOP", str(int(number)))
    # until all have closed their output: the ranks too
    stopped = rlattn(*command, "--ranks", "2", cwd=tmp_path)
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stdout.count("stopped by SIGTERM after step 2, saved in") == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    if number == signal.SIGKILL:
        return  # what it has left is the same
    monkeypatch.delenv("STOP")
    again = rlattn(*command, cwd=tmp_path, ranks=2)
    assert again.returncode == 0, again.stderr
    assert "supervised_control" in (tmp_path / "left").read_text()  # rank 1 stayed until rank 0 was through
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "run/environment.json").read_text())["world_size"] == 2


def test_a_mistake_is_said_before_any_rank_starts(tmp_path):
    result = rlattn("train", "quickstart", *SMALL, "--ranks", "3", "trainer.num_generations=5", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("rlattn: trainer.num_generations")) == (2, 1)


def test_ranks_are_the_launchers_where_there_is_one(monkeypatch):
    assert [launch.ranks_to_start(ranks) for ranks in (None, 1, 4)] == [0, 0, 4]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [launch.ranks_to_start(ranks) for ranks in (None, 4)] == [0, 0]
    with pytest.raises(UserError, match="--ranks: 2, but a launcher such as torchrun has started 4"):
        launch.ranks_to_start(2)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="2, but this machine shows 1 GPU"):
        launch.launch(["quickstart"], ranks=2, grace_seconds=1, on_gpus=True)


def processes(*programs: str) -> list[subprocess.Popen]:
    """Python programs that have said they are ready."""
    started = [subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) for text in programs]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    return started


FAILING = "print('ready', flush=True); import sys; sys.exit(3)"
STUCK = "import time; print('ready', flush=True); time.sleep(600)"
SAVING = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('ready', flush=True); time.sleep(600)"
)


@pytest.fixture
def started():
    ranks: list[subprocess.Popen] = []
    yield ranks
    for process in ranks:
        process.kill()
        process.wait()


def test_a_failing_rank_is_named_and_the_others_are_not_waited_for(started, monkeypatch, capsys):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    started += processes(STUCK, FAILING)
    assert launch.watch(started, [], grace_seconds=600) == 3
    assert "rank 1 failed first, with exit code 3" in capsys.readouterr().err


def test_a_rank_that_a_signal_killed_gives_the_shells_exit_code(started, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    started += processes(STUCK, STUCK)
    started[0].send_signal(signal.SIGKILL)
    assert launch.watch(started, [], grace_seconds=600) == 137


def test_ctrl_c_stops_the_ranks_and_a_second_one_does_not_wait_for_them(started, capsys):
    started += processes(SAVING, SAVING)
    assert launch.watch(started, [signal.SIGINT], grace_seconds=600) == 143
    assert "Ctrl-C again ends them at once" in capsys.readouterr().err
    started += processes(STUCK)
    assert launch.watch(started[-1:], [signal.SIGINT, signal.SIGINT], grace_seconds=600) == 130


def test_a_stopped_rank_leaves_the_others_the_grace_time(started):
    started += processes(SAVING, STUCK)
    started[0].send_signal(signal.SIGTERM)
    assert launch.watch(started, [], grace_seconds=0.2) == 143


def test_accelerates_strategy_becomes_the_recipes(monkeypatch):
    assert launch.strategy_of_accelerate() == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        launch.strategy_of_accelerate()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launch.strategy_of_accelerate() == ["trainer.deepspeed=null", "trainer.fsdp=true"]
    assert load_recipe("math_4b", launch.strategy_of_accelerate()).trainer["fsdp"] is True
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(UserError, match="deepspeed_config_file"):
        launch.strategy_of_accelerate()
