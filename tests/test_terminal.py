"""A terminal that closes under a run: real terminals, real signals."""

import os
import pty
import select
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import SMALL
from forked import PYTHON

WAITING = """
import os, time
class Waiting:
    def prepare(self, batch):
        if batch.step == 1 and os.environ.get("RANK", "0") == "0":
            open("begun", "w").close()
            while not os.path.exists("closed"):
                time.sleep(0.1)
            time.sleep(2)  # the signal passes through a shell, or through the parent of the ranks
        return [None] * len(batch.rollouts)
    def score(self, rollout): return float(len(rollout.completion_ids) % 2)
"""
RECIPE = (
    *SMALL, "policy.warm_start={steps: 2, batch_size: 4}", "task.eval_rows=2", "trainer.max_completion_length=24",
    "trainer.per_device_train_batch_size=4", "trainer.save_steps=50", "output_dir=run",
    "rewards={accuracy: {}, waiting: {python: 'waiting:Waiting'}}",
)  # fmt: skip


def close_terminal_under(*command: str, cwd: Path) -> int:
    """The exit code of a command whose terminal closes in its second step."""
    (cwd / "waiting.py").write_text(WAITING)
    ours, its = pty.openpty()

    def heeds_hangups() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    process = subprocess.Popen(
        command, cwd=cwd, stdin=its, stdout=its, stderr=its, start_new_session=True, preexec_fn=heeds_hangups
    )
    os.close(its)
    shown = b""
    try:
        while not (cwd / "begun").exists():
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096)
            assert process.poll() is None, shown.decode()
        os.close(ours)
        (cwd / "closed").touch()
        return process.wait(240)
    finally:
        process.kill()


@pytest.mark.parametrize(("more", "code"), [([], 129), (["--ranks", "2"], 143)])
def test_a_closed_terminal_saves_and_stops(more, code, tmp_path):
    command = [*PYTHON, "-m", "rlattn.cli", "train", "quickstart", *RECIPE, *more]
    assert close_terminal_under(*command, cwd=tmp_path) == code
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]


def test_where_its_signal_is_ignored_a_closed_terminal_changes_nothing(tmp_path):
    command = [*PYTHON, "-m", "rlattn.cli", "train", "quickstart", *RECIPE]
    assert close_terminal_under("sh", "-c", "trap '' HUP; exec \"$@\"", "-", *command, cwd=tmp_path) == 0
    assert (tmp_path / "run/model").is_dir()
