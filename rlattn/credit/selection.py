"""Which tokens a rule picks. Pure: tensors in, tensors out; torch is not imported before a tensor comes along.

Legend: B rollouts, N positions (prompt and completion). Scores are NaN where undefined.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Select = Literal["top", "bottom"]
PEAKS = 0.2


def top_fraction(scores_BN: Tensor, mask_BN: Tensor, fraction: float, select: Select = "top") -> Tensor:
    """Bool: the ceil(fraction·n) highest (or lowest) scores among the n response tokens of every row.

    Equal scores go to the earlier token. An undefined score is never picked, so a row with fewer defined scores than
    that gives all of them. n counts every response token, defined or not.
    """
    defined_BN = mask_BN & ~scores_BN.isnan()
    keys_BN = (scores_BN if select == "top" else -scores_BN).masked_fill(~defined_BN, -math.inf)
    order_BN = keys_BN.argsort(dim=1, descending=True, stable=True)
    # In integers: 0.55 · 100 in floating point is a little more than 55, and would pick 56.
    exact = Fraction(fraction).limit_denominator(10**6)
    count_B1 = (mask_BN.sum(dim=1, keepdim=True) * exact.numerator + exact.denominator - 1) // exact.denominator
    first_BN = order_BN.new_ones(order_BN.shape).cumsum(dim=1) <= count_B1.clamp(min=1)
    return first_BN.scatter(1, order_BN, first_BN) & defined_BN


def peaks(scores_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Bool: a peak is a token among the top fifth of its response.

    With a fifth, chance for a token to lie at a peak or right after one is 1 − 0.8² = 0.36, as the 0.369 of
    arXiv 2510.13554 suggests (it does not state its threshold).
    """
    return top_fraction(scores_BN, mask_BN, PEAKS)


def at_or_after(peaks_BN: Tensor) -> Tensor:
    """Bool: a token that is a peak, or the next one after a peak."""
    return peaks_BN | shift(peaks_BN, 1, False)


def delta(waad_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Delta_t = |WAAD_t − WAAD_{t+1}| (arXiv 2510.13554, eq. 14): how sharply the look-back changes after a token.

    NaN unless the token and the very next position are response tokens: not at the end of the response, nor before a
    tool's answer.
    """
    both_BN = mask_BN & shift(mask_BN, -1, False)
    return (waad_BN - shift(waad_BN, -1, math.nan)).abs().masked_fill(~both_BN, math.nan)


def response_median(scores_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """The median of every row's response tokens, (B, 1); of two middle values the lower; NaN where there are none.

    "score <= median" picks the same tokens with the lower middle value as with the mean of the two.
    """
    return scores_BN.masked_fill(~mask_BN, math.nan).nanmedian(dim=1, keepdim=True).values


def largest_before(scores_BN: Tensor, lookback: int) -> tuple[Tensor, Tensor]:
    """The largest defined score among the `lookback` positions before each token, and how far back it is.

    Equal scores go to the earlier token. Cost: one pass a position looked back, all tokens at once.

    Returns:
        largest_BN: −inf where none is defined.
        lag_BN: 1..lookback; 0 where none is defined.
    """
    largest_BN = scores_BN.new_full(scores_BN.shape, -math.inf)
    lag_BN = largest_BN.new_zeros(scores_BN.shape)
    for lag in range(lookback, 0, -1):  # the earliest first, and only a larger score takes its place
        before_BN = shift(scores_BN, lag, math.nan)
        larger_BN = before_BN > largest_BN
        largest_BN = before_BN.where(larger_BN, largest_BN)
        lag_BN = lag_BN.masked_fill(larger_BN, lag)
    return largest_BN, lag_BN


def shift(values_BN: Tensor, by: int, fill: float | bool) -> Tensor:
    """Entry t becomes what entry t − by was; `fill` where there is none."""
    shifted_BN = values_BN.new_full(values_BN.shape, fill)
    if by > 0:
        shifted_BN[:, by:] = values_BN[:, :-by]
    else:
        shifted_BN[:, :by] = values_BN[:, -by:]
    return shifted_BN


def incomplete_rows(values_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Bool (B,): rows with an infinite or missing value at a response token.

    For signals that every response token has. Position 0 may miss one: nothing comes before it that could predict it.
    """
    missing_BN = values_BN.isnan()
    missing_BN[:, :1] = False
    return ((missing_BN | values_BN.isinf()) & mask_BN).any(dim=1)
