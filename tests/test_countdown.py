from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlattn.errors import UserError
from rlattn.tasks.countdown import Countdown

TASK = Countdown(train_rows=300, eval_rows=60)
ROW = {"numbers": [3, 3, 8], "target": 17, "solution": "3 * 3 + 8"}
THIRDS = {"numbers": [3, 3, 8, 8], "target": 24, "solution": "8 / ( 3 - 8 / 3 )"}


@pytest.mark.parametrize("task", [TASK, Countdown(numbers=(2, 6), largest_number=9, train_rows=300, eval_rows=60)])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_gold_and_noiseless_traces_are_right(task, split):
    rng = Random(0)
    for row in task.rows(split):
        assert 1 <= row["target"] <= task.largest_target and len(row["numbers"]) in task.numbers
        assert task.verify(task.gold(row), row) == 1.0
        assert task.verify(task.trace(row, rng, 0.0), row) == 1.0


def test_splits_are_disjoint_and_eval_does_not_depend_on_train_rows():
    train, evaluation = (
        {(*sorted(row["numbers"]), row["target"]) for row in TASK.rows(split)} for split in ("train", "eval")
    )
    assert len(train) == 300 and len(evaluation) == 60 and not train & evaluation
    assert TASK.rows("eval") == Countdown(train_rows=10, eval_rows=60).rows("eval")


def test_noise_makes_traces_wrong():
    rng = Random(0)
    rows = TASK.rows("train")
    right = {noise: sum(TASK.verify(TASK.trace(row, rng, noise), row) for row in rows) for noise in (0.1, 1.0)}
    assert right[1.0] < 0.4 * len(rows) < right[0.1]


@pytest.mark.parametrize(
    ("answer", "row"),
    [
        ("3 * 3 + 8", ROW),
        ("(3*3)+8", ROW),
        ("8 + 3 × 3 = 17", ROW),
        ("\n8 +\n(3 * 3)=17 ", ROW),
        ("8 / (3 - 8 / 3)", THIRDS),  # needs exact fractions
        ("8 ÷ (3 − 8 ÷ 3)", THIRDS),
        (r"3 \times 3 + 8", ROW),
        (r"8 \div (3 - 8 \div 3)", THIRDS),
    ],
)
def test_right_answers(answer, row):
    assert TASK.verify(f"<think> 1 + 1 </think> <answer>{answer}</answer>", row) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "17",
        "17 = 3 * 3 + 8",
        "3 * 3 + 8 = 18",
        "3 * 3 + 8 = 17 = 17",
        "3 + 8 + 6",  # not the numbers given
        "8 + 8 + 1",
        "3 * 3 + 8 + 0",
        "33 - 8",
        "-3 * -3 + 8",
        "+3 * 3 + 8",
        "3 ** 2 + 8",
        "3 * 3 // 1 + 8",
        "3.0 * 3 + 8",
        "3 * 3 + 0x8",
        "3 * 3 + 08",
        "3 * 3 + ８",
        "9 / (3 - 3) + 8",
        "3 * 3 + 8 or 17",
        "(3)(3) + 8",
        "(3 * 3 + 8",
        "3, 3, 8",
        "__import__('os').system('true')",
        "9" * 199,
        "9**9**9**9",
        "(" * 99 + "3 * 3 + 8" + ")" * 99,
        "(" * 90 + "1" + ")" * 90,
        "3" + "+3" * 90,
        "(" * 1_000_000,
    ],
)
def test_wrong_and_hostile_answers_score_zero(answer):
    assert TASK.verify(f"<answer>{answer}</answer>", ROW) == 0.0


@given(st.text() | st.text(alphabet="0123456789+-*/()= ×÷.", max_size=250))
def test_verify_never_raises(text):
    assert TASK.verify(text, ROW) in (0.0, 1.0)
    assert TASK.verify(f"<answer>{text}</answer>", ROW) in (0.0, 1.0)


@pytest.mark.parametrize(
    "options", [{"numbers": ()}, {"numbers": (1,)}, {"largest_number": 1000}, {"largest_target": 9}, {"eval_rows": 0}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=list(options)[0]):
        Countdown(**options)


def test_too_many_rows_are_refused():
    with pytest.raises(UserError, match="different problems"):
        Countdown(numbers=(2,), largest_number=4, largest_target=10, train_rows=500).rows("train")
