"""SIGTERM and SIGUSR1: save, stop, go on; real processes and real signals."""

import signal

import pytest
from conftest import SMALL, rlattn
from test_resume import untimed

from rlattn.processes.process_group import stale_locks
from rlattn.processes.signals import SIGNALS, StopSignals
from rlattn.run_folder.jsonl import read_rows

SIGNALLED = """
import os, signal, time
class Signalled:
    def prepare(self, batch):
        number, rank = os.environ.get("SIGNAL"), os.environ.get("RANK", "0")
        if number and batch.step == 1 and rank == os.environ.get("TO_RANK", "0"):
            for _ in range(int(os.environ.get("TIMES", "1"))):
                os.kill(os.getpid(), int(number))
                time.sleep(0.1)
            time.sleep(float(os.environ.get("THEN_SLEEP", "0")))
        return [None] * len(batch.rollouts)
    def score(self, rollout): return float(len(rollout.completion_ids) % 2)
"""
RECIPE = (*SMALL, "rewards={accuracy: {}, signalled: {python: 'signalled:Signalled'}}", "trainer.save_steps=50")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    return tmp_path


def test_sigterm_saves_and_stops_and_the_same_command_gives_the_unbroken_run(folder, monkeypatch):
    assert rlattn("train", "quickstart", *RECIPE, "output_dir=whole", cwd=folder).returncode == 0
    monkeypatch.setenv("SIGNAL", "15")
    result = rlattn("train", "quickstart", *RECIPE, "output_dir=run", cwd=folder)
    assert result.returncode == 143, result.stderr
    assert "stopped by SIGTERM after step 2, saved in" in result.stdout
    assert not (folder / "run/model").exists()
    monkeypatch.delenv("SIGNAL")
    again = rlattn("train", "quickstart", *RECIPE, "output_dir=run", cwd=folder)
    assert again.returncode == 0, again.stderr
    rows = [untimed(read_rows(folder / run / "metrics.jsonl")) for run in ("whole", "run")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("times", "said"),
    [("1", "stopped by SIGINT after step 2, saved in"), ("2", "interrupted; the same command starts over")],
)
def test_ctrl_c_saves_and_stops_and_a_second_one_does_not_wait(folder, monkeypatch, times, said):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so on
    monkeypatch.setenv("SIGNAL", "2")
    monkeypatch.setenv("TIMES", times)
    try:
        result = rlattn("train", "quickstart", *RECIPE, "output_dir=run", cwd=folder)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.returncode == 130, result.stderr
    assert said in result.stdout and "Ctrl-C again ends it at once" in result.stderr


def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(folder, monkeypatch):
    monkeypatch.setenv("SIGNAL", "10")
    monkeypatch.setenv("TO_RANK", "1")
    batch = "trainer.per_device_train_batch_size=4"
    result = rlattn("train", "quickstart", *RECIPE, batch, "output_dir=run", cwd=folder, ranks=2)
    assert result.returncode != 0
    assert result.stdout.count("stopped by SIGUSR1 after step 2") == 1
    assert "exitcode  : 138" in result.stderr
    assert [path.name for path in (folder / "run/checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_step_that_does_not_end_is_left_after_the_grace_time(folder, monkeypatch):
    monkeypatch.setenv("SIGNAL", "15")
    monkeypatch.setenv("THEN_SLEEP", "250")
    result = rlattn("train", "quickstart", *RECIPE, "resume.grace_seconds=1", "output_dir=run", cwd=folder, timeout=240)
    assert result.returncode == 143
    assert "resume.grace_seconds = 1; the same command goes on" in result.stderr


def test_what_listens_for_signals_leaves_the_process_as_it_was():
    def own(number, frame):
        pass

    before = {number: signal.signal(number, own) for number in SIGNALS}
    try:
        stop = StopSignals(grace_seconds=1)
        stop.listen()
        assert all(signal.getsignal(number) != own for number in SIGNALS)
        stop.leave()
        assert all(signal.getsignal(number) == own for number in SIGNALS)
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_lock_that_a_killed_compiler_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert stale_locks() == []
    (tmp_path / "py311_cpu/deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "py311_cpu/deepspeed_shm_comm/lock").touch()
    assert stale_locks() == [tmp_path / "py311_cpu/deepspeed_shm_comm/lock"]
