"""The live table: a real run on a pseudo-terminal, and the sparkline."""

import os
import pty
import re
import subprocess

import pytest
from forked import PYTHON

from rlattn.progress import visible
from rlattn.run.live_table import sparkline

SMALL = (
    "policy={path: tiny-reasoner, warm_start: {steps: 20, batch_size: 8}}",
    "task={kind: arithmetic, terms: [2, 2], eval_rows: 4, train_rows: 8}",
    "trainer={max_steps: 3, num_generations: 4, per_device_train_batch_size: 8, max_completion_length: 24,"
    " learning_rate: 1e-3, gradient_checkpointing: false, save_strategy: 'no', per_device_eval_batch_size: 8}",
)


def test_a_run_on_a_terminal_shows_numbers_their_course_and_the_last_completion(tmp_path):
    ours, theirs = pty.openpty()
    command = [*PYTHON, "-m", "rlattn.cli", "train", "quickstart", *SMALL, "output_dir=run"]
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        shown += part
    output, _ = process.communicate(timeout=60)
    text = shown.decode(errors="replace")
    assert process.returncode == 0, text[-3000:]
    assert "train 3/3" in text and "held-out accuracy" in text and "reward" in text
    last = text[text.rindex("seconds a step") :].splitlines()[1]
    assert len(re.findall(r"\w+|[+<>]", last)) > 3, last  # what a policy of 20 steps writes: tags and numbers
    assert b"held-out accuracy after" in output


@pytest.mark.parametrize(
    ("values", "line"),
    [([0, 1], "▁█"), ([1, 1, 1], "▁▁▁"), ([0, 7], "▁█"), ([0.0, float("nan"), 7.0], "▁ █"), ([], "")],
)
def test_sparkline(values, line):
    assert sparkline(values) == line


def test_a_long_course_fits_its_width():
    assert len(sparkline([float(i) for i in range(5000)], width=40)) == 40


def test_escape_sequences_of_a_completion_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\nc\u202e") == "a·[2Jb␊c·"
