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
    (r"\$18", "18 dollars"), ("18", "18 dollars"), ("60 miles per hour", "60"), (r"5\text{ m}", "5"),
    (r"10,\!000", "10000"), (r"1{,}000", "1000"), (r"1\,000", "1000"), (r"5\text{ cm}^2", "5 cm^2"),
    ("50%", "50"), (r"50\%", "0.5"), ("18 percent", "18%"), ("0.333333", "1/3"), ("1e5", "100,000"),
    ("1 1/2", "1.5"), (r"1\frac{1}{2}", "3/2"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", "6/8"), ("x=5", "5"),
    ("$18$", "18"), (r"\text{(B)}", "b"), ("Paris", "paris."), ("2**3", "8"), ("x^10", "x^{10}"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), ("sin(x)", r"\sin x"), ("pi/2", r"\frac{\pi}{2}"),
    (r"\{1,2\}", r"\{2,1\}"), ("1,2", "2,1"), (r"90^\circ", "90"), (r"\left(1,2\right)", "(1,2)"),
    ("0.083333", "1/12"), ("0.0000166667", "1/60000"), ("4.70e-9", "4.7e-9"),
    (r"\frac{1}{18!}", r"\frac{19}{19!}"), (r"4^{-40}", "2^{-80}"),
    (r"6.6\times10^{-34}", r"6.6 \cdot 10^{-34}"), (r"\{1, 4^{-40}\}", r"\{2^{-80}, 1\}"), ("3.141593", r"\pi"),
    ("2^{2005}", r"4\cdot 2^{2003}"), (r"(-\infty,2]\cup[3,5)", r"(-\infty,2.0]\cup[3,5)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2.0\end{pmatrix}"), ("y=2x+3", "y-2x=3"),
    # rows and columns
    (r"\begin{bmatrix}7\\-3\end{bmatrix}", r"\begin{pmatrix} 7 \\ -3 \end{pmatrix}"),
    (r"\begin{pmatrix}7&0\\-3&1\\\end{pmatrix}", r"\begin{pmatrix} 7 & 0 \\[4pt] -3 & 1 \end{pmatrix}"),
    (r"\begin{pmatrix}0.5\\\sqrt{8}\end{pmatrix}", r"\begin{pmatrix} \frac12 \\ 2\sqrt2 \end{pmatrix}"),
    (r"\left[\begin{array}{cc} 7 & 0 \\ -3 & 1 \end{array}\right]", r"\begin{bmatrix}7&0\\-3&1\end{bmatrix}"),
    (r"\\frac{3}{4}", r"\frac{3}{4}"),
    (r"\\begin{pmatrix}1\\\\2\\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # units
    ("36", r"36 \mathrm{~m}^{2}"), (r"36\,\text{m}^2", r"36 \mathrm{~m}^{2}"),
    ("36 square metres", r"36 \mathrm{~m}^{2}"), ("80", r"80 \mathrm{~km} / \mathrm{h}"),
    ("80 km/h", r"80 \mathrm{~km} / \mathrm{h}"), ("60 mph", "60 miles per hour"),
    (r"5\sqrt{7}", r"5 \sqrt{7} \mathrm{~m}"), (r"9\pi", r"9 \pi \mathrm{~cm}^{3}"),
    (r"36\sqrt{7}cm^{3}", r"36\sqrt{7}"), (r"\frac{7}{8}\text{ miles}", "7/8"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"), (r"864 \mbox{ inches}^2", "864"), ("3 cm, 4 cm", "3, 4"),
    (r"x = 5\text{ cm}", "5"), (r"5.4 \text{ cents}", "5.4"), ("5 ft", "5 feet"), ("4th", "4"),
    (r"\$32,\!348", "32348"), (r"\$ \frac{7}{2}", "3.5"), ("18 $", "18"), (r"\$5 \text{ million}", "5000000"),
    ("€ 7", "7 euros"), (r"12\frac{1}{2}\%", "12.5%"), (r"17.5\text{ percent}", "17.5"),
    ("10:30 p.m.", r"10\!:\!30\text{ pm}"), ("20°C", "20"), (r"2516_{8}", "2516_8"), ("2516", "2516_8"),
    (r"45^{\circ}", "45 degrees"), (r"(45^{\circ}, 60^{\circ})", "(45, 60)"),
    # signs
    ("45°", r"45^\circ"), ("sqrt(3)/2", r"\frac{\sqrt{3}}{2}"), ("√3/2", r"\frac{\sqrt{3}}{2}"),
    ("√(x+1)", r"\sqrt{x+1}"), ("∛5", r"\sqrt[3]{5}"), ("3√5", r"3\sqrt{5}"), ("¾", "0.75"), ("2½", "5/2"),
    ("x³−1", "x^{3}-1"), ("a₁", "a_1"), ("5·10⁻³", "0.005"), ("[0, ∞)", r"[0,\infty)"),
    ("(−∞, 1) ∪ (2, 3]", r"(-\infty,1)\cup(2,3]"), ("2π", r"2\pi"), ("θ/2", r"\frac{\theta}{2}"),
    ("x ≥ 3", r"x \geq 3"), ("[3, ∞)", "x >= 3"), ("1 ± √19", r"1 \pm \sqrt{19}"), ("∅", r"\varnothing"),
    ("ℝ", r"\mathbb{R}"), ("⌊n/2⌋", r"\left\lfloor \frac{n}{2} \right\rfloor"), ("１２", "12"),
    ("12\u00a0345", "12345"), ("12\u2009345", "12345"), ("3×4", "12"), ("6÷4", "1.5"), ("5个", "5"),
    ("𝑥+1", "x+1"), ("1 000", "1000"), ("0.\\overline{3}", "1/3"), ("0{,}5", "0.5"),
    # what one side may write otherwise
    (r"\boxed{5}", "5"), (r"\boxed{\text{5}}", "5"), (r"\mathbf{5}", "5"), ("`5`", "5"),
    (r"\frac 34", r"\frac{3}{4}"), ("$5$ or $9$", "9, 5"), (r"2 \text{ and } -2", r"\pm 2"),
    ("1, 2, and 3", r"\{1,2,3\}"), (r"x=1\text{ or }x=3", "x=3, x=1"), ("Area = 5", "5"),
    (r"\text{Area}=5", "5"), ("x = 1,000", "1000"), ("1,000x", "1000x"), (r"10{,}000\pi", r"10000\pi"),
    (r"2^3 \cdot 5^2", "200"), ("x^2y^2", "y^2x^2"), ("(n-1)!", r"\left(n-1\right)!"),
    (r"e^{-x^2}", r"\frac{1}{e^{x^2}}"), ("p - q", "-q + p"), ("6xyz", "6 x y z"), (r"\log_2 8", "3"),
    (r"\frac{100!}{99!}", "100"), ("A, C", "C, A"), ("2*sin(x)", r"2\sin x"), ("e^(2x)", "e^{2x}"),
    (r"x=-\sin (3 t) / 5+ C_{1} \sin (2 t)+C_{2} \cos (2 t)", r"C_{2} \cos (2 t)+C_{1} \sin (2 t)-\frac{\sin 3t}{5}"),
    ("1.5e-7", r"1.5 \times 10^{-7}"), ("x = 1.5e3", "1500"),
]  # fmt: skip
DIFFERENT = [
    ("18 cents", "18 dollars"), ("18 million", "18"), ("18x", "18"), ("2x", "2"), ("18 n", "18"), ("19", "18"),
    ("18 or 19", "18"), ("siraP", "Paris"), ("no", "on"), ("3 4", "12"), ("1 000", "0"), ("1,5", "15"),
    ("x=4", "5"), ("-5", "5"), ("0.33", "1/3"), ("(1,2)", "(2,1)"), ("", ""), ("", "0"), ("$", "0"),
    ("18\n19", "18"), ("5!", "5"), ("2/0", "1/0"),
    # rows and columns
    (r"\begin{pmatrix} 7 \\ -3 \end{pmatrix}", r"\begin{pmatrix} -3 \\ 7 \end{pmatrix}"),
    (r"\begin{pmatrix} 7 & 1 \\ 0 & 2 \end{pmatrix}", r"\begin{pmatrix} 7 & 9 \\ 0 & 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 7 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 7 & 1 \end{pmatrix}"),
    (r"\begin{pmatrix}x\\,y\end{pmatrix}", r"\begin{pmatrix}y\\,x\end{pmatrix}"),
    (r"\begin{pmatrix}1\\!2\end{pmatrix}", "12"),
    # units
    ("36 m", r"36 \mathrm{~km}"), ("36", r"35 \mathrm{~m}^{2}"), (r"36 \mathrm{~m}^{2}", r"36 \mathrm{~m}^{3}"),
    (r"5\sqrt{7}\text{ m}", r"5\sqrt{7}\text{ cm}"), ("2t", "2"), ("x+3t", "x+3"), ("5t", "5s"), ("2abc", "2"),
    ("18 \\pi", "18"), ("80 km/h", "80 m/s"), ("20°C", "20°F"), ("101_2", "101_3"),
    (r"n\text{ is odd}", r"n\text{ is even}"), ("10 am", "10 pm"), ("5个", "6个"), ("5米", "5厘米"),
    ("1/2 million", "1/2"), ("3 or 4 m", "3"),
    # signs and letters
    ("x²", "2x"), ("x2", "x²"), ("½", "1.2"), ("1½", "11/2"), ("√12", r"\sqrt{1}2"), ("0,245", "245"),
    ("[1,2]", "(1,2)"), ("[0,1)", "(0,1]"), ("1, 2", "12"), ("12 345 6", "123456"),
    (r"\overline{AB}", r"\overline{BA}"),
    # small and nearly equal
    ("0", "4.7e-9"), ("0.0000003", "0.0000004"), ("1.7e-27", "9.1e-31"), ("3^{-90}", "3^{-91}"),
    (r"\frac{1}{18!}", r"\frac{1}{17!}"), (r"2 \times 10^{-12}", r"3 \times 10^{-12}"),
    ("x=2^{-80}", "x=2^{-81}"), (r"\{1, 2^{-80}\}", r"\{1, 2^{-81}\}"), ("(0, 10^{-20})", "(0, 10^{-21})"),
    (r"\begin{pmatrix}10^{-9}\end{pmatrix}", r"\begin{pmatrix}10^{-10}\end{pmatrix}"),
    ("x > 10^{-20}", "x > 10^{-21}"), (r"10^{-20}x", r"10^{-21}x"), ("1+10^{-30}", "1"),
    (r"\sqrt{2}\cdot 10^{-20}", "0"), ("10^{30}+1", "10^{30}"), ("12345678.0", "12345679"), (r"\pi", "3.1416"),
    ("1.00001e-8", "1.00002e-8"),
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
    r"e^{e^{e^{99}}}", r"\int_0^1 \sin(x^x) dx", "(" * 120 + "1" + ")" * 120, "9" * 1999, "x" * 100_000, "1e99",
    "1/" * 100 + "1", "$" * 250, r"\frac{" * 40, "x\x00y", "٣", "²", "\ud800", "9**9**9", "10^(10^10)",
    "10^{10^{10}}", "9⁹⁹⁹⁹⁹⁹⁹", "1e999999999", r"1\times10^{999999999}", "2^2^2^2^2^2^2^2", "(999999)!",
    "(99*99*99)!", "e^{9^{99999}}", r"x=10^{\text{99999999}}", r"\sqrt[99999999]{2}", "9^{9}^{9}^{9}",
    "(((9^9)^99)^99)^99!", "((x+1)^{999})^{9}", "sqrt(" * 80, "^(" * 100, "a" * 1999, "a " * 999,
    r"\text{" * 300, r"\!" * 900, "{,}" * 600, "1 " * 999, "½" * 1900, "1,000" * 380, "/a" * 990,
    "__import__('os').system('true')", "(lambda: 1)()", r"\\" * 900, "1{" * 900, "$1" * 999,
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
