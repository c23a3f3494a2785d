"""What a credit rule did to a batch, as metrics. Pure; one sort of all tokens, four of the rows; no wait for a GPU.

Every mean runs over the response tokens of the whole batch. A metric is NaN where it has nothing to measure (no
anchors, no attention captured): leave it out of averages. The ranges in brackets are for the defaults, amplification
1.5 and top_fraction 0.4.

- `credit/mean`: mean weight [1.2 for a top-fraction rule; 1 under mean_one]. Losses that divide by the token count
  (dapo, cispo) take steps this much larger.
- `credit/max`: largest weight [1.5; 1.75 for coupled_rhythm, where an anchor can introduce another].
- `credit/share_amplified`: share of tokens with a weight above 1 [0.40 to 0.42, a little above top_fraction since
  short responses round up]. Far below: signals are undefined, see share_undefined.
- `credit/gini`: inequality of the weights, 0 equal to 1 all on one token (arXiv 2606.00257) [0.10].
- `credit/effective_tokens`: (sum w)^2 / (n · sum w^2), the share of tokens that carry the gradient (arXiv 2606.00257)
  [0.96; 1 where all are equal]. Below about 0.5 few tokens decide the step.
- `credit/share_undefined`: share of tokens whose score is undefined, so that the rule cannot pick them [about
  Hlo / length for FAI, 1 / length for Delta]. Near 1: responses too short for the horizon.
- `credit/anchor_preplan_overlap`: share of the anchors (top fraction of FAI) that are preplan tokens as well (top
  fraction of Delta) [chance: top_fraction]. Near 1, local and global credit say the same.
- `credit/waad_entropy_coupling`: mean entropy at WAAD peaks over mean entropy, only where entropy was captured [above
  1; the paper measures 0.361 / 0.239 = 1.52]. At 1 the rhythm is unrelated to uncertainty.
- `credit/fai_waad_coupling`: share of FAI peaks at a WAAD peak or right after one [chance 0.36; the paper 0.525].
- `credit/nonfinite_rows`: rollouts whose signals are not finite where they must be; they get weight 1 [0].
- `credit/refused_rows`, added by `compute_credit`: rollouts whose weights (of a user's rule) are negative, not finite
  or too large, or whose rule failed; they get weight 1 [0].
- `credit/strength`, added by the trainer: how far the schedule lets the weights count, 0 to 1 [1].

All but the last are of the rule's own weights, before the schedule and before `sign`. A peak is a token among the top
fifth of its response (`selection.peaks`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlattn.credit.selection import at_or_after, delta, peaks, top_fraction
from rlattn.types import Signals

if TYPE_CHECKING:
    from torch import Tensor


def diagnose(
    weights_BN: Tensor,
    signals: Signals,
    *,
    failed_B: Tensor | None = None,
    undefined_BN: Tensor | None = None,
    fraction: float = 0.4,
) -> dict[str, Tensor]:
    """The metrics above, as scalar tensors on the weights' device.

    Args:
        weights_BN: final weights, float32.
        failed_B: bool, rollouts whose signals were not usable; they are left out of the couplings. None for none.
        undefined_BN: bool, tokens without a score. None for none.
        fraction: what counts as an anchor and as a preplan token.
    """
    mask_BN = signals.mask_BN
    failed_B = mask_BN.new_zeros(len(mask_BN)) if failed_B is None else failed_B
    undefined_BN = mask_BN.new_zeros(mask_BN.shape) if undefined_BN is None else undefined_BN
    counted_BN = mask_BN.clone()
    counted_BN[:1, :1] |= ~mask_BN.any()  # no response at all: one token of weight 1
    weights_BN = weights_BN.masked_fill(~mask_BN, 1)
    count, total = counted_BN.sum(), weights_BN.masked_fill(~counted_BN, 0).sum()
    sorted_M = weights_BN.masked_fill(~counted_BN, math.inf).flatten().sort().values  # M = B * N
    place_M = sorted_M.new_ones(len(sorted_M)).cumsum(dim=0)
    spread_M = ((2 * place_M - count - 1) * sorted_M).masked_fill(place_M > count, 0)
    sound_BN = mask_BN & ~failed_B[:, None]
    anchors_BN = top_fraction(signals.fai_BN, sound_BN, fraction)
    preplans_BN = top_fraction(delta(signals.waad_BN, sound_BN), sound_BN, fraction)
    waad_peaks_BN = peaks(signals.waad_BN, sound_BN)
    fai_peaks_BN = peaks(signals.fai_BN, sound_BN)
    metrics = {
        "mean": total / count,
        "max": weights_BN.masked_fill(~counted_BN, -math.inf).max(),
        "share_amplified": _share(weights_BN > 1 + 1e-6, counted_BN),  # mean_one may miss 1 by a rounding
        "gini": spread_M.sum() / (count * total),
        "effective_tokens": total**2 / (count * (weights_BN**2).masked_fill(~counted_BN, 0).sum()),
        "share_undefined": _share(undefined_BN, mask_BN),
        "anchor_preplan_overlap": _share(preplans_BN, anchors_BN),
        "fai_waad_coupling": _share(at_or_after(waad_peaks_BN), fai_peaks_BN),
        "nonfinite_rows": failed_B.sum().float(),
    }
    if signals.entropy_BN is not None:
        at_peaks_BN, all_BN = (
            signals.entropy_BN.masked_fill(~chosen_BN, math.nan) for chosen_BN in (waad_peaks_BN, sound_BN)
        )
        metrics["waad_entropy_coupling"] = at_peaks_BN.nanmean() / all_BN.nanmean()
    return {f"credit/{name}": value for name, value in metrics.items()}


def _share(chosen_BN: Tensor, among_BN: Tensor) -> Tensor:
    """NaN among none."""
    return (chosen_BN & among_BN).sum() / among_BN.sum()
