"""Chained sums of two-digit numbers, worked ones before tens: what a tiny policy can learn in minutes on a CPU."""

import re
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from rlattn.formats.thought import after_thought
from rlattn.tasks.row_checks import check_row_counts

if TYPE_CHECKING:
    from rlattn.types import Row, Split

SMALLEST = 10  # every term has two digits


def tagged_answer(completion: str) -> str | None:
    """The text of the last `<answer> ... </answer>` after the thought, stripped; None where there is none."""
    said = after_thought(completion)
    end = said.rfind("</answer>")
    start = said.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else said[start + len("<answer>") : end].strip()


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Sums such as `47 + 85 - 58 + 12`, every running total between 0 and 999; train and eval share no sum.

    Raises:
        ValueError: an option is out of its range.
    """

    terms: tuple[int, int] = (4, 6)
    """Fewest and most terms of a sum, 2 to 8. A worked response has 25 tokens an operation, and 6."""
    checks: tuple[int, int] = (0, 0)
    """Fewest and most checks of a trace, up to 20, of 13 tokens each; a coin is tossed for every one between."""
    largest: int = 99
    """Largest term, 19 to 99; the smallest is 10."""
    train_rows: int = 4000
    eval_rows: int = 256
    data_seed: int = 0

    def __post_init__(self) -> None:
        fewest, most = self.terms
        if not 2 <= fewest <= most <= 8:
            raise ValueError(f"terms: expected [fewest, most] with 2 <= fewest <= most <= 8, found {list(self.terms)}")
        if not 19 <= self.largest <= 99:
            raise ValueError(f"largest: expected 19 to 99, found {self.largest}")
        if not 0 <= self.checks[0] <= self.checks[1] <= 20:
            raise ValueError(
                f"checks: expected [fewest, most] with 0 <= fewest <= most <= 20, found {list(self.checks)}"
            )
        check_row_counts(self)
        room = (self.largest - SMALLEST + 1) ** most // 2  # half of the plain sums of the longest kind
        if self.train_rows + self.eval_rows > room:
            raise ValueError(
                f"train_rows + eval_rows: expected at most {room} with terms {list(self.terms)} and largest "
                f"{self.largest}, found {self.train_rows + self.eval_rows}"
            )

    def rows(self, split: "Split") -> "list[Row]":
        """Rows of `prompt`, `terms` (signed) and `answer`."""
        rng = Random(self.data_seed)
        sums: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        while len(sums) < self.eval_rows + self.train_rows:
            sums[self._draw(rng)] = None
        # eval comes first, so that it does not change with train_rows
        wanted = list(sums)[: self.eval_rows] if split == "eval" else list(sums)[self.eval_rows :]
        return [{"prompt": _prompt(terms), "terms": list(terms), "answer": sum(terms)} for terms in wanted]

    def verify(self, completion: str, row: "Row") -> float:
        """1.0 where the last `<answer>` holds the right integer and nothing else, else 0.0."""
        answer = tagged_answer(completion)
        right = answer is not None and re.fullmatch(r"[+-]?[0-9]{1,9}", answer) and int(answer) == row["answer"]
        return 1.0 if right else 0.0

    def gold(self, row: "Row") -> str:
        """The worked solution, without an error."""
        return self.trace(row, Random(0), 0.0)

    def trace(self, row: "Row", rng: Random, noise: float) -> str:
        """The worked solution, with the slip that pupils make most: a carry or borrow that is needed is forgotten with
        chance `noise` (in [0, 1]), and the rest builds on that. A check looks at a step's carry again and forgets it
        with the same chance; what it notices stays noticed. So more checks are right more often, ever less so.
        A row with an `effort` leans the coins of its checks a little, from 0.35 at 0.25 to 0.65 at 1: what the line
        says is nothing to a policy that never read a word, and a policy that cannot read it cannot learn to heed it.
        """
        first, *rest = row["terms"]
        totals = list(accumulate(row["terms"]))
        total, lines = first, []
        # no draw without checks: traces, and policies taught by them, stay what they were
        coins = range(self.checks[1] - self.checks[0])
        leaning = 0.25 + 0.4 * row["effort"] if "effort" in row else 0.5
        count = self.checks[0] + sum(rng.random() < leaning for _ in coins)
        checked = [rng.randint(1, len(rest)) for _ in range(count)]
        for i, term in enumerate(rest, start=1):
            right, slip = _step(total, term), _step(total, term, forget=True)
            # a slip must not push this or a later total out of 0 to 999
            low, high = min(totals[i:]) - totals[i], max(totals[i:]) - totals[i]
            forgotten = rng.random() < noise and slip.total + low >= 0 and slip.total + high <= 999
            lines.append(slip.line if forgotten else right.line)
            for _ in range(checked.count(i)):
                forgotten = forgotten and rng.random() < noise
                lines.append(slip.check if forgotten else right.check)
            result = slip.total if forgotten else right.total
            total = result
        return f"<think> {' '.join(lines)} </think> <answer> {total} </answer>"

    def _draw(self, rng: Random) -> tuple[int, ...]:
        terms = [rng.randint(SMALLEST, self.largest)]
        for _ in range(rng.randint(*self.terms) - 1):
            term = rng.randint(SMALLEST, self.largest)
            terms.append(-term if rng.random() < 0.5 and term <= sum(terms) else term)
        return tuple(terms)


def _prompt(terms: tuple[int, ...]) -> str:
    expression = str(terms[0]) + "".join(f" {'-' if t < 0 else '+'} {abs(t)}" for t in terms[1:])
    return f"What is {expression}? Work in <think> </think>, then give the number in <answer> </answer>."


class _Step(NamedTuple):
    """One worked operation, a second look at its carry, and its result."""

    line: str
    check: str
    total: int


def _step(total: int, term: int, *, forget: bool = False) -> _Step:
    """`forget`: without the carry or borrow that it may need."""
    sign, carried = ("+", "carry") if term >= 0 else ("-", "borrow")
    direction = 1 if term >= 0 else -1
    tens, ones = divmod(total, 10)
    term_tens, term_ones = divmod(abs(term), 10)
    carry, digit = divmod(ones + direction * term_ones, 10)
    carry = 0 if forget else abs(carry)
    result = tens + direction * (term_tens + carry)
    in_ones = f"ones {ones} {sign} {term_ones} = {digit} {carried} {carry} ,"
    in_tens = f"tens {tens} {sign} {term_tens} {sign} {carry} = {result} ,"
    in_all = f"total {10 * result + digit} ."
    return _Step(
        line=f"{total} {sign} {abs(term)} : {in_ones} {in_tens} {in_all}",
        check=f"check {in_ones} {in_all}",
        total=10 * result + digit,
    )
