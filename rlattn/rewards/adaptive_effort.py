"""Adaptive effort: a right answer pays where its thought is as short as the prompt asks (e1, arXiv 2510.27042).

The prompt says an effort r (`task.efforts`, see `rlattn/formats/effort.py`), one for a whole group. With L the tokens
of a rollout's `<think>` block (of the completion where there is none) and T(x) the current average L of the query x
over all efforts, the reward is

    right · gate,    gate = min(1, r·T(x) / L)   (`gate: soft`)   or   [L <= r·T(x)]   (`gate: hard`, the paper's)

and r = 1, the largest effort, has no gate. Budgets are relative to what the policy itself needs, query by query: no
length is set anywhere, and the user dials the cost of an answer when asking.

Decisions, where the paper's abstract is silent:
- `soft` by default: in a group whose lengths differ by 30 %, nothing passes the hard gate at low efforts, so that
  they would never be learned; the soft gate pays the shorter of two right answers.
- `average: ema`: T(x) starts at the mean of the query's first group and moves by `rate` towards the mean of each
  generation batch that holds the query, this one included. It is the same on every rank and kept in checkpoints.
  `average: group` takes the mean of the rollout's own group only: it needs no state, and a low effort then asks for
  ever shorter thoughts, as its own average shrinks with them. A query is its prompt without the effort.
- A truncated rollout counts with the length at which it was cut. What follows the block is free up to a quarter of it,
  and counts beyond; the whole completion counts where it does not begin with its one block: reasoning elsewhere does
  not pay.

Cost: counting tokens (a few decodes of a rollout), one gather of a number and a key a rollout; one number a query seen.
Logged: `effort/<r>/tokens` (mean L of the batch at that effort), `effort/<r>/within` (share with L <= r·T(x)),
`effort/average` (mean T(x)). Held-out accuracy and tokens by effort: `eval/effort_<r>/accuracy` and `/tokens`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from statistics import fmean
from typing import Any, Literal

from rlattn.errors import UserError
from rlattn.formats.effort import FULL, effort_text, query_key, thought_tokens
from rlattn.formats.thought import with_opened_thought
from rlattn.types import RewardBatch, Rollout, RunContext

Gate = Literal["soft", "hard"]


@dataclass(frozen=True)
class Thought:
    """What `prepare` finds out about a rollout: its length, and the average of its query, in tokens."""

    length: int
    average: float


@dataclass(kw_only=True)
class AdaptiveEffort:
    gate: Gate = "soft"
    average: Literal["ema", "group"] = "ema"
    rate: float = 0.2
    """How far the `ema` moves towards a batch's mean, above 0 and up to 1."""
    averages: dict[str, float] = field(init=False, default_factory=dict, repr=False)

    needs = ("group",)

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate: expected more than 0 and at most 1, got {self.rate}")

    def check(self, context: RunContext) -> None:
        if not context.recipe.task.efforts:
            raise UserError(
                "task.efforts",
                f"is required by rewards.{context.name}: its prompts must say an effort.",
                "Add efforts: [0.25, 0.5, 0.75, 1.0] to the task.",
            )

    def prepare(self, batch: RewardBatch) -> list[Thought]:
        own = [_facts(rollout, batch) for rollout in batch.rollouts]
        everyone: list[tuple[str, int, int, float]] = batch.gather(own)
        if self.average == "ema":
            update_averages(self.averages, [(query, length) for query, _, length, _ in everyone], self.rate)
            average_of = [self.averages[query] for query, *_ in everyone]
        else:
            lengths: dict[int, list[int]] = {}
            for _, group, length, _ in everyone:
                lengths.setdefault(group, []).append(length)
            average_of = [fmean(lengths[group]) for _, group, *_ in everyone]
        for effort in sorted({effort for *_, effort in everyone if effort}):
            at = [(fact[2], mean) for fact, mean in zip(everyone, average_of, strict=True) if fact[3] == effort]
            name = f"effort/{effort_text(effort)}"
            batch.log(f"{name}/tokens", fmean(length for length, _ in at))
            batch.log(f"{name}/within", fmean(length <= effort * mean for length, mean in at))
        batch.log("effort/average", fmean(average_of))
        # By query or group, not by place: ranks may hold different numbers of rollouts.
        mean_of = {fact[:2]: mean for fact, mean in zip(everyone, average_of, strict=True)}
        return [Thought(length, mean_of[query, group]) for query, group, length, _ in own]

    def score(self, rollout: Rollout) -> float:
        effort = _effort(rollout.row)
        if effort is None:
            given = rollout.row.get("effort")
            raise ValueError(f"row['effort'] is {given!r}, expected a number above 0 and up to 1: set task.efforts")
        completion = with_opened_thought(rollout.completion, rollout.prompt_text)
        right = float(rollout.task.verify(completion, rollout.row))
        if effort >= FULL:
            return right
        if rollout.note is None:
            raise ValueError("an effort below 1 is judged against the average length, which only training knows")
        return right * gated(self.gate, effort, rollout.note.length, rollout.note.average)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = dict(state["averages"])


def gated(gate: Gate, effort: float, length: float, average: float) -> float:
    """The factor in [0, 1] of a right answer whose thought has `length` tokens, where its query's average is `average`.

    Half the average asked for, and 60 of 80 tokens used: soft 40 / 60, hard 0.
    """
    budget = effort * average
    return min(1.0, budget / length) if gate == "soft" else float(length <= budget)


def update_averages(averages: dict[str, float], seen: Sequence[tuple[str, float]], rate: float) -> None:
    """Moves every query's average by `rate` towards the mean of its lengths in `seen`; a new one starts there."""
    lengths: dict[str, list[float]] = {}
    for query, length in seen:
        lengths.setdefault(query, []).append(length)
    for query, values in lengths.items():
        mean = fmean(values)
        averages[query] = averages.get(query, mean) + rate * (mean - averages.get(query, mean))


def _facts(rollout: Rollout, batch: RewardBatch) -> tuple[str, int, int, float]:
    """Query (hashed: prompts are long), group, length, effort (0 where the row has none: `score` will say so)."""
    query = sha256(query_key(rollout.row).encode()).hexdigest()[:16]
    length = max(1, thought_tokens(rollout.completion_ids, batch.decode, rollout.prompt_text))
    return query, rollout.group, length, _effort(rollout.row) or 0.0


def _effort(row: Mapping[str, Any]) -> float | None:
    """The row's effort; None where it has none, or something else there."""
    effort = row.get("effort")
    if isinstance(effort, bool) or not isinstance(effort, int | float) or not 0 < effort <= FULL:
        return None
    return float(effort)
