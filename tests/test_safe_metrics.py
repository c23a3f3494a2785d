"""A task's own methods may fail: the run goes on, and the cause is told once."""

import json
import math
from random import Random

import pytest
from conftest import SMALL, rlattn

from rlattn.errors import UserError
from rlattn.grpo.held_out import Completion, score_greedy, summarise
from rlattn.policy.tiny import tiny_policy
from rlattn.report.alarms import find_alarms
from rlattn.tasks import Arithmetic
from rlattn.tasks.guarded_metrics import safe_metrics
from rlattn.types import WarmStart


class Failing(Arithmetic):
    def metrics(self, completion, row):
        if "odd" in completion:
            raise ZeroDivisionError("float division by zero")
        return {"length": len(completion)}


class NoVerdict(Arithmetic):
    def verify(self, completion, row):
        if "odd" in completion:
            raise ValueError("no such answer")
        return math.nan if "nan" in completion else float(completion == "right")

    def gold(self, row):
        raise KeyError("gold")


class Tokenizer:
    def apply_chat_template(self, *_, **__):
        return ""


def outcomes_of(task, *texts, samples=0):
    examples = [{"prompt": row["prompt"], "row": row} for row in task.rows("eval")]
    said = iter(texts)
    return score_greedy(
        lambda part: [Completion(text=next(said), ids=[1], tokens=1) for _ in part],
        Tokenizer(), task, examples, calls=2, batch_size=2, filler=examples[0], template_kwargs={}, samples=samples,
    )  # fmt: skip


def test_an_evaluation_leaves_out_what_fails_and_keeps_the_rest(caplog):
    outcomes, _ = outcomes_of(Failing(eval_rows=4), "even", "odd", "even", "odd")
    assert [outcome.measured for outcome in outcomes] == [{"length": 4}, None, {"length": 4}, None]
    assert caplog.text.count("ZeroDivisionError: float division by zero") == 1
    found = summarise(outcomes).metrics()
    assert found["eval_length"] == 4 and found["eval_metrics_failed"] == 2
    (alarm,) = find_alarms([{"step": 0, "eval/metrics_failed": 2.0}])
    assert "metrics() failed on 2 held-out completions" in alarm.found


def test_completions_that_the_verifier_fails_on_are_left_out_counted_and_told(caplog):
    outcomes, kept = outcomes_of(NoVerdict(eval_rows=4), "right", "odd", "nan", "wrong", samples=4)
    assert [outcome.right for outcome in outcomes] == [1, None, None, 0]
    assert [(sample["score"], sample["gold"]) for sample in kept] == [(1, None), (None, None), (None, None), (0, None)]
    assert caplog.text.count("the task's verify() is left out where it fails: ValueError: no such answer") == 1
    found = summarise(outcomes)
    assert (found.accuracy, found.rows, found.failed) == (0.5, 2, 2) and "verify() failed on 2 more" in str(found)
    assert found.metrics()["eval_failed"] == 2
    (alarm,) = find_alarms([{"step": 0, "eval/failed": 2.0}])
    assert "verify() failed on 2 held-out completions" in alarm.found
    nothing = summarise(outcomes[1:3])
    assert "eval_accuracy" not in nothing.metrics() and str(nothing) == "unknown; verify() failed on 2 more"
    whole = summarise(outcomes[:1])
    assert "eval_failed" not in whole.metrics() and "verify" not in str(whole)


class Breaking(Arithmetic):
    """Fails on whatever is no gold answer, and on half of its traces."""

    def verify(self, completion, row):
        return 1.0 if completion == self.gold(row) else 1 / 0

    def trace(self, row, rng, noise):
        if sum(row["prompt"].encode()) % 2:
            raise LookupError("no trace")
        return super().trace(row, Random(0), noise)


def test_a_trace_that_fails_is_left_out_of_the_warm_start(caplog, tmp_path):
    small = WarmStart(steps=2, batch_size=8)
    tiny_policy(Breaking(eval_rows=4), warm_start=small, cache_dir=tmp_path)
    assert "the task's trace() is left out where it fails: LookupError: no trace" in caplog.text

    class Never(Breaking):
        def trace(self, row, rng, noise):
            raise LookupError("no trace")

    with pytest.raises(UserError, match=r"task: its trace\(\) fails on every row of a batch .* LookupError: no trace"):
        tiny_policy(Never(eval_rows=4), warm_start=small, cache_dir=tmp_path)


def test_a_verifier_that_fails_on_all_that_a_policy_writes_ends_no_run(tmp_path):
    (tmp_path / "own.py").write_text(
        "from rlattn.tasks import Arithmetic\n"
        "class Breaking(Arithmetic):\n"
        "    def verify(self, completion, row):\n"
        "        return 1.0 if completion == self.gold(row) else 1 / 0\n"
    )
    task = "task={python: 'own:Breaking', terms: [3, 3], eval_rows: 4}"
    done = rlattn("train", "quickstart", *SMALL, task, "rewards={format: {}}", "output_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "the task's verify() is left out where it fails: ZeroDivisionError: division by zero (own.py, line 4)"
        in done.stderr
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["eval/failed"] for row in rows if "eval/rows" in row] == [4] * 3 and "eval/accuracy" not in rows[-1]
    assert json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])["score"] is None
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.parametrize("given", [None, 5, ["length"], {"length": "long"}, {"length": None}])
def test_what_is_no_mapping_to_numbers_is_left_out(given, caplog):
    assert safe_metrics(lambda completion, row: given)("text", {}) is None
    assert "metrics() is left out" in caplog.text
