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
from rlattn import watchdog
from rlattn.phases import Phases
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
def test_a_process_that_somebodys_code_ends_has_failed(code):
    ends = RANK.replace("time.sleep(600)", f"with phases.phase('generation'): sys.exit({code})")
    result = subprocess.run([sys.executable, "-c", ends, "reward"], capture_output=True, text=True, timeout=120)
    assert result.returncode == (int(code) or 1)
    assert code != "0" or "rank 0 failed in generation: SystemExit: 0" in result.stderr
