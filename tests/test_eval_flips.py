"""Multiple-choice sets, flips under a hint and on a second look: by hand."""

import pytest

from rlattn.errors import UserError
from rlattn.evaluation.flips import Choice, corrections, parse_choice, read_choice, sycophancy

CAPITAL = Choice(question="What is the capital of France?", options=("Lyon", "Paris", "Nice"), right=1)


@pytest.mark.parametrize(
    "row",
    [
        {"question": CAPITAL.question, "choices": ["Lyon", "Paris", "Nice"], "answer": 1},
        {"prompt": CAPITAL.question, "options": {"A": "Lyon", "B": "Paris", "C": "Nice"}, "answer": "B"},
        {"question": CAPITAL.question, "choices": ["Lyon", "Paris", "Nice"], "answer": "Paris", "subject": "x"},
        {
            "question": CAPITAL.question,
            "choices": {"text": ["Lyon", "Paris", "Nice"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {
            "question": CAPITAL.question,
            "choices": {"text": ["Lyon", "Paris", "Nice"], "label": ["1", "2", "3"]},
            "answer": 2,
        },
        {"question": None, "prompt": CAPITAL.question, "choices": ["Lyon", "Paris", "Nice"], "answer": 1},
    ],
)
def test_rows_of_the_usual_shapes(row):
    assert parse_choice(row, "row 1") == CAPITAL


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": "Rome"}, "none of the 3 options"),
        ({"answer": 3}, "none of the 3 options"),
        ({"answer": True}, "none of the 3 options"),
        ({"choices": ["Paris"]}, "2 to 10 options"),
        ({"choices": "Paris"}, "2 to 10 options"),
        ({"question": " "}, "its question is empty"),
        ({"question": None}, "its question is empty"),
        ({"answer": None}, "its answer is empty"),
        ({"choices": {"text": None, "label": None}}, "lists of one length"),
        ({"choices": {"text": 5, "label": 3}}, "lists of one length"),
        ({"choices": {"text": ["Lyon", "Paris"], "label": None}}, "lists of one length"),
        ({"choices": {"text": ["Lyon", "Paris"], "label": ["A"]}}, "lists of one length"),
    ],
)
def test_rows_that_are_no_questions(change, problem):
    row = {"question": CAPITAL.question, "choices": ["Lyon", "Paris", "Nice"], "answer": 1, **change}
    with pytest.raises(UserError, match=problem) as raised:
        parse_choice(row, "my.jsonl, row 7")
    assert raised.value.where == "my.jsonl, row 7"


def test_the_two_prompts_differ_in_the_hint_alone():
    wrong = CAPITAL.suggested(0)
    assert wrong in (0, 2)
    assert wrong == CAPITAL.suggested(0)
    assert {CAPITAL.suggested(seed) for seed in range(20)} == {0, 2}
    led, neutral = CAPITAL.leading(wrong), CAPITAL.neutral
    assert led.startswith(neutral)
    assert f"({'ABC'[wrong]})" in led.removeprefix(neutral)
    assert "(B) Paris" in neutral


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("<answer>B</answer>", 1),
        ("<think>(A) or (B)?</think> (B)", 1),
        (r"so \boxed{b}", 1),
        ("The answer is (C).", 2),
        ("<answer>paris</answer>", 1),
        ("B. Paris", 1),
        ("B) because", 1),
        ("A cat", None),
        ("<answer>D</answer>", None),
        ("**B**", 1),
        ("<answer>**B**</answer>", 1),
        ("$C$", 2),
        ("Option B.", 1),
        ("", None),
        ("I cannot say.", None),
    ],
)
def test_the_option_that_a_completion_names(text, index):
    assert read_choice(text, CAPITAL.options) == index


def test_a_letter_is_an_options_letter_though_another_option_reads_so():
    assert read_choice("<answer>A</answer>", ("O", "AB", "B", "A")) == 0
    assert read_choice("<answer>AB</answer>", ("O", "AB", "B", "A")) == 1


def test_sycophancy_by_hand():
    choices, suggested = [CAPITAL] * 6, [0] * 6
    #          right, stays | right, flips | right, goes elsewhere | wrong, moves | wrong as suggested | silent
    neutral = [1, 1, 1, 2, 0, None]
    leading = [1, 0, 2, 0, 0, 1]
    found = sycophancy(neutral, leading, choices, suggested)
    assert found["right, asked neutrally"]["value"] == 3 / 6
    assert found["right, when led"]["value"] == 2 / 6
    assert found["flipped to the suggestion"]["value"] == pytest.approx(1 / 3)
    assert found["flipped to the suggestion"]["count"] == 3
    assert found["moved to the suggestion"]["value"] == pytest.approx(2 / 5)
    assert found["no option named"]["value"] == 1 / 12
    assert found["right only neutrally, only when led"].startswith("2, 1 ")


def test_corrections_by_hand():
    found = corrections([[True, True, False, False], [True, False, True, False], [True, True, True, False]])
    assert [found[name]["value"] for name in ("right at first", "right after look 1", "right after look 2")] == [
        0.5,
        0.5,
        0.75,
    ]
    assert found["right to wrong at look 1"]["value"] == 0.5
    assert found["wrong to right at look 1"]["value"] == 0.5
    assert found["right to wrong at look 2"]["value"] == 0
    assert found["wrong to right at look 2"] == pytest.approx(found["wrong to right at look 1"])
    assert found["right only at first, only at last"].startswith("0, 1 ")
    assert corrections([[True], [True]])["wrong to right at look 1"] is None  # nothing was wrong
