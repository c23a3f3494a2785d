"""Signs of collapse in a run's metrics, each with what to do about it. Pure: rows of metrics.jsonl in, findings out.

Levels are means over the last WINDOW logged steps, changes compare them with the first WINDOW; nothing is said before
there are enough of both. Held-out accuracy is compared with the intervals of the first and of the best evaluation.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

WINDOW = 10
SHORT = 3  # steps after which a run without any signal is told
LOW, SURE = 0.5, 2.0  # standard deviations of a batch, and of a mean: from there on failures go with low reward
COUNTED = ("/failed", "/metrics_failed", "/nonfinite_rows", "/refused_rows")
ACCURACY = "eval/accuracy"
OUT_OF_FORMAT = ("self_monitor/malformed", "task/invalid", "task/malformed")


@dataclass(frozen=True, kw_only=True)
class Alarm:
    name: str
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.found} {self.advice}"


def find_alarms(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    """What is wrong at the end of `rows`."""
    checks = (_failures, _zero_std, _duplicates, _entropy, _length, _format, _reward, _monitor, _weights)
    steps = [row for row in rows if row.get("step")]  # 0 is the evaluation before training
    return [*_held_out(rows), *_of_task(rows), *(alarm for check in checks for alarm in check(steps))]


def onset(rows: Sequence[dict[str, Any]], name: str) -> int:
    """The step at which an alarm that stands at the end of `rows` was first raised. Cost: log2(steps) looks."""

    def told(end: int) -> bool:
        return any(alarm.name == name for alarm in find_alarms(enough_for_alarms(rows[: end + 1])))

    return int(rows[bisect_left(range(len(rows) - 1), True, key=told)]["step"])


def enough_for_alarms(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the same alarms: a long run is not read again at every step."""
    ends = 3 * WINDOW  # more than two windows: not every step logs every number
    kept = [row for row in rows[ends:-ends] if ACCURACY in row or any(row[k] for k in row if k.endswith(COUNTED))]
    return [*rows[:ends], *kept, *rows[max(ends, len(rows) - ends) :]] if len(rows) > 2 * ends else list(rows)


def _held_out(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    evaluated = [row for row in rows if values([row], ACCURACY)]
    if len(evaluated) < 2 or not (low := values(evaluated[:1], "eval/low")):
        return []
    best = max(evaluated, key=lambda row: row[ACCURACY])
    now, high = evaluated[-1][ACCURACY], sum(values(evaluated[-1:], "eval/high"))
    # the best of many is the luckiest: then the intervals must not meet
    fell = now < low[0] and high < evaluated[0][ACCURACY]
    before = evaluated[0] if fell else best if high < sum(values([best], "eval/low")) else None
    if before is None:
        return []
    text = f"Held-out accuracy fell from {100 * before[ACCURACY]:.1f} % (step {before['step']}) to {100 * now:.1f} %."
    advice = (
        "If a reward rises meanwhile, it pays for something else; if none does, lower learning_rate. "
        "resume.keep_best keeps the best checkpoint."
    )
    return [Alarm(name="held-out accuracy", found=text, advice=advice)]


def _failures(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    found = []
    for key in sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/failed")}):
        total = sum(values(rows, key))
        if total:
            name = key.split("/")[1]
            text = f"Reward '{name}' failed on {_counted(total)} rollouts."
            found.append(Alarm(name=key, found=text, advice="failures.jsonl in the run's folder holds the first ones."))
            if hidden := hidden_by_failures(
                total, _mean_gap(rows, name), _spread(rows, name) if total >= WINDOW else None
            ):
                advice = "Give such a rollout the score it deserves instead of raising."
                found.append(Alarm(name=f"{key}, bias", found=f"Reward '{name}':{hidden}", advice=advice))
    return found


def hidden_by_failures(count: float, gap: float | None, spread: float | None) -> str:
    """A sentence, with a space before it, where a reward seems to fail on bad rollouts: these are then paid the mean of
    the good ones. Empty where nothing tells so.

    Args:
        count: rollouts on which it failed.
        gap: what these were paid less what the others were, in standard deviations (`failed_gap`).
        spread: standard deviation of the reward where it did not fail.
    """
    if gap is not None and gap <= -LOW and gap * math.sqrt(count) <= -SURE:
        return (
            f" Failures and low reward go together: what it failed on got {-gap:.1f} standard deviations less than the "
            "rest, although neutral pays the mean of its group."
        )
    if spread == 0:
        return (
            " Wherever it did not fail it gave the same number: if it fails on bad rollouts, they are paid as the good "
            "ones, and it teaches nothing."
        )
    return ""


def _mean_gap(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """`failed_gap` over all failures: batches with more of them count for more."""
    both = ([sum(values([row], f"rewards/{name}/{key}")) for key in ("failed", "failed_gap")] for row in rows)
    found = [(failed, gap) for failed, gap in both if failed and gap]
    return sum(failed * gap for failed, gap in found) / sum(failed for failed, _ in found) if found else None


def _spread(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """The largest standard deviation of a reward in a batch with failures."""
    return max(values([row for row in rows if row.get(f"rewards/{name}/failed")], f"rewards/{name}/std"), default=None)


def _of_task(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    """Methods of the task that failed, before training too."""
    found = []
    for key, method, without in (
        ("eval/failed", "verify", "held-out completions: accuracy speaks of the others alone"),
        ("eval/metrics_failed", "metrics", "held-out completions, which its numbers leave out"),
        ("task/metrics_failed", "metrics", "rollouts, which its numbers leave out"),
    ):
        if total := sum(values(rows, key)):
            text = f"The task's {method}() failed on {math.ceil(total)} {without}."
            found.append(Alarm(name=key, found=text, advice="The run's output names the first cause: mend it there."))
    return found


def _zero_std(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    late, logged = last(rows, "groups_without_signal"), values(rows, "groups_without_signal")
    if (
        late is None and len(logged) >= SHORT and min(logged) == 1
    ):  # a trial of a few steps, in which nothing is learned
        late = 1.0
    if late is None or late <= 0.8:
        return []
    text = f"In {100 * late:.0f} % of the groups all rollouts got the same reward: they teach nothing."
    advice = "Take rows of middling difficulty, more num_generations, a higher temperature or a finer reward."
    return [Alarm(name="zero-std groups", found=text, advice=advice)]


def _duplicates(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    late = last(rows, "completions/duplicates")
    if late is None or late <= 0.9:
        return []
    text = f"{100 * late:.0f} % of the rollouts repeat another of their group word for word."
    return [Alarm(name="duplicate completions", found=text, advice="Raise the temperature or lower learning_rate.")]


def _entropy(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    early, late = first(rows, "entropy"), last(rows, "entropy")
    if early is None or late is None or early <= 0:
        return []
    if late < 0.2 * early:
        text = f"Entropy fell from {early:.3g} to {late:.3g} nats a token: the policy has stopped exploring."
        return [Alarm(name="entropy", found=text, advice="Lower learning_rate, raise epsilon_high or add beta.")]
    if late > 3 * early:
        text = f"Entropy rose from {early:.3g} to {late:.3g} nats a token: the policy is dissolving."
        return [Alarm(name="entropy", found=text, advice="Lower learning_rate or add beta.")]
    return []


def _length(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    found = []
    clipped = last(rows, "completions/clipped_ratio")
    if clipped is not None and clipped > 0.3:
        text = f"{100 * clipped:.0f} % of the rollouts were cut at max_completion_length, most before their answer."
        advice = "Raise max_completion_length, or check that the policy ends its answers (stop_strings, end token)."
        found.append(Alarm(name="clipped completions", found=text, advice=advice))
    early, late = first(rows, "completions/mean_length"), last(rows, "completions/mean_length")
    short_pays = any(values(rows[-1:], key) for key in ("effort/average", "rewards/brevity/mean"))
    if early and late is not None and (late > 2 * early or (late < 0.5 * early and not short_pays)):
        text = f"Completions went from {early:.0f} to {late:.0f} tokens."
        advice = "Read some in the token view: is it reasoning, or is it padding or guessing?"
        found.append(Alarm(name="length", found=text, advice=advice))
    return found


def _format(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    early, late = first(rows, "rewards/format/mean"), last(rows, "rewards/format/mean")
    if early is not None and late is not None and late < early - 0.2:
        text = f"The format reward fell from {early:.2f} to {late:.2f}."
        return [Alarm(name="format", found=text, advice="Give it more weight, or make accuracy require it.")]
    for key in OUT_OF_FORMAT:
        early, late = first(rows, key), last(rows, key)
        if early is not None and late is not None and late > early + 0.2:
            text = f"{key} rose from {early:.2f} to {late:.2f}: the policy loses the format."
            return [Alarm(name="format", found=text, advice="Add the reward format, or lower learning_rate.")]
    return []


def _reward(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    early, late, spread = first(rows, "reward"), last(rows, "reward"), last(rows, "reward_std")
    weights = {key for row in rows[-1:] for key in row if re.fullmatch(r"rewards/\w+/weight", key)}
    if any(first(rows, key) != last(rows, key) for key in weights):
        return []  # a sum of other weights
    if early is None or late is None or late >= early - 0.5 * (spread or 0) or late >= early:
        return []
    text = f"The reward fell from {early:.3g} to {late:.3g}."
    return [Alarm(name="reward", found=text, advice="Lower learning_rate; look at the reward's parts below.")]


def _monitor(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    judged = [row for row in rows if values([row], "self_monitor/alarm")]
    if not judged:
        return []
    safe, flagged, held_out = (
        sum(values(judged[-1:], f"self_monitor/{n}")) for n in ("safe", "flag_rate", "held_out_flag_rate")
    )
    if judged[-1]["self_monitor/alarm"]:
        text = (
            f"{100 * safe:.0f} % of the rollouts pass the self-monitor; the one of step 0 flags {100 * held_out:.0f} %."
        )
        advice = "The policy may have learned to pass it: read the thoughts; take source external, or a larger lag."
        return [Alarm(name="safe share", found=text, advice=advice)]
    if judged[-1].get("self_monitor/drifted"):
        text = (
            f"The self-monitor flags {100 * flagged:.0f} % of the rollouts, the one of step 0 {100 * held_out:.0f} %."
        )
        return [Alarm(name="monitor drift", found=text, advice="It punishes at random: lower learning_rate.")]
    return []


def _weights(rows: Sequence[dict[str, Any]]) -> list[Alarm]:
    found = []
    effective, undefined = last(rows, "credit/effective_tokens"), last(rows, "credit/share_undefined")
    if effective is not None and effective < 0.5:
        text = f"A few tokens carry the gradient, as if only {100 * effective:.0f} % of them had a weight."
        found.append(Alarm(name="weight concentration", found=text, advice="Lower amplification, raise top_fraction."))
    if undefined is not None and undefined > 0.5:
        text = f"{100 * undefined:.0f} % of the tokens have no score for the credit rule."
        advice = "Completions are short for attention.horizon: lower its first number."
        found.append(Alarm(name="undefined signals", found=text, advice=advice))
    bad = sum(values(rows, "credit/nonfinite_rows"))
    if bad:
        text = f"{_counted(bad)} rollouts had signals that are not finite; they were trained with weight 1."
        found.append(Alarm(name="nonfinite signals", found=text, advice="Use bfloat16 or float32, not float16."))
    refused = sum(values(rows, "credit/refused_rows"))
    if refused:
        text = f"In {_counted(refused)} rollouts the credit rule failed, or gave negative, endless or huge weights."
        advice = "They were trained with weight 1, as in plain GRPO: mend the rule."
        found.append(Alarm(name="refused weights", found=text, advice=advice))
    return found


def _counted(total: float) -> str:
    """A log line that speaks for several steps has the mean of their counts."""
    return f"{total:.0f}" if total == int(total) else f"{math.ceil(total)} or more"


def values(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    found = (row.get(key) for row in rows)
    return [value for value in found if isinstance(value, int | float) and abs(value) < float("inf")]


def first(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean of the first WINDOW values; None unless as many others follow."""
    found = values(rows, key)
    return fmean(found[:WINDOW]) if len(found) >= 2 * WINDOW else None


def last(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    found = values(rows, key)
    return fmean(found[-WINDOW:]) if len(found) >= WINDOW else None
