"""Rewards on texts, and what happens to those that fail."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlattn.rewards import REWARDS
from rlattn.rewards.brevity import Brevity
from rlattn.rewards.format import Format
from rlattn.rewards.protocol import score_safely
from rlattn.tasks import Arithmetic
from rlattn.types import Rollout

TASK = Arithmetic(train_rows=4, eval_rows=2)
ROW = TASK.rows("eval")[0]


def rollout(completion: str, prompt_text: str = "What is 1 + 1 ?") -> Rollout:
    return Rollout(prompt=prompt_text, prompt_text=prompt_text, completion=completion, row=ROW, task=TASK)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think> a </think> <answer> 2 </answer>", 1),
        ("  <think>a</think>\n\n<answer>2</answer>\n", 1),
        ("<think> a </think> <answer> </answer>", 0),
        ("<think></think> <answer> 2 </answer>", 0),
        ("<answer> 2 </answer> <think> a </think>", 0),
        ("so <think> a </think> <answer> 2 </answer>", 0),
        ("<think> a </think> so <answer> 2 </answer>", 0),
        ("<think> a </think> <answer> 2 </answer> done", 0),
        ("<think> a </think> <answer> 2 </answer> <answer> 3 </answer>", 0),
        ("<think> a <answer> 1 </answer> </think> <answer> 2 </answer>", 0),
        ("<think> a <think> b </think> <answer> 2 </answer>", 0),
        ("<think> a <answer> 2 </answer>", 0),
        ("", 0),
    ],
)
def test_format(completion, score):
    assert Format().score(rollout(completion)) == score


def test_a_tag_that_the_prompt_opened_counts():
    text = "a </think> <answer> 2 </answer>"
    assert Format().score(rollout(text)) == 0
    assert Format().score(rollout(text, "What is 1 + 1 ?\n<think>\n")) == 1
    assert Format().score(rollout(f"<think> {text}", "What is 1 + 1 ?\n<think>\n")) == 0


def test_trailing_text_only_where_it_is_allowed():
    text = r"<think> a </think> The answer is \boxed{2}."
    assert Format(tags=("think",)).score(rollout(text)) == 0
    assert Format(tags=("think",), trailing_text=True).score(rollout(text)) == 1


@given(st.text())
def test_format_never_raises(text):
    assert Format().score(rollout(text)) in (0, 1)


def test_brevity_falls_in_a_line_to_the_budget():
    def points(tokens):
        return Brevity(budget=40, points=10).score(replace(rollout("a"), completion_ids=tuple(range(tokens))))

    assert [points(tokens) for tokens in (1, 20, 30, 40, 100)] == [9.75, 5, 2.5, 0, 0]
    assert Brevity().score(rollout("stored text")) is None


def test_accuracy_is_the_tasks_verifier():
    accuracy = REWARDS["accuracy"]()
    assert accuracy.score(rollout(TASK.gold(ROW))) == 1
    assert accuracy.score(rollout("<answer> 99999 </answer>")) == 0


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (None, ""),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("x", "ValueError"),
        (ZeroDivisionError("/"), "ZeroDivisionError"),
        (SystemExit(0), "SystemExit"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_a_failing_reward_is_neutral_and_says_why(returned, problem):
    class Failing:
        def score(self, rollout):
            if isinstance(returned, BaseException):
                raise returned
            return returned

    value, why = score_safely(Failing(), rollout("x"))
    assert value is None
    assert problem in why
