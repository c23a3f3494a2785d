"""Means, intervals, unbiased pass@k and paired comparison. Pure; the standard library only."""

import math
from collections.abc import Hashable, Iterable, Sequence
from random import Random
from statistics import fmean

Z95 = 1.96
RESAMPLES = 2000
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond them, the next lower one is a little too wide.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 29: 2.045}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k answers is right, from `right` of `samples`: 1 − C(n−c, k) / C(n, k).

    Unbiased, where 1 − (1 − c/n)^k is not (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is not 1 to `samples`, or `right` not 0 to `samples`.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"expected 1 <= k <= samples and 0 <= right <= samples, got {k}, {right} of {samples}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def wilson_interval(right: float, count: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927): honest near 0 and 1, where the normal one is not."""
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    # exact at the ends, where rounding would leave 1e-17
    return (0.0 if right == 0 else low), (1.0 if right == count else high)


def share_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of one share a problem: Wilson's where each is 0 or 1, else a bootstrap over problems.

    Shares that are all equal have no spread to draw from: Wilson's then, which is at most too wide.
    """
    if set(values) <= {0.0, 1.0} or len(set(values)) == 1:
        return wilson_interval(sum(values), len(values))
    return bootstrap_interval(values, seed)


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979), problems drawn with replacement.

    Cost: `resamples` x len(values) draws, about 0.1 µs each.
    """
    rng = Random(seed)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    cut = round(0.025 * resamples)
    return means[cut], means[resamples - 1 - cut]


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """95 % bootstrap interval of the mean of what has no bounds; unknown where all are equal, as of one value alone:
    nothing then tells how far another would lie.
    """
    return bootstrap_interval(values, seed) if _differ(values) else (None, None)


def gain_interval(gains: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of differences of two shares in [0, 1], one a problem: a bootstrap over problems.

    Gains that are all equal have no spread to draw from. Then it is `paired_difference`'s of as many pairs with the
    same mean, whose discordant ones, if any, are all on one side: gains of one sign and that mean spread no more.
    """
    if _differ(gains):
        return bootstrap_interval(gains, seed)
    total = sum(gains)
    _, low, high = paired_difference(max(total, 0), max(-total, 0), len(gains))
    return low, high


def _differ(values: Sequence[float]) -> bool:
    """Whether values differ by more than rounding: 2/3 - 1/3 is not quite 1 - 2/3."""
    return bool(values) and not math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-12)


def t95(free: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    return T95[max(known for known in T95 if known <= free)]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: of the pairs that differ, were as many better as worse? (McNemar 1947)

    Args:
        only_first: pairs that the first alone got right.
        only_second: pairs that the second alone got right.
    """
    differing = only_first + only_second
    tail = sum(math.comb(differing, i) for i in range(min(only_first, only_second) + 1)) / 2**differing
    return min(1.0, 2 * tail)


def paired_difference(only_first: float, only_second: float, pairs: int, z: float = Z95) -> tuple[float, float, float]:
    """Share of the first minus the second over the same items, and its 95 % interval.

    The interval adds half a pair to each of the four cells, and so holds for few pairs too (Agresti and Min 2005).
    """
    first, second, count = only_first + 0.5, only_second + 0.5, pairs + 2
    centre = (first - second) / count
    spread = z * math.sqrt(first + second - (first - second) ** 2 / count) / count
    return (only_first - only_second) / pairs, max(-1.0, centre - spread), min(1.0, centre + spread)


def jaccard(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    """|A ∩ B| / |A ∪ B| of what occurs in each; 1 where both are empty."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one or other else 1.0


def means(entries: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number over the entries that have it and where it is finite; NaN where there are none."""
    names = sorted({name for entry in entries for name in entry})
    values = {name: [entry[name] for entry in entries if math.isfinite(entry.get(name, math.nan))] for name in names}
    return {name: fmean(given) if given else math.nan for name, given in values.items()}
