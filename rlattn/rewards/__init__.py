"""Rewards: one number a rollout. One file a reward, one line here.

A reward is a dataclass; its fields are its options in a recipe (`rewards: {format: {weight: 0.2}}`). Besides `score` it
may have:

- `needs`: a tuple of `group` (statistics over a group, through `prepare`), `policy` (second rollouts), `environment`
  (dialogues), `images` (`rollout.images`); said by `rlattn score`, which has none of them.
- `needs_of_task`: names of methods that the task must have, beyond the protocol's.
- `check(context: RunContext)`: raises UserError where the recipe does not give it what it needs; before a run.
- `judges_answer = True`: it pays for the task's answer; `pays_at_most`: the most that it gives, where that is below 1.
- `prepare(batch: RewardBatch) -> list`: collective, once a generation batch on every rank, before `score`; one note a
  rollout, which `score` finds as `rollout.note`.
- `tokens(rollout) -> list[bool] | None`: the completion tokens it speaks for, all where None.
- `parts(rollout) -> list[tuple[float | None, list[bool]]]`: values for stretches of the completion, such as turns, at
  most `part_count` of them; each is compared with the same part of its group's other rollouts and adds
  `part_weight` times that to the advantage of its tokens.
- `lag`: it asks for second rollouts of a policy refreshed every `lag` steps; `first_policy`: of the one of step 0.
- `multiplier`: a factor of its weight that moves during the run.
- `state_dict() -> dict` and `load_state_dict(state)`: plain JSON data that a checkpoint keeps, the same on every rank.
- `bind(trainer)`: called once, before training.
"""

from rlattn.rewards.accuracy import Accuracy
from rlattn.rewards.adaptive_effort import AdaptiveEffort
from rlattn.rewards.brevity import Brevity
from rlattn.rewards.format import Format
from rlattn.rewards.information_gain import InformationGain
from rlattn.rewards.payoff import Payoff
from rlattn.rewards.self_monitor import SelfMonitor
from rlattn.rewards.specification import SpecificationShare

REWARDS: dict[str, type] = {
    "accuracy": Accuracy,
    "adaptive_effort": AdaptiveEffort,
    "brevity": Brevity,
    "format": Format,
    "information_gain": InformationGain,
    "payoff": Payoff,
    "self_monitor": SelfMonitor,
    "specification": SpecificationShare,
}
