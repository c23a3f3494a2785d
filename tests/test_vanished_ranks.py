"""Two real processes that watch each other, one of which is stopped: a machine that has lost power looks the same."""

import json
import os
import signal
import subprocess
import time

import pytest
from forked import PYTHON
from torch.distributed import PrefixStore, TCPStore

RANK = """
import os, sys, time
from rlattn.processes import watchdog
from rlattn.processes.phases import Phases
print(os.getpid(), flush=True)
watchdog.POLL_SECONDS, watchdog.SILENT_POLLS, watchdog.PATIENCE, watchdog.ABSENT_POLLS = 0.1, 10, 0.5, 10
phases = Phases()
phases.enter(sys.argv[1])
with watchdog.Watchdog(phases, stall_seconds=1000):
    time.sleep(600)
"""


JOINING = """
import os, torch
from rlattn.processes.process_group import renew_store
renew_store()
print("joining", flush=True)
torch.distributed.init_process_group("gloo")
torch.distributed.all_reduce(torch.ones(1))
print("joined", flush=True)
os._exit(0)
"""


@pytest.fixture
def start():
    """Starts a program as a rank of two, with torchrun's store."""
    started = []

    def start(store, rank, *program, restarts=0):
        found = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": str(rank)}
        found |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        command, pipes = [*PYTHON, "-c", *program], dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, env={**os.environ, **found}, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def launcher():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def ranks(start, launcher):
    """Starts both in a phase; gives them back with their process ids, and what they tell each other once they do."""

    def both(phase):
        started = [start(launcher, rank, RANK, phase) for rank in (0, 1)]
        words = PrefixStore("rlattn-0", launcher)
        wait_for(lambda: words.check(["rank-0", "rank-1"]))
        return started, [int(process.stdout.readline()) for process in started], words

    return both


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_falls_silent_ends_the_others_and_is_named(gone, ranks):
    started, pids, _ = ranks("reward")
    os.kill(pids[gone], signal.SIGSTOP)
    other = started[1 - gone]
    assert other.wait(60) == 1
    assert f"rank {gone} on {os.uname().nodename} has not been heard of for 1 s, in reward" in other.stderr.read()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_of_its_machine_at_once_and_is_named(gone, ranks):
    started, pids, _ = ranks("setup")  # where silence alone is no reason
    os.kill(pids[gone], signal.SIGKILL)
    other = started[1 - gone]
    assert other.wait(60) == 1
    assert f"rank {gone} is gone: its process, {pids[gone]} on " in other.stderr.read()


def test_ranks_end_where_torchrun_has_started_others_anew(ranks, start, launcher):
    started, _, _ = ranks("setup")
    start(launcher, 0, RANK, "setup", restarts=1)
    assert [process.wait(60) for process in started] == [1, 1]
    assert all("torchrun starts the ranks of another machine anew" in process.stderr.read() for process in started)


def test_ranks_that_are_started_anew_meet_each_other_and_not_those_before_them(start, launcher):
    for restarts in range(2):  # in the second start rank 0 comes long before rank 1, and finds the first one's address
        first = start(launcher, 0, JOINING, restarts=restarts)
        assert first.stdout.readline() == "joining\n"
        time.sleep(restarts)
        second = start(launcher, 1, JOINING, restarts=restarts)
        assert [process.wait(60) for process in (first, second)] == [0, 0]


def test_nobody_is_missed_while_a_checkpoint_is_written(ranks):
    started, pids, words = ranks("checkpoint")
    os.kill(pids[1], signal.SIGSTOP)

    def polls():
        return json.loads(words.get("rank-0"))[2]

    enough = polls() + 30  # three times as many as silence takes
    wait_for(lambda: polls() >= enough)
    assert started[0].poll() is None


def test_ranks_that_have_not_come_are_named():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    command = [*PYTHON, "-c", RANK, "setup"]
    with subprocess.Popen(command, env={**os.environ, **found}, stdout=subprocess.PIPE, text=True) as alone:
        assert alone.stdout.readline().strip().isdecimal()
        assert "waiting for rank 1, 2 of 3, not heard of in 1 s" in alone.stdout.readline()
        alone.kill()


@pytest.mark.parametrize("code", ["0", "7"])
def test_code_of_the_users_that_ends_the_process_is_no_end_of_the_run(code, tmp_path):
    ends = f"""
import sys
from rlattn import cli
from rlattn.run import run
def ending(recipe, found, watchdog):
    sys.exit({code})
run._train = ending
cli.main(["train", "quickstart", "output_dir={tmp_path}/run"])
"""
    result = subprocess.run([*PYTHON, "-c", ends], capture_output=True, text=True, timeout=120)
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
    result = subprocess.run([*PYTHON, "-c", watching], capture_output=True, text=True, timeout=120)
    assert result.stdout == "went on\n" and result.returncode == 1
    assert "generation does not end" in result.stderr
