import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlattn.formats.final_answer import final_answer, gold_answer, same_answer

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{3} then \boxed{\frac{1}{2", "3"),
        (r"$\{1\}$ hence \boxed{\{1, 2\}}.", r"\{1, 2\}"),
        (r"\boxed{4} or \boxed{}", "4"),
        ("<answer> 7 </answer>", "7"),
        ("<answer>7</answer> <answer>8</answer>", "8"),
        ("<answer>7</answer> <answer>8", "7"),
        (r"<answer>The answer is \boxed{5}.</answer>", "5"),
        (r"\boxed{5} <answer>6</answer>", "6"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("2 + 3 = 5 #### 5", "5"),
        ("1,234 it is.\n#### 1,234", "1,234"),
        ("A: 18", "18"),
        ("A: 5\nQ: next?\nA: 6", "6"),
        ("Answer: 3.5.", "3.5"),
        ("**Final answer:** 18", "18"),
        ("Answer:\n18", "18"),
        ("The answer is 18. So we are done.", "18"),
        ("the final answer is: $18", "$18"),
        ("**The answer is 42.**", "42"),
        ("#### Step 1\nAdd.\nThe answer is 4.", "4"),
        (r"#### Step 1" + "\n" + r"\boxed{4}" + "\n#### Check", "4"),
        (r"<answer>4</answer>" + "\nThe answer is 5", "4"),
        (r"I guess \boxed{1}</think>A: 2", "2"),
        (r"<think>\boxed{1}</think>none", None),
        (r"<think>It is \boxed{1}, or <answer>2</answer>", None),  # a completion that was cut in its thought
        (r"<think>a</think>\boxed{1}<think>Or \boxed{2}", None),
        ("no mark, 18", None),
        ("A:", None),
        ("", None),
        ("####", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_gold_answer_takes_a_column_without_a_mark_whole():
    assert gold_answer(" 3 apples ") == "3 apples"
    assert gold_answer("48 + 24 = <<48+24=72>>72\n#### 72") == "72"


SAME = [
    ("1,000", "1000.0"), ("$1,234.50", "1234.5"), ("-$5", "$-5"), ("−5", "-5"), ("18.", "18"), ("**18**", "18"),
    (r"\$18", "18 dollars"), ("18", "18 dollars"), ("60 miles per hour", "60"),
    (r"5\text{ m}", "5"),
    (r"10,\!000", "10000"), (r"1{,}000", "1000"), (r"1\,000", "1000"), (r"5\text{ cm}^2", "5 cm^2"),
    ("50%", "50"), (r"50\%", "0.5"), ("18 percent", "18%"), ("0.333333", "1/3"), ("1e5", "100,000"),
    ("1 1/2", "1.5"), (r"1\frac{1}{2}", "3/2"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", "6/8"),
    ("x=5", "5"), ("$18$", "18"), (r"\text{(B)}", "b"), ("Paris", "paris."), ("2**3", "8"), ("x^10", "x^{10}"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), ("sin(x)", r"\sin x"), ("pi/2", r"\frac{\pi}{2}"),
    (r"\{1,2\}", r"\{2,1\}"), ("1,2", "2,1"), (r"90^\circ", "90"), (r"\left(1,2\right)", "(1,2)"),
    ("2^{2005}", r"4\cdot 2^{2003}"), (r"(-\infty,2]\cup[3,5)", r"(-\infty,2.0]\cup[3,5)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2.0\end{pmatrix}"), ("y=2x+3", "y-2x=3"),
]  # fmt: skip
DIFFERENT = [
    ("18 cents", "18 dollars"), ("18 million", "18"), ("18x", "18"), ("2x", "2"), ("18 n", "18"), ("19", "18"),
    ("18 or 19", "18"),
    ("siraP", "Paris"), ("no", "on"), ("3 4", "12"), ("1 000", "0"), ("1,5", "15"), ("x=4", "5"), ("-5", "5"),
    ("0.33", "1/3"), ("(1,2)", "(2,1)"), ("", ""), ("", "0"), ("$", "0"), ("18\n19", "18"), ("5!", "5"), ("2/0", "1/0"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_same(answer, gold):
    assert same_answer(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different(answer, gold):
    assert not same_answer(answer, gold)


HOSTILE = [
    "9^{9^{9}}", "9**9**9**9", "((9^{99})^{99})^{99}", "99999999!", "(9!)!", r"\binom{99999999}{9999999}",
    r"\Gamma(99999999)", r"9^\frac{1}{\frac{1}{99999999}}", r"\sqrt[\frac{1}{99999999}]{9}", "(x+y+z+w)^{99}",
    r"e^{e^{e^{99}}}", r"\int_0^1 \sin(x^x) dx", "(" * 120 + "1" + ")" * 120,
    "9" * 1999, "x" * 100_000, "1e99", "1/" * 100 + "1", "$" * 250, r"\frac{" * 40, "x\x00y", "٣", "²", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_wrong_and_ends(text):
    start = time.process_time()
    assert not same_answer(text, r"\frac{x}{7}")
    assert time.process_time() - start < 8


@pytest.mark.parametrize(
    "part",
    ["<answer>", r"\boxed{", "</answer>", "A: ", "\nA: ", "answer is ", "#### ", "{", "\n", "*", "answer:\n\n\n"],
)
def test_final_answer_is_linear(part):
    start = time.process_time()
    final_answer(part * 20_000)
    assert time.process_time() - start < 2


def test_any_thread_may_judge():
    """math-verify's own timeouts raise outside the main thread."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(same_answer(r"\frac{14}{4}", r"7 \cdot 0.5")))
    thread.start()
    thread.join()
    assert verdicts == [True]


FORMULA = st.text("0123456789xy+-*/^(){}[],.=<>!%$ \\", max_size=24)
PARTS = st.lists(
    st.sampled_from(
        ["<answer>", "</answer>", r"\boxed{", "}", "{", "\n", "A: ", "#### ", "answer is ", "</think>", "5"]
    )
    | st.text(max_size=4)
).map("".join)


@settings(max_examples=300, deadline=None)
@given(PARTS | st.text())
def test_final_answer_never_raises_and_leaves_no_mark(text):
    answer = final_answer(text)
    assert answer is None or (answer.strip() and final_answer(answer) is None)


@settings(max_examples=60, deadline=None)
@given(st.text() | PARTS | FORMULA, st.text() | FORMULA)
def test_same_answer_never_raises(answer, gold):
    assert same_answer(answer, gold) in (True, False)
    assert same_answer(gold, gold) is bool(gold.strip())


@pytest.mark.skipif(not SAMPLES.exists(), reason="the shared samples are not here")
def test_agrees_with_every_flag_of_the_real_solutions():
    """No exception had to be made: 800 of 800 flags agree, answers cut off before `A:` included (they are wrong)."""
    disagreements = []
    lines = (SAMPLES / "gsm8k_model_solutions_200.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        gold = gold_answer(row["ground_truth"])
        for solver in SOLVERS:
            answer = final_answer(row[solver]["solution"])
            right = answer is not None and same_answer(answer, gold)
            if right != row[solver]["is_correct"]:
                disagreements.append((number, solver, answer, gold))
    assert len(lines) == 200
    assert disagreements == []
