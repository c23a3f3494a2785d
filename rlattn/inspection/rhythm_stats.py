"""The rhythm of attention in three numbers (arXiv 2510.13554, table 2), each against shuffled positions. Pure.

Each is the mean of a value over the peaks of a signal (`credit.selection.peaks`: the top fifth of a response):

- `entropy_at_waad_peaks`: entropy over mean entropy, at WAAD peaks. Do tokens that look far back decide something?
- `receiver_at_global_peaks`: whether the global heads' FAI peaks there too, at the FAI peaks of the receiver heads. Do
  two ways to choose heads find the same anchors? Heads in both sets make part of it trivial: report how many there are.
- `fai_at_or_after_waad_peaks`: whether WAAD peaks there or one token before, at FAI peaks. Does looking far back
  introduce anchors?

Chance is the same mean after the peaks of every response are moved to random tokens, among those where their signal is
defined (FAI is not at the end of a response); the values stay where they are. So neither the undefined tail nor the
clustering of the values counts as rhythm. A trend along the response does: FAI of near-uniform attention falls from the
first token to the last in every head, so an untrained model's receiver and global peaks coincide far above chance.
Tokens are shuffled one by one: the spread is that of the shuffles, not of the choice of texts.

Legend: B rollouts, N positions. Cost: two sorts of (B, N) a shuffle and statistic.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlattn.credit.selection import at_or_after, peaks
from rlattn.types import Signals

SHUFFLES = 100


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A mean over peaks, and what chance would give. NaN where there is no peak."""

    value: float
    chance: float
    """Mean over the shuffles."""
    chance_std: float
    """Standard deviation over the shuffles."""
    peaks: int
    """How many tokens the mean runs over."""


def rhythm_statistics(
    signals: Signals, receiver_fai_BN: Tensor, *, shuffles: int = SHUFFLES, seed: int = 0
) -> dict[str, Statistic]:
    """The three statistics above over all rollouts, every peak counting once.

    Args:
        signals: with entropy.
        receiver_fai_BN: FAI averaged over the receiver heads, NaN where undefined.
        shuffles: at least 2.
        seed: of the shuffles; all statistics draw from one stream.

    Raises:
        ValueError: the signals hold no entropy.
    """
    if signals.entropy_BN is None:
        raise ValueError("the statistics need the entropy of every token")
    mask_BN = signals.mask_BN
    waad_peaks_BN = peaks(signals.waad_BN, mask_BN)
    global_peaks_BN = peaks(signals.fai_BN, mask_BN)
    receiver_peaks_BN = peaks(receiver_fai_BN, mask_BN)
    relative_entropy_BN = signals.entropy_BN / signals.entropy_BN[mask_BN].nanmean()
    draw = _uniform(mask_BN, seed)

    def against_chance(values_BN: Tensor, peaks_BN: Tensor, signal_BN: Tensor) -> Statistic:
        movable_BN = mask_BN & ~signal_BN.isnan()
        moved = (shuffled_peaks(peaks_BN, movable_BN, draw()) for _ in range(shuffles))
        chance_S = torch.stack([values_BN[moved_BN].nanmean() for moved_BN in moved])
        return Statistic(
            value=values_BN[peaks_BN].nanmean().item(),
            chance=chance_S.mean().item(),
            chance_std=chance_S.std().item(),
            peaks=int(peaks_BN.sum()),
        )

    return {
        "entropy_at_waad_peaks": against_chance(relative_entropy_BN, waad_peaks_BN, signals.waad_BN),
        "receiver_at_global_peaks": against_chance(global_peaks_BN.float(), receiver_peaks_BN, receiver_fai_BN),
        "fai_at_or_after_waad_peaks": against_chance(
            at_or_after(waad_peaks_BN).float(), global_peaks_BN, signals.fai_BN
        ),
    }


def shuffled_peaks(peaks_BN: Tensor, movable_BN: Tensor, draw_BN: Tensor) -> Tensor:
    """Bool: as many tokens of every row as it has peaks, those of the lowest draws among the movable ones."""
    order_BN = draw_BN.masked_fill(~movable_BN, torch.inf).argsort(dim=1)
    rank_BN = order_BN.argsort(dim=1)
    return (rank_BN < peaks_BN.sum(dim=1, keepdim=True)) & movable_BN


def _uniform(mask_BN: Tensor, seed: int) -> Callable[[], Tensor]:
    """Uniform numbers of the mask's shape, the same on any device and apart from the caller's generators."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.rand(mask_BN.shape, generator=generator).to(mask_BN.device)
