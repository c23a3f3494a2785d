from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlattn.tasks.arithmetic import Arithmetic

TASK = Arithmetic(train_rows=300, eval_rows=60)
ROW = TASK.rows("eval")[0]


@pytest.mark.parametrize("task", [TASK, Arithmetic(terms=(2, 8), largest=19, train_rows=300, eval_rows=60)])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_gold_and_noiseless_traces_are_right(task, split):
    rng = Random(0)
    for row in task.rows(split):
        assert task.verify(task.gold(row), row) == 1.0
        assert task.verify(task.trace(row, rng, 0.0), row) == 1.0


def test_rows_are_as_promised():
    for row in TASK.rows("train"):
        totals = [sum(row["terms"][: i + 1]) for i in range(len(row["terms"]))]
        assert 4 <= len(row["terms"]) <= 6
        assert all(0 <= total <= 999 for total in totals) and totals[-1] == row["answer"]
        assert all(10 <= abs(term) <= 99 for term in row["terms"])


def test_splits_are_disjoint_and_eval_does_not_depend_on_train_rows():
    train, evaluation = ({row["prompt"] for row in TASK.rows(split)} for split in ("train", "eval"))
    assert len(train) == 300 and len(evaluation) == 60 and not train & evaluation
    assert TASK.rows("eval") == Arithmetic(train_rows=10, eval_rows=60).rows("eval")
    assert TASK.rows("eval") != Arithmetic(train_rows=300, eval_rows=60, data_seed=1).rows("eval")


def test_noise_forgets_the_carries_and_keeps_totals_in_range():
    rng = Random(0)
    rows = TASK.rows("train")
    traces = [TASK.trace(row, rng, 1.0) for row in rows]
    for trace, row in zip(traces, rows, strict=True):
        needed = any(f"{word} 1" in TASK.gold(row) for word in ("carry", "borrow"))
        assert needed or TASK.verify(trace, row) == 1.0  # without a carry there is none to forget
    assert sum(TASK.verify(trace, row) for trace, row in zip(traces, rows, strict=True)) < 0.5 * len(rows)
    numbers = [int(word) for trace in traces for word in trace.split() if word.lstrip("-").isdigit()]
    assert min(numbers) >= 0 and max(numbers) <= 999


@pytest.mark.parametrize(
    "template", ["<answer> {} </answer>", "<answer>\n{}</answer> bye", "<answer>1</answer> <answer>{}</answer>"]
)
def test_last_answer_counts(template):
    assert TASK.verify(template.format(ROW["answer"]), ROW) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "{}",
        "<answer> {}",
        "</answer> {} <answer>",
        "<answer> {} apples </answer>",
        "<think> so <answer> {} </answer>",
        "<answer> {}.0 </answer>",
        "<answer> {} {} </answer>",
        "<answer> {} </answer> <answer> no </answer>",
        "<answer> " + "9" * 10_000 + " </answer>",
        "<answer> ٧٣ </answer>",
        "<answer>" * 100_000,
        "<answer> </answer>" * 100_000,
    ],
)
def test_nonsense_scores_zero(completion):
    assert TASK.verify(completion.replace("{}", str(ROW["answer"])), ROW) == 0.0


@given(st.text() | st.text().map(lambda text: f"<answer>{text}</answer>"))
def test_verify_never_raises(text):
    assert TASK.verify(text, ROW) in (0.0, 1.0)


@pytest.mark.parametrize(
    "options",
    [{"terms": (1, 4)}, {"terms": (5, 4)}, {"terms": (4, 9)}, {"largest": 100}, {"largest": 18}, {"train_rows": 0},
     {"checks": (3, 1)}, {"checks": (0, 21)},
     {"terms": (2, 2), "train_rows": 100_000}],
)  # fmt: skip
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        Arithmetic(**options)


def test_checks_make_traces_longer_and_more_often_right_and_none_is_the_default():
    shares, lengths = [], []
    for most in (0, 4, 16):
        task = Arithmetic(train_rows=300, eval_rows=60, checks=(most, most))
        rng, rows = Random(0), task.rows("train")
        traces = [task.trace(row, rng, 0.7) for row in rows]
        assert all(trace.count("check") == most for trace in traces)
        assert all(task.verify(task.gold(row), row) == 1 for row in rows)
        shares.append(sum(task.verify(trace, row) for trace, row in zip(traces, rows)) / len(rows))
        lengths.append(sum(len(trace.split()) for trace in traces) / len(rows))
    assert shares[0] < shares[1] < shares[2]
    assert lengths[1] - lengths[0] == pytest.approx(4 * 13)
    assert TASK.trace(ROW, Random(1), 0.7) == Arithmetic(checks=(0, 0)).trace(ROW, Random(1), 0.7)
    drawn = {Arithmetic(checks=(1, 3)).trace(ROW, rng, 0.0).count("check") for _ in range(50)}
    assert drawn == {1, 2, 3}
