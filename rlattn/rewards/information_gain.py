"""Information gain: an agent that asks is paid for what it learns by it (Nous, arXiv 2510.27410; task: `questions`).

A belief b over the specification is one distribution an attribute, so H(b) = sum_i H(b_i), in bits. An answer that
restricts attribute i to a set S renormalises b_i on S, and the turn gains

    r_t = H(b_t) − H(b_{t+1})

in closed form, from what was said alone. A second question about the same thing earns 0; a partial answer can leave
more open than there was, and that negative gain is kept. An answer that contradicts the belief, or cannot be parsed,
changes nothing and is counted.

Decisions (the paper's body leaves them open, and its code is not published):

- `turn_credit: true`: the tokens of a turn get the turn's own value, z-scored over the rollouts of the group that are
  still alive at that turn, times `turn_weight`, on top of the advantage of the other rewards. The value is gain −
  `turn_cost` for a question, −`turn_cost` for a malformed turn or a question past the limit, 0 for the turn that writes
  the specification: to stop is better than to ask for less than the cost. Immediate and not to go: summed over later
  turns, the order of questions is not learned. The reward's own weight must be 0, as its turns carry it.
- `turn_credit: false`, the ablation: the sum of these values is one number a rollout, weighed as any reward.
- Another reward must pay for the specification (`specification`, the share of attributes that are right, or `accuracy`,
  all of them): paid for asking alone, a policy forgets to answer.
- `measure: resolved`, the control: a turn's value is the number of attributes it settles, however uncertain they were.

Cost: parsing text; no forward pass. Logged: `rewards/information_gain/mean` (bits a dialogue, costs taken off), and by
the task, as task/… in training and eval/… on held-out rows: `gain` (bits a dialogue), `gain_per_turn` (bits a question
asked), `gain_share` (of what the greedy questioner expects in all the questions there are), `opened_best` (share of
dialogues that open with the greedy questioner's first question), `attributes_right`, `turns` (questions and malformed
turns), `malformed`, `unparsed` and `contradictions` (a dialogue).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlattn.errors import UserError
from rlattn.formats.transcript import runs
from rlattn.tasks.questions.task import MOST_QUESTIONS, Turn
from rlattn.types import LARGEST_WEIGHT, Rollout, RunContext


@dataclass(frozen=True, kw_only=True)
class InformationGain:
    """What the questions of a dialogue tell, less a cost a question."""

    measure: Literal["gain", "resolved"] = "gain"
    """Bits, or as a control attributes of which one value is left."""
    turn_credit: bool = True
    """Every turn's tokens are paid for their own turn; else one number a rollout."""
    turn_cost: float = 0.1
    """Bits or attributes."""
    turn_weight: float = 1.0
    """Of the turns' z-scores, beside the advantage of the other rewards."""

    needs = ("environment",)
    needs_of_task = ("replay",)
    part_count = MOST_QUESTIONS + 1  # the last turn writes the specification

    def __post_init__(self) -> None:
        for name in ("turn_cost", "turn_weight"):
            if not 0 <= getattr(self, name) <= LARGEST_WEIGHT:
                raise ValueError(f"{name}: expected 0 to {LARGEST_WEIGHT:g}, got {getattr(self, name)}")

    def check(self, context: RunContext) -> None:
        """With `turn_credit` its turns carry it and its weight is 0; and another reward pays for the answer."""
        spec, where = context.recipe.rewards.named[context.name], f"rewards.{context.name}"
        if self.turn_credit and spec.weight:
            problem = f"{spec.weight:g} would count the gain a second time: with turn_credit its turns carry it."
            raise UserError(f"{where}.weight", problem, "Set weight: 0 and use turn_weight, or turn_credit: false.")
        for key in ("requires", "warmup", "decay"):
            if self.turn_credit and getattr(spec, key):
                problem = "bears on a reward's weight; with turn_credit its turns carry it."
                raise UserError(f"{where}.{key}", problem, "Drop it, or set turn_credit: false.")
        if not self.turn_credit and not spec.weight:
            problem = "0 leaves nothing of it: without turn_credit it is one number a rollout."
            raise UserError(f"{where}.weight", problem, "Give it a weight, set turn_credit: true, or drop it.")
        paying = [one for name, one in context.rewards.items() if context.recipe.rewards.named[name].weight > 0]
        if not any(getattr(one, "judges_answer", not type(one).__module__.startswith("rlattn.")) for one in paying):
            raise UserError(
                where,
                "comes without a reward for the answer: paid for asking alone, a policy forgets how to answer.",
                "Add specification: {weight: 1}, or accuracy.",
            )

    @property
    def part_weight(self) -> float:
        return self.turn_weight

    def score(self, rollout: Rollout) -> float:
        return sum(self._values(rollout))

    def parts(self, rollout: Rollout) -> list[tuple[float | None, list[bool]]]:
        if not self.turn_credit:
            return []
        return turn_parts(rollout, self._values(rollout))

    def _values(self, rollout: Rollout) -> list[float]:
        return turn_values(rollout.task, rollout.completion, self.measure, self.turn_cost)


def turn_values(task: Any, completion: str, measure: Literal["gain", "resolved"], cost: float) -> list[float]:
    """What every turn is worth: `gain` or `resolved` less the cost; 0 for the turn that writes the specification."""
    if not hasattr(task, "replay"):
        raise UserError("task", f"{type(task).__name__} has no dialogues to gain from.", "Use kind: questions.")
    turns: Sequence[Turn] = task.replay(completion)
    return [0.0 if turn.kind == "specification" else getattr(turn, measure) - cost for turn in turns]


def turn_parts(rollout: Rollout, values: Sequence[float]) -> list[tuple[float | None, list[bool]]]:
    """Each turn's value, and the tokens that the policy wrote in it."""
    mask = rollout.policy_mask or (True,) * len(rollout.completion_ids)
    spans = [(start, end) for start, end, own in runs(mask) if own]
    if len(spans) != len(values):
        raise ValueError(f"{len(values)} turns in the text and {len(spans)} in the tokens")
    places = range(len(mask))
    return [(value, [start <= place < end for place in places]) for value, (start, end) in zip(values, spans)]
