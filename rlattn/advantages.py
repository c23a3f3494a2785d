"""Rewards to advantages. Pure: tensors in, tensors out.

Legend: B rollouts of all ranks, the G rollouts of a group side by side; K rewards.
NaN in a reward table means *neutral*: that reward has nothing to say about that rollout.
"""

from typing import Literal

import torch
from torch import Tensor

Combine = Literal["sum", "decoupled"]
Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4  # TRL's; keeps a group of equal rewards at advantage 0


def fill_neutral(rewards_BK: Tensor, group_size: int) -> Tensor:
    """Gives a neutral entry the mean of that reward over the rest of its group, so that it neither pays nor costs.

    Left as it is, TRL's nansum would read it as 0 and punish it. A reward that is neutral for a whole group stays NaN:
    it says nothing there.

    Args:
        rewards_BK: float, NaN where neutral. B is a multiple of `group_size`.
    """
    grouped_NGK = rewards_BK.view(-1, group_size, rewards_BK.shape[1])
    mean_N1K = grouped_NGK.nanmean(dim=1, keepdim=True)
    return torch.where(grouped_NGK.isnan(), mean_N1K, grouped_NGK).view_as(rewards_BK)


def group_advantages(
    rewards_BK: Tensor, weights_K: Tensor, group_size: int, *, combine: Combine = "sum", scale: Scale = "group"
) -> Tensor:
    """The advantage of every rollout, equal to TRL 1.16's bit for bit.

    `sum` adds the weighted rewards and normalises the sum inside the group (GRPO, arXiv 2402.03300, section 4.1.2).
    `decoupled` normalises every reward inside the group, adds, and whitens over the batch (GDPO, arXiv 2601.05242).

    Args:
        rewards_BK: gathered over ranks, groups side by side; NaN where neutral.
        weights_K: one weight a reward.
        scale: what a `sum` is divided by: the standard deviation of its group, of the batch, or nothing.

    Returns:
        advantage_B; 0 for a rollout no reward speaks about.
    """
    silent_B = rewards_BK.isnan().all(dim=1)
    if combine == "decoupled":
        grouped_NGK = rewards_BK.view(-1, group_size, rewards_BK.shape[1])
        mean_N1K = grouped_NGK.nanmean(dim=1, keepdim=True)
        std_N1K = _nanstd(grouped_NGK, dim=1, keepdim=True) if group_size > 1 else torch.zeros_like(mean_N1K)
        normalised_BK = ((grouped_NGK - mean_N1K) / (std_N1K + EPSILON)).view_as(rewards_BK)
        total_B = _weighted_sum(normalised_BK, weights_K, silent_B)
        std = _nanstd(total_B) if total_B.numel() > 1 else torch.zeros_like(total_B)
        advantage_B = (total_B - total_B.nanmean()) / (std + EPSILON)
    else:
        total_B = _weighted_sum(rewards_BK, weights_K, silent_B)
        grouped_NG = total_B.view(-1, group_size)
        advantage_B = total_B - grouped_NG.nanmean(dim=1).repeat_interleave(group_size)
        if scale == "group":
            std_N = _nanstd(grouped_NG, dim=1) if group_size > 1 else torch.zeros_like(grouped_NG[:, 0])
            advantage_B = advantage_B / (std_N.repeat_interleave(group_size) + EPSILON)
        elif scale == "batch":
            std = _nanstd(total_B) if total_B.numel() > 1 else torch.zeros_like(total_B)
            advantage_B = advantage_B / (std + EPSILON)
    return advantage_B.nan_to_num(nan=0.0)


def _weighted_sum(rewards_BK: Tensor, weights_K: Tensor, silent_B: Tensor) -> Tensor:
    return (rewards_BK * weights_K.to(rewards_BK.device)).nansum(dim=1).masked_fill(silent_B, torch.nan)


def _nanstd(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Standard deviation over the entries that are not NaN, with Bessel's correction; NaN where fewer than two."""
    mean = values.nanmean(dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    bessel = torch.where(count > 1, count / (count - 1), torch.nan)
    std = (((values - mean) ** 2).nanmean(dim=dim, keepdim=True) * bessel).sqrt()
    if keepdim:
        return std
    return std.squeeze() if dim is None else std.squeeze(dim)
