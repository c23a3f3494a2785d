"""The GPU smoke run on a CPU: each part is one row, whatever happens in it. What it finds on a GPU needs a GPU."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import REPO
from forked import copies

from rlattn.bench.gpu import __main__ as command
from rlattn.bench.gpu.shared import Scale, Skipped, need


@pytest.fixture(autouse=True)
def _signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def smoke(tmp_path, *arguments, **environment):
    command = ["bash", str(REPO / "launch" / "gpu_smoke.sh"), *arguments]
    environment = {**os.environ, "VIRTUAL_ENV": str(copies()), **environment}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_parts_run_or_fail_one_by_one_and_attention_needs_no_trl(tmp_path):
    (tmp_path / "trl.py").write_text("raise RuntimeError('a broken TRL')\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    result = smoke(tmp_path, "--device", "cpu", "--small", "train", "capture", PYTHONPATH=path, VIRTUAL_ENV=sys.prefix)
    assert result.returncode == 1, result.stderr
    rows = {row["part"]: row for row in json.loads((tmp_path / "gpu_smoke.json").read_text())["parts"]}
    status = {part: row["status"] for part, row in rows.items()}
    assert status == {"train": "failed", "capture": "ok"}, rows
    assert "a broken TRL" in rows["train"]["detail"]
    assert all(part in result.stdout for part in rows)


def test_a_whole_step_on_rollouts_that_the_policy_wrote(tmp_path):
    result = smoke(tmp_path, "--device", "cpu", "--small", "written_step")
    (row,) = json.loads((tmp_path / "gpu_smoke.json").read_text())["parts"]
    assert (result.returncode, row["status"]) == (0, "ok"), row
    assert row["figures"].keys() == {"step", "generation", "metrics"} and "target <= 1%" in row["detail"]


def test_a_run_that_is_cut_short_keeps_the_parts_it_finished(tmp_path, monkeypatch):
    def run(name, scale):
        if name == "train":
            raise KeyboardInterrupt
        if name == "capture":  # the first of those side by side ends last
            while not out.exists():
                time.sleep(0.01)
        return {"status": "ok", "detail": "", "seconds": 1.0}

    monkeypatch.setattr(command, "_run", run)
    out = tmp_path / "gpu_smoke.json"
    monkeypatch.setattr(command, "_machine", lambda device: {"device": device})
    parts = ["capture", "flex", "capture", "bench", "train"]
    monkeypatch.setattr(sys, "argv", ["gpu_smoke", "--device=cuda", f"--out={out}", *parts])
    with pytest.raises(KeyboardInterrupt):
        command.main()
    assert [row["part"] for row in json.loads(out.read_text())["parts"]] == ["capture", "flex", "bench"]


@pytest.mark.parametrize(
    ("number", "part", "processes"),
    [(signal.SIGINT, "capture", 1), (signal.SIGHUP, "capture", 1), (signal.SIGTERM, "zero3", 2)],
)
def test_a_signal_ends_the_part_that_runs_and_its_workers(tmp_path, number, part, processes):
    command = [sys.executable, "-m", "rlattn.bench.gpu", "--device", "cpu", "--small", part]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as running:
        while len(parts := psutil.Process(running.pid).children(recursive=True)) < processes:
            time.sleep(0.05)
        running.send_signal(number)
        _, told = running.communicate(timeout=60)
    assert (running.returncode, "stopped" in told, "Traceback" in told) == (128 + number, True, False)
    assert gone(parts)


def gone(parts):
    _, left = psutil.wait_procs(parts, timeout=5)
    return all(one.status() == psutil.STATUS_ZOMBIE for one in left)  # where nobody reaps


def test_a_part_that_takes_too_long_is_ended_with_its_worker(monkeypatch):
    seen = []

    def end(pid):
        seen.extend(psutil.Process(pid).children(recursive=True))
        real(pid)

    real = command._end
    monkeypatch.setattr(command, "_end", end)
    monkeypatch.setitem(command.PARTS, "zero3", (*command.PARTS["zero3"][:2], 8))
    found = command._run("zero3", Scale(device="cpu", small=True))
    assert (found["status"], found["detail"]) == ("failed", "still running after 8 s")
    assert seen and gone(seen)


@pytest.mark.parametrize("out", [".", "nowhere/gpu_smoke.json"])
def test_where_it_cannot_write_it_says_so_before_anything_runs(tmp_path, monkeypatch, capsys, out):
    monkeypatch.setattr(sys, "argv", ["gpu_smoke", "--device=cpu", f"--out={tmp_path / out}", "capture"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and "--out" in capsys.readouterr().err


def test_a_missing_package_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(Skipped, match="trl"):
        need("json", "trl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    result = smoke(tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "no GPU" in result.stderr
