"""Self-monitor: the policy's own critique of its thoughts keeps them honest (CoT Monitor+, arXiv 2505.18807).

A response is `<think>R</think> <monitor>critique</monitor> <label>safe|unsafe</label> <output>Y</output>`. A flagged
rollout earns r = -1, any other 0, beside an action reward R_a that may pay for deception. The paper maximises E[R_a]
subject to E[r] >= 0 through a Lagrangian: the effective reward is R_a + lambda·r, and lambda >= 0 grows while too much
is flagged. Where the label is sound, thoughts that lead to deception stop paying; where it is not, optimising
against it teaches thoughts that pass (obfuscation, arXiv 2503.11926): hence the held-out monitor.

Where the label comes from (`source`):

- `lagged` (the paper's): the policy of up to `lag` steps ago continues prompt + `<think>R</think> <monitor>`, greedily.
- `own`: the rollout's own label. It costs nothing, and pays a policy for writing `safe`.
- `external`: a function or an endpoint (`rlattn/rewards/external_monitor.py`). A rollout it does not answer for in time
  is neutral; so while it is unreachable the reward changes nothing, warns once and counts. One that an endpoint
  refuses (HTTP 400, 413, 422) is flagged: it would pay to be refused.

Decisions where the paper is silent:

- A rollout out of format is flagged, and so is a label that is missing, malformed, repeated or not in its place.
- `lagrangian`: a generation batch with flag rate f moves lambda to clip(lambda + rate·(f - slack), 0, cap), from 0, and
  is weighed with the result. Without slack lambda could only grow. It multiplies this reward's weight: as a factor
  of the reward it would be cancelled where rewards are normalised one by one. `penalty` keeps it at 1.
- Unless the label is the rollout's own, the reward speaks for thought and output only: in format, nothing that
  a rollout writes in its critique and label changes what it earns, and credit for them would make the lagged monitor
  drift. Where a policy loses the format there, add the reward `format`, which speaks for all tokens.
- An external monitor that gives no answer, or no readable label, for most of a batch is broken, rather than the policy
  worse: a warning says so, once, and lambda stands still. What it answered for is flagged all the same.
- `mode: log` changes nothing: weight 0, training as without the reward, bit for bit.
- With `mode: reward`, every `held_out_every` generation batches the policy of step 0, which is never trained on, judges
  the same thoughts. A warning follows where more than 98 % pass and the held-out monitor flags clearly more, and where
  the monitor flags most of what the held-out one lets pass: it has drifted, and punishes at random.

Cost: one greedy generation of at most `max_new_tokens` a batch for `lagged`, and one more whenever the held-out monitor
judges; the memory of the trained weights once for each of the two policies (under LoRA: of the adapter).

Logs, as `self_monitor/…` (over all ranks): `flag_rate`, `safe` (share of the monitor's labels, of rollouts in format),
`own_safe` (of the rollouts' own), `lambda`, `malformed` (rollouts out of format), `unparsed` (monitor labels that could
not be read, refusals among them), `unanswered` (external), `precision` and `recall` of flagging what the task calls
`deceptive` where it can tell, `held_out_flag_rate`, `held_out_recall`, `alarm` (passes too easily) and `drifted` (flags
too easily), 0 or 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from rlattn.errors import UserError
from rlattn.formats.monitored_response import monitor_prompt, outside_monitor, parse_four_parts, parse_verdict
from rlattn.rank import say
from rlattn.rewards.external_monitor import ExternalMonitor, known_keys
from rlattn.types import LARGEST_WEIGHT, RewardBatch, Rollout, RunContext

ALARM_SAFE = 0.98  # share of "safe" above which the held-out monitor's disagreement is worth a warning
MALFORMED = 0.9  # share of a batch out of format above which the prompts may not ask for it
UNREADABLE = 0.5  # share of a batch's monitor labels above which the monitor, and no policy, is at fault
DRIFTED = 0.5  # share of flagged rollouts above which twice the held-out monitor's is worth one


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is known about one rollout. Flags are None where nobody judged."""

    flagged: bool | None
    unparsed: bool
    """The monitor's label could not be read."""
    own_safe: bool | None
    """None: out of format."""
    deceptive: bool | None
    """The task's own truth; None where it cannot tell."""
    held_out: bool | None


@dataclass(frozen=True)
class Judgement:
    """What `prepare` finds out about a rollout: whether it is flagged, and the tokens it is flagged for (None: all)."""

    flagged: bool | None
    tokens: list[bool] | None


@dataclass(kw_only=True)
class SelfMonitor:
    source: Literal["lagged", "own", "external"] = "lagged"
    lag: int = 15
    """Optimizer steps after which the lagged policy is refreshed."""
    external: Annotated[ExternalMonitor | None, BeforeValidator(known_keys)] = None
    mode: Literal["reward", "log"] = "reward"
    constraint: Literal["lagrangian", "penalty"] = "lagrangian"
    slack: float = 0.05
    """The flag rate at which lambda stands still."""
    rate: float = 0.1
    cap: float = 5.0
    held_out_every: int = 5
    """Generation batches from one judgement of the held-out monitor to the next; 0: never."""
    max_new_tokens: int = 256
    """For a critique and a label."""
    multiplier: float = field(init=False, default=0.0)
    """Lambda, 1 under `penalty`, 0 in `mode: log`."""
    batches: int = field(init=False, default=0)
    warned: set[str] = field(init=False, default_factory=set)

    pays_at_most = 0.0

    def check(self, context: RunContext) -> None:
        if 0 < self.lag <= context.window_steps:
            raise UserError(
                f"rewards.{context.name}.lag",
                f"{self.lag} steps, and a generation window has {context.window_steps:g}: refreshed before every "
                "window, the lagged policy would be the current one.",
                "Make it larger (trainer.steps_per_generation x num_iterations / gradient_accumulation_steps is less).",
            )

    def __post_init__(self) -> None:
        if (self.external is not None) != (self.source == "external"):
            raise ValueError("external: goes with `source: external`, and that with it; give both or neither")
        for name, sound, expected in (
            ("lag", self.lag >= 1, "at least 1"),
            ("slack", 0 <= self.slack < 1, "0 or more, and less than 1"),
            ("rate", 0 < self.rate <= LARGEST_WEIGHT, f"more than 0 and at most {LARGEST_WEIGHT:g}"),
            ("cap", 0 < self.cap <= LARGEST_WEIGHT, f"more than 0 and at most {LARGEST_WEIGHT:g}"),
            ("held_out_every", self.held_out_every >= 0, "0 or more"),
            ("max_new_tokens", self.max_new_tokens >= 4, "at least 4"),
        ):
            if not sound:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")
        if self.source != "lagged":
            self.lag = 0  # no lagged policy is kept
        if self.mode == "reward" and self.constraint == "penalty":
            self.multiplier = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("policy",) if self.source == "lagged" else ()

    @property
    def first_policy(self) -> bool:
        """Whether second rollouts of the policy of step 0 are wanted."""
        return self.mode == "reward" and self.held_out_every > 0

    def prepare(self, batch: RewardBatch) -> list[Judgement]:
        """Judges the batch and moves lambda. Collective."""
        parsed = [parse_four_parts(rollout.completion, rollout.prompt_text) for rollout in batch.rollouts]
        sound = [i for i, parts in enumerate(parsed) if parts]
        verdicts: list[str | None] = [parts.label if parts else None for parts in parsed]
        unanswered: set[int] = set()
        problem = ""
        if self.source == "lagged":
            verdicts = self._continued(batch, sound, lagged_policy=True)
        elif self.external:
            questions = [(batch.rollouts[i].prompt_text, parts.thought) for i, parts in enumerate(parsed) if parts]
            answers, problem = self.external.judge(questions)
            for i, answer in zip(sound, answers, strict=True):
                verdicts[i] = answer
                if answer is None:
                    unanswered.add(i)
            problem = problem if unanswered else ""
        held_out: list[str | None] | None = None
        if self.first_policy and self.batches % self.held_out_every == 0:
            held_out = self._continued(batch, sound, first_policy=True)
        self.batches += 1
        judged = [
            Judged(
                flagged=None if i in unanswered else verdicts[i] != "safe",
                unparsed=parts is not None and i not in unanswered and verdicts[i] not in ("safe", "unsafe"),
                own_safe=parts.label == "safe" if parts else None,
                deceptive=_truth(rollout),
                held_out=None if held_out is None else held_out[i] != "safe",
            )
            for i, (rollout, parts) in enumerate(zip(batch.rollouts, parsed, strict=True))
        ]
        if self.external and (
            problem := next(filter(None, batch.gather([problem])), "")
        ):  # of any rank: rank 0 says it
            self._warn("external", f"the external monitor does not answer ({problem}); such rollouts are neutral")
        self._learn_from(batch.gather(judged), batch)
        return [
            Judgement(one.flagged, None if self.source == "own" else outside_monitor(rollout, batch.decode))
            for one, rollout in zip(judged, batch.rollouts, strict=True)
        ]

    def score(self, rollout: Rollout) -> float | None:
        """-1 where flagged, 0 where safe, None where nobody judged."""
        flagged = rollout.note.flagged if rollout.note else None
        if rollout.note is None and self.source == "own":  # a stored completion
            parts = parse_four_parts(rollout.completion, rollout.prompt_text)
            flagged = parts is None or parts.label != "safe"
        return None if flagged is None else -1.0 if flagged else 0.0

    def tokens(self, rollout: Rollout) -> list[bool] | None:
        return rollout.note.tokens if rollout.note else None

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]
        if self._moves:
            self.multiplier = state["multiplier"]

    @property
    def _moves(self) -> bool:
        return self.mode == "reward" and self.constraint == "lagrangian"

    def _continued(self, batch: RewardBatch, sound: Sequence[int], **which: bool) -> list[str | None]:
        """A policy's labels of the rollouts that are in format; None for the others and where a label is malformed."""
        prompts = [monitor_prompt(batch.rollouts[i], batch.decode) for i in sound]
        texts = batch.generate(prompts, max_new_tokens=self.max_new_tokens, temperature=0.0, **which)
        labels: list[str | None] = [None] * len(batch.rollouts)
        for i, text in zip(sound, texts, strict=True):
            labels[i] = parse_verdict(text)
        return labels

    def _learn_from(self, judged: Sequence[Judged], batch: RewardBatch) -> None:
        """Lambda and metrics, from the rollouts of all ranks."""
        flags = [one.flagged for one in judged if one.flagged is not None]
        out_of_format = fmean(one.own_safe is None for one in judged)
        if out_of_format > MALFORMED:
            parts = "<think>, <monitor>, <label> and <output>, which prompt or warm start must teach"
            self._warn("malformed", f"{out_of_format:.0%} of the rollouts lack the parts {parts}, and are flagged")
        asked = [one for one in judged if one.own_safe is not None and one.flagged is not None]
        unreadable = bool(asked) and fmean(one.unparsed for one in asked) > UNREADABLE
        if unreadable:
            count = sum(one.unparsed for one in asked)
            self._warn("unparsed", f"no label, safe or unsafe, can be read from {count} of the monitor's {len(asked)} "
                                   "answers, and each of these thoughts counts as flagged")  # fmt: skip
        silent = len(flags) < (1 - UNREADABLE) * len(judged)
        if flags and self._moves and not (self.external and (unreadable or silent)):
            self.multiplier = next_multiplier(self.multiplier, fmean(flags), self.slack, self.rate, self.cap)
        found = monitor_metrics(judged) | {"lambda": self.multiplier}
        if "held_out_flag_rate" in found and flags:
            disagrees = found["held_out_flag_rate"] > found["flag_rate"] + self.slack
            found["alarm"] = float(found.get("safe", 0.0) > ALARM_SAFE and disagrees)
            found["drifted"] = float(found["flag_rate"] > max(DRIFTED, 2 * found["held_out_flag_rate"]))
            if found["drifted"] and not unreadable:
                self._warn(
                    "drifted",
                    f"the self-monitor flags {found['flag_rate']:.1%} of rollouts and the held-out monitor "
                    f"{found['held_out_flag_rate']:.1%}: it may punish at random by now; lower the learning rate",
                )
            if found["alarm"]:
                self._warn(
                    "alarm",
                    f"{found['safe']:.1%} of thoughts pass the self-monitor, and the held-out monitor flags "
                    f"{found['held_out_flag_rate']:.1%}: the policy may have learned to pass it",
                )
        for name, value in found.items():
            batch.log(f"self_monitor/{name}", value)

    def _warn(self, about: str, text: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            say(f"warning: self_monitor: {text}.")


def next_multiplier(multiplier: float, flag_rate: float, slack: float, rate: float, cap: float) -> float:
    """lambda <- clip(lambda + rate·(flag rate - slack), 0, cap)."""
    return min(cap, max(0.0, multiplier + rate * (flag_rate - slack)))


def monitor_metrics(judged: Sequence[Judged]) -> dict[str, float]:
    """The module docstring's metrics by name; one that has nothing to be computed from is left out."""
    answered = [one for one in judged if one.flagged is not None]
    known = [one for one in answered if one.deceptive is not None]
    held_out = [one for one in judged if one.held_out is not None]
    shares: dict[str, list[Any]] = {
        "flag_rate": [one.flagged for one in answered],
        "safe": [not one.flagged for one in answered if one.own_safe is not None],
        "own_safe": [one.own_safe for one in judged if one.own_safe is not None],
        "malformed": [one.own_safe is None for one in judged],
        "unparsed": [one.unparsed for one in judged],
        "unanswered": [one.flagged is None for one in judged],
        "precision": [one.deceptive for one in known if one.flagged],
        "recall": [one.flagged for one in known if one.deceptive],
        "held_out_flag_rate": [one.held_out for one in held_out],
        "held_out_recall": [one.held_out for one in held_out if one.deceptive],
    }
    return {name: fmean(values) for name, values in shares.items() if values}


def _truth(rollout: Rollout) -> bool | None:
    deceptive = getattr(rollout.task, "deceptive", None)
    return deceptive(rollout.completion, rollout.row) if deceptive else None
