"""Rewards to advantages. Pure: tensors in, tensors out.

Legend: B rollouts of all ranks, the G rollouts of a group side by side; K rewards.
NaN in a reward table means *neutral*: that reward has nothing to say about that rollout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Combine = Literal["sum", "decoupled"]
Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4  # TRL's; keeps a group of equal rewards at advantage 0


@dataclass(frozen=True, kw_only=True)
class RewardTable:
    """The rewards of a generation batch, of all ranks, as they were scored and as they count."""

    raw_BK: Tensor
    """As scored; NaN where neutral."""
    used_BK: Tensor
    """With gates applied and neutral entries filled; NaN where a reward is neutral for a whole group."""
    neutral_BK: Tensor
    """Bool: entries of `used_BK` that were filled, or are NaN."""
    weights_K: Tensor
    group_size: int


def reward_table(raw_BK: Tensor, gates: Mapping[int, int], weights_K: Tensor, group_size: int) -> RewardTable:
    """From scores to what counts: `apply_gates`, then `fill_neutral`.

    Args:
        raw_BK: NaN where neutral; groups side by side.
        gates: column of the gated reward -> column of the one it requires.
    """
    gated_BK = apply_gates(raw_BK, gates)
    used_BK = fill_neutral(gated_BK, group_size)
    return RewardTable(
        raw_BK=raw_BK, used_BK=used_BK, neutral_BK=gated_BK.isnan(), weights_K=weights_K, group_size=group_size
    )


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
    if combine == "decoupled":
        grouped_NGK = rewards_BK.view(-1, group_size, rewards_BK.shape[1])
        mean_N1K = grouped_NGK.nanmean(dim=1, keepdim=True)
        std_N1K = _nanstd(grouped_NGK, dim=1, keepdim=True) if group_size > 1 else torch.zeros_like(mean_N1K)
        normalised_BK = ((grouped_NGK - mean_N1K) / (std_N1K + EPSILON)).view_as(rewards_BK)
        total_B = _weighted_sum(normalised_BK, weights_K)
        std = _nanstd(total_B) if total_B.numel() > 1 else torch.zeros_like(total_B)
        advantage_B = (total_B - total_B.nanmean()) / (std + EPSILON)
    else:
        total_B = _weighted_sum(rewards_BK, weights_K)
        grouped_NG = total_B.view(-1, group_size)
        advantage_B = total_B - grouped_NG.nanmean(dim=1).repeat_interleave(group_size)
        if scale == "group":
            std_N = _nanstd(grouped_NG, dim=1) if group_size > 1 else torch.zeros_like(grouped_NG[:, 0])
            advantage_B = advantage_B / (std_N.repeat_interleave(group_size) + EPSILON)
        elif scale == "batch":
            std = _nanstd(total_B) if total_B.numel() > 1 else torch.zeros_like(total_B)
            advantage_B = advantage_B / (std + EPSILON)
    return advantage_B.nan_to_num(nan=0.0)


def apply_gates(rewards_BK: Tensor, gates: Mapping[int, int]) -> Tensor:
    """A gated reward counts as 0 where the reward it requires is below 1, also where it is neutral itself: filled with
    the mean of its group it would pay for what the gate is there to shut out. It is neutral where that one is.

    Args:
        rewards_BK: NaN where neutral.
        gates: column of the gated reward -> column of the one it requires.
    """
    gated_BK = rewards_BK.clone()
    for gated, required in gates.items():
        needed_B, given_B = rewards_BK[:, required], rewards_BK[:, gated]
        gated_BK[:, gated] = given_B.masked_fill(needed_B < 1, 0).masked_fill(needed_B.isnan(), torch.nan)
    return gated_BK


def contributions(
    rewards_BK: Tensor, weights_K: Tensor, group_size: int, *, combine: Combine = "sum", scale: Scale = "group"
) -> Tensor:
    """contribution_BK: what each reward adds to the advantage of `group_advantages`; their sum is that advantage
    (less the mean that whitening over the batch subtracts). 0 where a reward is neutral.
    """
    grouped_NGK = rewards_BK.view(-1, group_size, rewards_BK.shape[1])
    centred_NGK = grouped_NGK - grouped_NGK.nanmean(dim=1, keepdim=True)
    if combine == "decoupled":
        centred_NGK = centred_NGK / (_nanstd(grouped_NGK, dim=1, keepdim=True) + EPSILON)
    weighted_BK = (centred_NGK * weights_K.to(rewards_BK.device)).view_as(rewards_BK)
    if combine == "decoupled":
        normalised_BK = centred_NGK.view_as(rewards_BK)
        return (weighted_BK / (_nanstd(_weighted_sum(normalised_BK, weights_K)) + EPSILON)).nan_to_num(nan=0.0)
    total_B = _weighted_sum(rewards_BK, weights_K)
    if scale == "group":
        std_B = _nanstd(total_B.view(-1, group_size), dim=1).repeat_interleave(group_size)
        weighted_BK = weighted_BK / (std_B[:, None] + EPSILON)
    elif scale == "batch":
        weighted_BK = weighted_BK / (_nanstd(total_B) + EPSILON)
    return weighted_BK.nan_to_num(nan=0.0)


def restrict_to_tokens(advantage_BT: Tensor, contribution_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Takes one reward's contribution away from the tokens that it does not speak for.

    With this for every reward that names tokens, advantage_BT = sum_k A_k · mask_k.

    Args:
        mask_BT: bool, the tokens it speaks for; all True leaves the advantage as it is, bit for bit.
    """
    return torch.where(mask_BT, advantage_BT, advantage_BT - contribution_B[:, None])


def part_advantages(values_BP: Tensor, group_size: int) -> Tensor:
    """Each part's value against the same part of the group's other rollouts that have it: (x − mean) / (std + 1e-4).

    For turns: the z-score a turn index over the rollouts still alive. 0 where a part is missing or alone.

    Args:
        values_BP: of all ranks, groups side by side; NaN where a rollout has no such part. P parts.
    """
    grouped_NGP = values_BP.view(-1, group_size, values_BP.shape[1])
    centred_NGP = grouped_NGP - grouped_NGP.nanmean(dim=1, keepdim=True)
    scored_NGP = centred_NGP / (_nanstd(grouped_NGP, dim=1, keepdim=True) + EPSILON)
    return scored_NGP.view_as(values_BP).nan_to_num(nan=0.0)


def failure_gap(paid_BK: Tensor, weights_K: Tensor, failed_B: Tensor) -> float | None:
    """What rollouts on which a reward failed are paid less what the others are, in standard deviations of the batch.

    A failure is paid the mean of its group, so what is left is what the other rewards, and that group, say of it: far
    below 0, the reward fails where it would have paid little. None where it failed on all.

    Args:
        paid_BK: neutral entries filled (`fill_neutral`).
        failed_B: bool, the rollouts on which one of the rewards failed.
    """
    total_B = _weighted_sum(paid_BK, weights_K)
    gap = (total_B[failed_B].nanmean() - total_B[~failed_B].nanmean()) / (_nanstd(total_B) + EPSILON)
    return None if gap.isnan() else gap.item()


def silent_groups(rewards_BK: Tensor, weights_K: Tensor, group_size: int, parts_BK: Tensor) -> float:
    """The share of groups in which no reward that has a weight tells one rollout from another, nor any reward's parts
    (parts_BK: the size of what they added): they teach nothing.

    TRL's `frac_reward_zero_std` looks at the batch under `decoupled`, and takes rounding for a spread.
    """
    weighed_BK = rewards_BK[:, weights_K.to(rewards_BK.device) != 0]
    grouped_NGK = weighed_BK.view(len(rewards_BK) // group_size, group_size, weighed_BK.shape[1])
    first_N1K = grouped_NGK[:, :1]
    differ_NGK = (grouped_NGK - first_N1K).abs() > 1e-6 * (1 + first_N1K.abs())
    parts_N = parts_BK.view(len(differ_NGK), -1).any(dim=1)
    return 1.0 - (differ_NGK.flatten(1).any(dim=1) | parts_N).float().mean().item()


def table_metrics(rewards_BK: Tensor, size_BK: Tensor, group_size: int, names: Sequence[str]) -> dict[str, float]:
    """What each reward did, by name: spread inside groups, share of |A|, correlation with the others inside groups.

    size_BK is how much each reward moved the advantage of a rollout, >= 0.

    `rewards/<name>/group_std`: mean over groups; 0 means that it tells no rollout of a group from another.
    `rewards/<name>/share`: of the sum of size_BK over all rewards, in [0, 1].
    `rewards/<a>/correlation/<b>`: Pearson's, of group-centred rewards; left out where one of them does not vary.
    """
    grouped_NGK = rewards_BK.view(-1, group_size, len(names))
    centred_BK = (grouped_NGK - grouped_NGK.nanmean(dim=1, keepdim=True)).view_as(rewards_BK).nan_to_num(nan=0.0)
    spread_K = _nanstd(grouped_NGK, dim=1).nanmean(dim=0) if group_size > 1 else rewards_BK.new_zeros(len(names))
    size_K = size_BK.sum(dim=0)
    norm_K = centred_BK.norm(dim=0)
    found: dict[str, float] = {}
    for k, name in enumerate(names):
        found[f"rewards/{name}/group_std"] = spread_K[k].nan_to_num(nan=0.0).item()
        found[f"rewards/{name}/share"] = (size_K[k] / size_K.sum().clamp(min=1e-12)).item()
        for other in range(k + 1, len(names)):
            if norm_K[k] > 0 and norm_K[other] > 0:
                cosine = (centred_BK[:, k] @ centred_BK[:, other]) / (norm_K[k] * norm_K[other])
                found[f"rewards/{name}/correlation/{names[other]}"] = cosine.item()
    return found


def _weighted_sum(rewards_BK: Tensor, weights_K: Tensor) -> Tensor:
    """NaN where every reward that has a weight is: one without must not change the mean and spread of the others."""
    silent_B = rewards_BK[:, weights_K.to(rewards_BK.device) != 0].isnan().all(dim=1)
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


def duplicate_share(codes_B: Tensor, group_size: int) -> float:
    """The share of rollouts that repeat an earlier one of their group; `codes_B` are equal where completions are."""
    sorted_GS = codes_B.view(-1, group_size).sort(dim=1).values
    return (sorted_GS[:, 1:] == sorted_GS[:, :-1]).sum().item() / len(codes_B)
