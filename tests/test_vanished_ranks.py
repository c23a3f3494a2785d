"""Two real processes that watch each other, one of which is stopped: a machine that has lost power looks the same."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import PrefixStore, TCPStore

RANK = """
import sys, time
from rlattn.processes import watchdog
from rlattn.processes.phases import Phases
watchdog.POLL_SECONDS, watchdog.SILENT_POLLS, watchdog.PATIENCE, watchdog.ABSENT_POLLS = 0.1, 10, 0.5, 10
phases = Phases()
phases.enter(sys.argv[1])
with watchdog.Watchdog(phases, stall_seconds=1000):
    time.sleep(600)
"""


@pytest.fixture
def ranks():
    """Starts both in a phase; gives them back with what they tell each other once they have begun to."""
    started = []

    def start(phase):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        found = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        for rank in "01":
            command = [sys.executable, "-c", RANK, phase]
            environment = {**os.environ, **found, "RANK": rank}
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        words = PrefixStore("rlattn-0", store)
        wait_for(lambda: words.check(["rank-0", "rank-1"]))
        return started, words

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_falls_silent_ends_the_others_and_is_named(gone, ranks):
    started, _ = ranks("reward")
    started[gone].send_signal(signal.SIGSTOP)
    other = started[1 - gone]
    assert other.wait(60) == 1
    assert f"rank {gone} on {os.uname().nodename} has not been heard of for 1 s, in reward" in other.stderr.read()


def test_nobody_is_missed_while_a_checkpoint_is_written(ranks):
    started, words = ranks("checkpoint")
    started[1].send_signal(signal.SIGSTOP)

    def polls():
        return json.loads(words.get("rank-0"))[2]

    enough = polls() + 30  # three times as many as silence takes
    wait_for(lambda: polls() >= enough)
    assert started[0].poll() is None


def test_ranks_that_have_not_come_are_named():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    command = [sys.executable, "-c", RANK, "setup"]
    with subprocess.Popen(command, env={**os.environ, **found}, stdout=subprocess.PIPE, text=True) as alone:
        assert "waiting for rank 1, 2 of 3, not heard of in 1 s" in alone.stdout.readline()
        alone.kill()


@pytest.mark.parametrize("code", ["0", "7"])
def test_code_of_the_users_that_ends_the_process_is_no_end_of_the_run(code, tmp_path):
    ends = f"""
import sys
from rlattn import cli, training
def ending(recipe, watchdog):
    sys.exit({code})
training._train = ending
cli.main(["train", "quickstart", "output_dir={tmp_path}/run"])
"""
    result = subprocess.run([sys.executable, "-c", ends], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and f"ended the process: SystemExit: {code}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_process_that_was_stopped_for_a_while_has_not_stalled():
    watching = """
import os, signal, subprocess, sys, time
from rlattn.processes import watchdog
from rlattn.processes.phases import Phases
watchdog.POLL_SECONDS = 0.1
phases = Phases()
phases.enter("generation")
with watchdog.Watchdog(phases, stall_seconds=1.0):
    wake = f"sleep 3; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", wake])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
print("went on", flush=True)
with watchdog.Watchdog(phases, stall_seconds=1.0):
    phases.enter("generation")
    time.sleep(30)
"""
    result = subprocess.run([sys.executable, "-c", watching], capture_output=True, text=True, timeout=120)
    assert result.stdout == "went on\n" and result.returncode == 1
    assert "generation does not end" in result.stderr
