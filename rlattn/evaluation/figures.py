"""From answers to figures: shares with intervals, the effort curve, the paired comparison. No model, no files."""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlattn.statistics import (
    gain_interval,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    pass_at_k,
    share_interval,
)

if TYPE_CHECKING:
    from rlattn.evaluation.answers import Answer


def figures(answers: "Sequence[Answer]", ks: Sequence[int], shares: Collection[str] = ()) -> dict[str, Any]:
    """Everything that is told about one model.

    Every figure is a mean over problems, of `value`, `low` and `high` (95 %, None where unknown), and of its `kind`:
    `share` or `mean`. A row asked at several efforts counts as one problem. `pass@k` is unbiased; `metrics` are the
    task's own, over the answers where they are finite numbers; `efforts` is empty where there are none. Answers that
    the task's verifier failed on are left out of pass@k, problems with fewer than k others too; `verify_failed` and
    `metrics_failed` count, if any.

    Args:
        shares: the metrics that are shares, as the task says.
    """
    problems = _by_row(answers)
    efforts = sorted({answer.item.effort for answer in answers if answer.item.effort is not None})
    names = sorted({name for answer in answers for name in answer.measured or ()})
    failed = {
        "verify_failed": sum(answer.right is None for answer in answers),
        "metrics_failed": sum(answer.measured is None for answer in answers),
    }
    return {
        "problems": len(problems),
        "answers": len(answers),
        **{name: count for name, count in failed.items() if count},
        **{f"pass@{k}": _pass_at(problems, k) for k in ks},
        "mean_length": mean_figure([fmean(answer.tokens for answer in problem) for problem in problems]),
        "cut_share": fmean(answer.cut for answer in answers),
        "metrics": {
            name: (share_figure if name in shares else mean_figure)(_measured(problems, name)) for name in names
        },
        "efforts": [_at_effort([a for a in answers if a.item.effort == effort], effort, ks) for effort in efforts],
    }


def comparison(first: "Sequence[Answer]", second: "Sequence[Answer]") -> dict[str, Any]:
    """The first model against the second on the same problems: pass@1 first minus second, with its 95 % interval; empty
    where no problem has a verdict on both.

    Where every problem has one answer of each, McNemar's exact test as well. Otherwise a bootstrap over problems.
    """
    ones = [_solved(problem, 1) for problem in _by_row(first)]
    others = [_solved(problem, 1) for problem in _by_row(second)]
    pairs = zip(ones, others, strict=True)
    gains = [one - other for one, other in pairs if one is not None and other is not None]
    if not gains:
        return {}
    found: dict[str, Any] = {}
    if len(first) == len(ones):
        only_first, only_second = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        value, low, high = paired_difference(only_first, only_second, len(gains))
        found = {
            "only_first_right": only_first,
            "only_second_right": only_second,
            "mcnemar_p": mcnemar_exact(only_first, only_second),
        }
    else:
        value, (low, high) = fmean(gains), gain_interval(gains)
    difference = {"value": value, "low": low, "high": high, "count": len(gains)}
    found = {"problems": len(gains), "difference": difference, **found}
    names = sorted({name for answer in (*first, *second) for name in answer.measured or ()})
    found["metrics"] = {name: paired for name in names if (paired := _paired(first, second, name))}
    return found


def _by_row(answers: "Sequence[Answer]") -> "list[list[Answer]]":
    ordered = sorted(answers, key=lambda answer: answer.item.index)
    return [list(group) for _, group in groupby(ordered, key=lambda answer: answer.item.index)]


def _solved(problem: "Sequence[Answer]", k: int) -> float | None:
    """pass@k of a problem, the mean over its efforts; None where one of them has fewer than k verdicts."""
    right: dict[float | None, list[bool]] = {answer.item.effort: [] for answer in problem}
    for answer in problem:
        if answer.right is not None:
            right[answer.item.effort].append(answer.right >= 1)
    if any(len(flags) < k for flags in right.values()):
        return None
    return fmean(pass_at_k(len(flags), sum(flags), k) for flags in right.values())


def _pass_at(problems: "Sequence[Sequence[Answer]]", k: int) -> dict[str, Any]:
    return share_figure([share for problem in problems if (share := _solved(problem, k)) is not None])


def _measured(problems: "Sequence[Sequence[Answer]]", name: str) -> list[float]:
    """The metric's mean in every problem that has it."""
    found = [[(answer.measured or {}).get(name, math.nan) for answer in problem] for problem in problems]
    found = [[value for value in values if math.isfinite(value)] for values in found]
    return [fmean(values) for values in found if values]


def _at_effort(answers: "Sequence[Answer]", effort: float, ks: Sequence[int]) -> dict[str, Any]:
    problems = _by_row(answers)
    return {
        "effort": effort,
        **{f"pass@{k}": _pass_at(problems, k) for k in ks},
        "thought_tokens": mean_figure([fmean(answer.thought for answer in problem) for problem in problems]),
        "mean_length": mean_figure([fmean(answer.tokens for answer in problem) for problem in problems]),
    }


def _paired(first: "Sequence[Answer]", second: "Sequence[Answer]", name: str) -> Mapping[str, Any] | None:
    """The metric's mean difference over the problems where both have it."""
    gains = []
    for one, other in zip(_by_row(first), _by_row(second), strict=True):
        mine, theirs = _measured([one], name), _measured([other], name)
        if mine and theirs:
            gains.append(mine[0] - theirs[0])
    return mean_figure(gains) if gains else None


def share_figure(values: Sequence[float]) -> dict[str, Any]:
    """The mean of shares in [0, 1], one a problem, its interval, and of how many; of nothing, None."""
    low, high = share_interval(values) if values else (None, None)
    return _figure("share", values, low, high)


def mean_figure(values: Sequence[float]) -> dict[str, Any]:
    """The mean of numbers without bounds, its interval (None where unknown) and of how many; of nothing, None too."""
    return _figure("mean", values, *mean_interval(values))


def _figure(kind: str, values: Sequence[float], low: float | None, high: float | None) -> dict[str, Any]:
    return {
        "kind": kind, "value": fmean(values) if values else None, "low": low, "high": high, "count": len(values),
    }  # fmt: skip
