"""A task's own metrics may fail: the run goes on, and the cause is told once."""

import pytest

from rlattn.grpo.held_out import Completion, score_greedy
from rlattn.tasks import Arithmetic
from rlattn.tasks.guarded_metrics import SafeMetrics


class Failing(Arithmetic):
    def metrics(self, completion, row):
        if "odd" in completion:
            raise ZeroDivisionError("float division by zero")
        return {"length": len(completion)}


def test_an_evaluation_leaves_out_what_fails_and_keeps_the_rest(caplog):
    task = Failing(eval_rows=4)
    examples = [{"prompt": row["prompt"], "row": row} for row in task.rows("eval")]
    texts = iter(["even", "odd", "even", "odd"])
    outcomes, _ = score_greedy(
        lambda part: [Completion(text=next(texts), tokens=1) for _ in part],
        None, task, examples, calls=2, batch_size=2, filler=examples[0], template_kwargs={},
    )  # fmt: skip
    assert [outcome.measured for outcome in outcomes] == [{"length": 4}, {}, {"length": 4}, {}]
    assert caplog.text.count("ZeroDivisionError: float division by zero") == 1


@pytest.mark.parametrize("given", [None, 5, ["length"], {"length": "long"}, {"length": None}])
def test_what_is_no_mapping_to_numbers_is_left_out(given, caplog):
    assert SafeMetrics(lambda completion, row: given)("text", {}) == {}
    assert "metrics are left out" in caplog.text
