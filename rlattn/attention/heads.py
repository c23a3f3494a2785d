"""Which layers and heads to read: the middle layers, local and global heads by span, receiver heads by kurtosis. Pure.

Legend: B rollouts, L chosen layers, H heads, N positions; M = L·H, the heads of all chosen layers, lower layers first.
"""

from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from rlattn.types import ATTENTION_LAYERS


def choose_layers(layer_count: int, usable: Collection[int] | None = None) -> tuple[int, ...]:
    """The layers to read, 0-based: five evenly spaced ones in the middle third (arXiv 2510.13554).

    They are the distinct values of round(a + i·(b − a)/4), i = 0..4, a = floor(L/3), b = floor(2L/3), halves to even:
    12, 15, 18, 21, 24 of 36 layers. A shallow model has fewer.

    Args:
        layer_count: layers of the model.
        usable: the layers that have a query and a key (not linear attention); None for all. Each wanted layer is then
            replaced by the nearest usable one, the lower of two equally near, and layers named twice are read once: a
            hybrid with few full-attention layers gives fewer than five rather than layers far from the middle.
    """
    if layer_count < 1:
        raise ValueError(f"layer_count: expected at least 1, got {layer_count}")
    candidates = sorted(range(layer_count) if usable is None else usable)
    if not candidates:
        raise ValueError("no layer of this model has a query and a key: its attention cannot be read")
    if candidates[0] < 0 or candidates[-1] >= layer_count:
        raise ValueError(f"usable: expected layers from 0 to {layer_count - 1}, got {candidates}")
    first, last = layer_count // 3, 2 * layer_count // 3
    wanted = [round(first + i * (last - first) / 4) for i in range(5)]
    # min() keeps the first of equals, and the candidates ascend: ties go to the lower layer.
    nearest = {min(candidates, key=lambda layer: abs(layer - want)) for want in wanted}
    return tuple(sorted(nearest))


def layer_types(config: Any) -> tuple[str, ...]:
    """The kind of every layer of a text configuration; all full attention where it does not say."""
    return tuple(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def usable_layers(types: Sequence[str]) -> tuple[int, ...]:
    """The layers with queries and keys to read. Raises ValueError where there is none."""
    usable = tuple(i for i, kind in enumerate(types) if kind in ATTENTION_LAYERS)
    if not usable:
        raise ValueError("the model has no full-attention layer: there is no attention to read")
    return usable


def head_sets(
    span_BLH: Tensor, share: float = 0.3, scope: Literal["sequence", "batch"] = "sequence"
) -> tuple[Tensor, Tensor]:
    """Local heads look back least, global heads most (arXiv 2510.13554, eq. 7 and below).

    Each set holds max(1, round(share·M)) of the M heads of all chosen layers together, halves to even; equal spans go
    to the earlier head. A head whose span is NaN (an empty response) is in no set.

    Args:
        span_BLH: mean look-back distance, NaN where undefined.
        share: of the heads that a set holds, in (0, 0.5].
        scope: `sequence` sorts every rollout's heads by its own spans; `batch` by the mean over the rollouts, so that
            all share one pair of sets (rollouts of other ranks count where the caller gathered their spans).

    Returns:
        local_BLH, global_BLH: bool.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share: expected more than 0 and at most 0.5, got {share}")
    if scope not in ("sequence", "batch"):
        raise ValueError(f"scope: expected sequence or batch, got {scope!r}")
    span_BM = span_BLH.flatten(1)
    ranked_BM = span_BM if scope == "sequence" else span_BM.nanmean(dim=0, keepdim=True).expand_as(span_BM)
    count = _set_size(span_BM.shape[1], share)
    defined_BM = ~span_BM.isnan()
    local_BM, global_BM = _lowest(ranked_BM, count) & defined_BM, _lowest(-ranked_BM, count) & defined_BM
    return local_BM.view_as(span_BLH), global_BM.view_as(span_BLH)


def receiver_heads(received_BLHN: Tensor, share: float = 0.3) -> tuple[Tensor, Tensor]:
    """Heads that many later tokens use to look at a few earlier ones (Thought Anchors, arXiv 2506.19143).

    Their column sums have high kurtosis: a head that spreads what it sends has a flat column profile, a receiver head a
    few spikes. The set has the size of the local and global sets, so that their peaks can be compared.

    Args:
        received_BLHN: how much each token receives from later ones, NaN where undefined, such as FAI of every head;
            (B, H, N) of a single layer will do as well.
        share: of the heads that the set holds, in (0, 1].

    Returns:
        receivers_BLH: bool; ties to the earlier head.
        kurtosis_BLH: excess kurtosis (0 for a normal distribution); NaN for a constant profile, which is never chosen.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected more than 0 and at most 1, got {share}")
    mean_BLH1 = received_BLHN.nanmean(dim=-1, keepdim=True)
    centred_BLHN = received_BLHN - mean_BLH1
    deviation_BLH1 = (centred_BLHN**2).nanmean(dim=-1, keepdim=True).sqrt()
    # A constant profile deviates from its mean by a rounding: no spike.
    deviation_BLH1 = deviation_BLH1.masked_fill(deviation_BLH1 <= 1e-6 * mean_BLH1.abs(), torch.nan)
    # Divided before the fourth power: attention to single tokens is small, and its fourth power underflows.
    kurtosis_BLH = ((centred_BLHN / deviation_BLH1) ** 4).nanmean(dim=-1) - 3
    kurtosis_BM = kurtosis_BLH.flatten(1)
    return _lowest(-kurtosis_BM, _set_size(kurtosis_BM.shape[1], share)).view_as(kurtosis_BLH), kurtosis_BLH


def average_over(values_BLHN: Tensor, heads_BLH: Tensor) -> Tensor:
    """The mean over a set of heads (arXiv 2510.13554, eq. 8): values_BN.

    NaN entries are left out of the mean; a token is NaN only where no head of the set defines it, as in a rollout
    whose set is empty. Infinite values stay infinite. Memory: one copy of the values.
    """
    return values_BLHN.masked_fill(~heads_BLH[..., None], torch.nan).flatten(1, 2).nanmean(dim=1)


def _set_size(head_count: int, share: float) -> int:
    # Fraction(str(0.3)) is three tenths, 0.3 is not: 0.3 of 5 heads is a half to round to even, whatever the platform.
    return max(1, round(Fraction(str(share)) * head_count))


def _lowest(scores_BM: Tensor, count: int) -> Tensor:
    """Bool: the `count` lowest scores of each row, NaN never, ties to the earlier."""
    order_BM = scores_BM.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)
    return (order_BM.argsort(dim=1) < count) & ~scores_BM.isnan()
