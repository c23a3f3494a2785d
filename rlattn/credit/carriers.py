"""Which tokens carry the gradient: what each one adds to the way along the direction of many rollouts.

A token's part is its own gradient's inner product with the direction that equal credit finds with all other batches
(`fidelity.py`). The parts of a batch add up to the inner product of its whole gradient, so shares of it can be told for
any division of the tokens. Pure. Legend: B rollouts, T completion tokens, Q quantiles, N batches, D divisions' cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlattn.credit.fidelity import jackknife_spread

QUANTILES = 5
UNDEFINED = QUANTILES  # the cell of tokens for which a feature is undefined, as FAI near the end


@dataclass(frozen=True, kw_only=True)
class Share:
    """What some tokens carry."""

    share: float
    """Of the whole way, 1 for all tokens together; below 0 where they lead away from it."""
    low: float
    high: float
    """95 %, the jackknife's over batches; the direction itself is held to be known."""
    tokens: float
    """Their share of the tokens: what they would carry if all were alike."""


def quantiles(feature_BT: Tensor, own_BT: Tensor) -> Tensor:
    """Int64 (B, T): the fifth of its response that a token lies in by a feature, 0 the lowest; `UNDEFINED` for NaN.

    Equal values lie together in the middle of their ranks, so a constant feature puts all tokens in the middle fifth.
    """
    defined_BT = own_BT & ~feature_BT.isnan()
    value_BT = feature_BT.float().masked_fill(~defined_BT, torch.inf)
    sorted_BT = value_BT.sort(dim=1).values
    below_BT = torch.searchsorted(sorted_BT, value_BT.contiguous())
    up_to_BT = torch.searchsorted(sorted_BT, value_BT.contiguous(), right=True)
    rank_BT = (below_BT + up_to_BT) / 2 / defined_BT.sum(dim=1, keepdim=True).clamp(min=1)  # in (0, 1)
    place_BT = (rank_BT * QUANTILES).long().clamp(max=QUANTILES - 1)
    return place_BT.masked_fill(~defined_BT, UNDEFINED)


def sums_by_quantile(part_BT: Tensor, feature_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """sums_2Q, float64: the parts of the counted tokens by quantile and their numbers, the undefined ones last."""
    place_BT = quantiles(feature_BT, counted_BT)
    both = torch.stack([part_BT[counted_BT].double(), torch.ones_like(part_BT[counted_BT], dtype=torch.float64)])
    sums_2Q = torch.zeros(2, QUANTILES + 1, dtype=torch.float64, device=part_BT.device)
    return sums_2Q.index_add_(1, place_BT[counted_BT], both)


def shares(sums_N2D: Tensor) -> list[Share]:
    """Of every cell of a division, over all batches.

    Args:
        sums_N2D: of every batch, the parts by cell and the number of tokens by cell; the cells hold every token once.
    """
    parts_ND, tokens_ND = sums_N2D[:, 0], sums_N2D[:, 1]
    return _figures(parts_ND, parts_ND.sum(dim=1), tokens_ND, tokens_ND.sum(dim=1))


def shares_of_sets(sums_N2D: Tensor, whole_N2: Tensor) -> list[Share]:
    """The same of sets that overlap: `whole_N2` holds the parts and the number of all tokens of a batch."""
    return _figures(sums_N2D[:, 0], whole_N2[:, 0], sums_N2D[:, 1], whole_N2[:, 1])


def _figures(parts_ND: Tensor, way_N: Tensor, tokens_ND: Tensor, all_N: Tensor) -> list[Share]:
    share_D = parts_ND.sum(dim=0) / way_N.sum()
    without_ND = (parts_ND.sum(dim=0) - parts_ND) / (way_N.sum() - way_N)[:, None]
    spread_D = jackknife_spread(without_ND)
    tokens_D = tokens_ND.sum(dim=0) / all_N.sum()
    rows = torch.stack([share_D, share_D - spread_D, share_D + spread_D, tokens_D], dim=1).tolist()
    return [Share(share=share, low=low, high=high, tokens=tokens) for share, low, high, tokens in rows]
