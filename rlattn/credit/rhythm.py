"""Credit from the rhythm of attention: local chunks, global anchors, and both coupled (arXiv 2510.13554).

A model plans at the start of a chunk (WAAD jumps) and later tokens keep looking back at a few anchors (high FAI). Cost:
signals only, some sorts of (B, N). Logs: see diagnostics.py. Legend: B rollouts, N positions.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlattn.credit.base import Ranked, attention_failed
from rlattn.credit.selection import delta, largest_before, response_median, shift, top_fraction
from rlattn.types import Credit, Signals

LARGEST_LOOKBACK = 100  # tokens; each is a pass over the batch


@dataclass(frozen=True, kw_only=True)
class LocalChunk(Ranked):
    """Raises the tokens after which the look-back distance changes most (arXiv 2510.13554, eq. 14-15).

    gamma_t = 1 + (amplification − 1)·[t in top fraction of Delta], Delta_t = |WAAD_t − WAAD_{t+1}|. A token whose
    successor is no response token has no Delta and is never picked.
    """

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        delta_BN = delta(signals.waad_BN, signals.mask_BN)
        picked_BN = top_fraction(delta_BN, signals.mask_BN, self.top_fraction, self.select)
        return self.credit(signals, picked_BN, delta_BN, attention_failed(signals))


@dataclass(frozen=True, kw_only=True)
class GlobalAnchor(Ranked):
    """Raises the tokens that later ones look back at most (arXiv 2510.13554, eq. 16-17).

    gamma_t = 1 + (amplification − 1)·[t in top fraction of FAI]. The last tokens of a response have no FAI (nothing
    comes Hlo later) and are never picked.
    """

    reads_fai: ClassVar[bool] = True

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        anchors_BN = top_fraction(signals.fai_BN, signals.mask_BN, self.top_fraction, self.select)
        return self.credit(signals, anchors_BN, signals.fai_BN, attention_failed(signals))


@dataclass(frozen=True, kw_only=True)
class CoupledRhythm(Ranked):
    """Raises anchors; a dominated one shares with the token that introduced it (arXiv 2510.13554, eq. 18-19).

    An anchor t (top fraction of FAI) is *dominated*, t in D, if WAAD_t <= tau_waad and the largest Delta among the
    `lookback` tokens before it is >= tau_delta; intro(t) is that token, the earlier of equals. With
    b = amplification − 1,

        gamma_t = 1 + b·[t in anchors \\ D] + (1 − alpha)·b·[t in D] + alpha·b·[t in intro(D)].

    The terms add: a token can be an anchor and introduce another. Two anchors with one intro raise it once. Decided
    here, where the paper is silent: tau_waad is the median WAAD of the response, tau_delta the smallest Delta of its
    top fraction. `select: bottom` takes the lowest FAI as anchors; what dominates stays the same.
    """

    reads_fai: ClassVar[bool] = True

    lookback: int = 3
    """k: how many tokens before an anchor may have introduced it (the paper tries 1 to 3)."""
    alpha: float = 0.5
    """The share of a dominated anchor's gain that goes to its intro."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.lookback <= LARGEST_LOOKBACK:
            raise ValueError(f"lookback: expected 1 to {LARGEST_LOOKBACK}, got {self.lookback}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected 0 to 1, got {self.alpha}")

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        waad_BN, mask_BN = signals.waad_BN, signals.mask_BN
        anchors_BN = top_fraction(signals.fai_BN, mask_BN, self.top_fraction, self.select)
        delta_BN = delta(waad_BN, mask_BN)
        preplans_BN = top_fraction(delta_BN, mask_BN, self.top_fraction)
        # No preplan token (a one-token response): no Delta reaches infinity, so nothing is dominated.
        tau_delta_B1 = delta_BN.masked_fill(~preplans_BN, float("inf")).amin(dim=1, keepdim=True)
        largest_BN, lag_BN = largest_before(delta_BN, self.lookback)
        looks_near_BN = waad_BN <= response_median(waad_BN, mask_BN)
        dominated_BN = anchors_BN & looks_near_BN & (largest_BN >= tau_delta_B1)
        intro_BN = mask_BN.new_zeros(mask_BN.shape)
        for lag in range(1, self.lookback + 1):
            intro_BN |= shift(dominated_BN & (lag_BN == lag), -lag, False)
        gain_BN = (
            (anchors_BN & ~dominated_BN).float()
            + (1 - self.alpha) * dominated_BN.float()
            + self.alpha * intro_BN.float()
        )
        return self.credit(signals, gain_BN, signals.fai_BN, attention_failed(signals))
