"""Masks of rollouts, from lists of unequal length to one tensor. Legend: B rollouts, T completion tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor


def mask_tensor(masks: Sequence[Sequence[bool] | None] | None, like_BT: Tensor, *, missing: bool = True) -> Tensor:
    """mask_BT, bool: True all along a row of None, and everywhere where `masks` is None; `missing` past a row's end."""
    if masks is None:
        return torch.ones_like(like_BT, dtype=torch.bool)
    mask_BT = torch.full_like(like_BT, missing, dtype=torch.bool)
    for row, mask in enumerate(masks):
        if mask is None:
            mask_BT[row] = True
        elif len(mask):
            mask_BT[row, : len(mask)] = torch.tensor([bool(flag) for flag in mask], device=mask_BT.device)
    return mask_BT
