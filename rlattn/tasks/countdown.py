"""Countdown: reach a target with every given number once and + - * /, as in TinyZero."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from rlattn.errors import UserError
from rlattn.tasks.arithmetic import tagged_answer
from rlattn.tasks.row_checks import check_row_counts

if TYPE_CHECKING:
    from rlattn.types import Row, Split

SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
WRITTEN_SIGNS = {"×": "*", "·": "*", r"\times": "*", r"\cdot": "*", "÷": "/", r"\div": "/", "−": "-"}
LARGEST_RESULT = 999  # of a worked step, so that every number is one token of the tiny policy
PATIENCE = 20_000  # draws without a new problem, after which there are none
LONGEST_ANSWER = 200  # characters; far above any honest answer, far below what could exhaust the parser

Expression = int | tuple["Expression", str, "Expression"]


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """`Use 3, 7 and 25 to make 46`: always solvable; train and eval share no (numbers, target).

    Raises:
        ValueError: an option is out of its range.
    """

    numbers: tuple[int, ...] = (3, 4)
    """How many numbers a problem may have; each of 2 to 6, drawn evenly."""
    largest_number: int = 99
    """Numbers are 1 to this, at most 999."""
    largest_target: int = 100
    """Targets are 1 to this, at most 999."""
    train_rows: int = 4000
    eval_rows: int = 256
    data_seed: int = 0

    def __post_init__(self) -> None:
        if not self.numbers or not all(2 <= count <= 6 for count in self.numbers):
            raise ValueError(f"numbers: expected one or more of 2 to 6, found {list(self.numbers)}")
        for name, low, high in (("largest_number", 4, 999), ("largest_target", 10, 999)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, found {value}")
        check_row_counts(self)

    def rows(self, split: "Split") -> "list[Row]":
        """Rows of `prompt`, `numbers`, `target` and `solution` (one of the expressions that reach it).

        Raises:
            UserError: the options leave too few different problems.
        """
        rng = Random(self.data_seed)
        problems: dict[tuple[tuple[int, ...], int], Row] = {}
        found = 0
        wanted = self.eval_rows + self.train_rows
        last_new = 0
        for draw in range(200 * wanted):
            if draw - last_new > PATIENCE:
                break
            numbers = [rng.randint(1, self.largest_number) for _ in range(rng.choice(self.numbers))]
            expression = _draw(numbers, rng)
            target = _value(expression)
            if target is None or not 1 <= target <= self.largest_target:
                continue
            problems.setdefault(
                (tuple(sorted(numbers)), target),
                {
                    "prompt": _prompt(numbers, target),
                    "numbers": numbers,
                    "target": target,
                    "solution": _text(expression),
                },
            )
            if len(problems) > found:
                found, last_new = len(problems), draw
            if len(problems) == wanted:
                # eval comes first, so that it does not change with train_rows
                rows = list(problems.values())
                return rows[: self.eval_rows] if split == "eval" else rows[self.eval_rows :]
        raise UserError(
            "task.train_rows",
            f"{self.train_rows} and eval_rows {self.eval_rows} are more than the {len(problems)} different problems "
            f"found with numbers {list(self.numbers)}, largest_number {self.largest_number}, "
            f"largest_target {self.largest_target}.",
            "Lower them, or raise a largest one.",
        )

    def verify(self, completion: str, row: "Row") -> float:
        """1.0 where the last `<answer>` holds an expression with every number once that equals the target, else 0.0.

        `= target` after the expression is accepted, and `×`, `÷`, `−`, `\\times` and the like for the four signs; all
        but integers, + - * / and parentheses is not.
        """
        answer = tagged_answer(completion)
        if answer is None or len(answer) > LONGEST_ANSWER:
            return 0.0
        for written, sign in WRITTEN_SIGNS.items():
            answer = answer.replace(written, sign)
        answer = " ".join(answer.split())
        answer = re.sub(rf" ?= ?{row['target']}$", "", answer)
        # two operators in a row would be a sign, a power or a floor division
        if not re.fullmatch(r"[0-9+\-*/() ]+", answer) or re.search(r"[+\-*/] *[+\-*/]", answer):
            return 0.0
        try:
            tree = ast.parse(answer, mode="eval").body
            value = _exact(tree)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return 0.0
        used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return float(value == row["target"] and Counter(used) == Counter(row["numbers"]))

    def gold(self, row: "Row") -> str:
        """The stored solution, worked, without a search."""
        line, _ = _work(_parse(row["solution"]), row["target"], Random(0), 0.0)
        return f"<think> {line} </think> <answer> {row['solution']} </answer>"

    def trace(self, row: "Row", rng: Random, noise: float) -> str:
        """A search: up to three failed attempts, then the solution; the first that seems right is answered.

        With chance `noise` (in [0, 1]) a worked step has a wrong result: a failure may pass for a solution, and the
        solution for a failure.
        """
        attempts = list(_failures(row, rng, rng.randint(0, 3)))
        lines, answer = [], row["solution"]
        for expression in [*attempts, _parse(row["solution"])]:
            answer = _text(expression)
            line, reached = _work(expression, row["target"], rng, noise)
            lines.append(line)
            if reached:
                break
        else:  # the solution was worked wrongly: guess
            answer = _text(_draw(row["numbers"], rng))
        return f"<think> {' '.join(lines)} </think> <answer> {answer} </answer>"


def _prompt(numbers: list[int], target: int) -> str:
    listed = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    return (
        f"Use {listed} to make {target}. Use every number exactly once, with + - * / and parentheses. "
        "Think in <think> </think>, then answer as in <answer> (1 + 2) * 3 </answer>."
    )


def _draw(numbers: list[int], rng: Random) -> Expression:
    """A random expression with every number once."""
    parts: list[Expression] = list(numbers)
    while len(parts) > 1:
        left = parts.pop(rng.randrange(len(parts)))
        right = parts.pop(rng.randrange(len(parts)))
        parts.append((left, rng.choice("+-*/"), right))
    return parts[0]


def _value(expression: Expression) -> int | None:
    """The value; None where a step leaves the whole numbers from 0 to 999."""
    if isinstance(expression, int):
        return expression
    left, sign, right = expression
    return _apply(_value(left), sign, _value(right))


def _apply(left: int | None, sign: str, right: int | None) -> int | None:
    if left is None or right is None or (sign == "/" and right == 0):
        return None
    result = OPERATIONS[sign](Fraction(left), Fraction(right))
    return int(result) if result.denominator == 1 and 0 <= result <= LARGEST_RESULT else None


def _text(expression: Expression, *, nested: bool = False) -> str:
    if isinstance(expression, int):
        return str(expression)
    left, sign, right = expression
    text = f"{_text(left, nested=True)} {sign} {_text(right, nested=True)}"
    return f"( {text} )" if nested else text


def _parse(solution: str) -> Expression:
    """The inverse of `_text`."""

    def build(node: ast.expr) -> Expression:
        if isinstance(node, ast.BinOp):
            return build(node.left), SIGNS[type(node.op)], build(node.right)
        number: int = ast.literal_eval(node)
        return number

    return build(ast.parse(solution, mode="eval").body)


def _exact(node: ast.expr) -> Fraction:
    """The exact value; ValueError on anything but integers and + - * /."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        return OPERATIONS[SIGNS[type(node.op)]](_exact(node.left), _exact(node.right))
    raise ValueError(f"not allowed in an answer: {ast.dump(node)[:80]}")


def _failures(row: "Row", rng: Random, count: int) -> Iterator[Expression]:
    """Up to `count` random attempts that stay in the whole numbers and miss the target; a few problems have none."""
    draws = (_draw(row["numbers"], rng) for _ in range(100 * count))
    return islice((draw for draw in draws if _value(draw) not in (None, row["target"])), count)


def _work(expression: Expression, target: int, rng: Random, noise: float) -> tuple[str, bool]:
    """An attempt, such as `( 3 + 7 ) * 2 : 3 + 7 = 10 , 10 * 2 = 20 , no .`, and whether it seems to hit the target."""
    steps: list[str] = []

    def evaluate(part: Expression, last: bool) -> int | None:
        if isinstance(part, int):
            return part
        left, sign, right = evaluate(part[0], False), part[1], evaluate(part[2], False)
        result = _apply(left, sign, right)
        if result is not None and rng.random() < noise:
            # the error that costs: a last step that is believed to hit, or to miss
            result = target if last and result != target else min(result + rng.choice((1, 10)), LARGEST_RESULT)
        if result is not None:
            steps.append(f"{left} {sign} {right} = {result} ,")
        return result

    reached = evaluate(expression, True) == target
    return f"{_text(expression)} : {' '.join(steps)} {'yes' if reached else 'no'} .", reached
