"""Advantages equal TRL's own, and a neutral reward neither pays nor costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlattn.credit.advantages import (
    apply_gates,
    contributions,
    duplicate_share,
    failure_gap,
    fill_neutral,
    group_advantages,
    part_advantages,
    restrict_to_tokens,
    silent_groups,
    table_metrics,
)

NAN = float("nan")


def test_sum_and_decoupled_on_the_worked_example():
    # Two groups of two, two rewards: {(0, 0), (1, 0)} and {(0, 0), (1, 1)} (GDPO, arXiv 2601.05242).
    rewards_BK = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    weights_K = torch.ones(2)
    summed = group_advantages(rewards_BK, weights_K, 2)
    torch.testing.assert_close(summed, torch.tensor([-0.7071, 0.7071, -0.7071, 0.7071]), atol=2e-4, rtol=0)
    decoupled = group_advantages(rewards_BK, weights_K, 2, combine="decoupled")
    assert decoupled[3] / decoupled[1] == pytest.approx(2, rel=1e-3)


def test_duplicates_are_counted_within_groups():
    assert duplicate_share(torch.tensor([7, 7, 7, 8, 7, 9, 9, 1]), 4) == pytest.approx(3 / 8)
    assert duplicate_share(torch.tensor([7, 7]), 1) == 0


def test_scales():
    rewards_BK = torch.tensor([[0.0], [2.0], [0.0], [6.0]])
    assert group_advantages(rewards_BK, torch.ones(1), 2, scale="none").tolist() == [-1, 1, -3, 3]
    batch = group_advantages(rewards_BK, torch.ones(1), 2, scale="batch")
    assert batch[3] == pytest.approx(3 * batch[1].item())
    group = group_advantages(rewards_BK, torch.ones(1), 2, scale="group")
    assert group[3] == pytest.approx(group[1].item(), rel=1e-3)


def test_one_none_among_equal_rewards_changes_nothing():
    # TRL's nansum would make it a 0 among ones: an advantage of about -1.5 for a reward that said nothing.
    rewards_BK = torch.tensor([[1.0, 0.5], [1.0, NAN], [1.0, 0.5], [1.0, 0.5]])
    filled = fill_neutral(rewards_BK, 4)
    assert filled[1, 1] == 0.5
    assert group_advantages(filled, torch.ones(2), 4).abs().max() == 0


def test_a_rollout_without_any_reward_gets_no_advantage():
    rewards_BK = torch.tensor([[NAN], [NAN], [0.0], [1.0]])
    advantage_B = group_advantages(fill_neutral(rewards_BK, 2), torch.ones(1), 2)
    assert advantage_B[:2].tolist() == [0, 0]
    assert advantage_B[3] > 0


@pytest.mark.parametrize(("combine", "scale"), [("decoupled", "group"), ("sum", "batch"), ("sum", "group")])
def test_a_reward_without_weight_changes_nothing_where_others_are_neutral(combine, scale):
    counted_B1 = torch.tensor([1.0, 0, 0, 1, torch.nan, torch.nan, torch.nan, torch.nan])[:, None]
    logged_BK = torch.cat([counted_B1, torch.arange(8.0)[:, None]], dim=1)
    weights_K = torch.tensor([1.0, 0.0])
    alone_B = group_advantages(counted_B1, torch.ones(1), 4, combine=combine, scale=scale)
    torch.testing.assert_close(group_advantages(logged_BK, weights_K, 4, combine=combine, scale=scale), alone_B)
    contribution_BK = contributions(logged_BK, weights_K, 4, combine=combine, scale=scale)
    torch.testing.assert_close(contribution_BK.sum(dim=1), alone_B)


@given(
    rewards=st.lists(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=2), min_size=8, max_size=8),
    silent=st.integers(0, 7),
    combine=st.sampled_from(["sum", "decoupled"]),
)
def test_neutral_sits_at_its_groups_mean(rewards, silent, combine):
    rewards_BK = torch.tensor(rewards, dtype=torch.float64)
    rewards_BK[silent, 1] = NAN
    filled = fill_neutral(rewards_BK, 4)
    first = silent - silent % 4
    others = [row for row in range(first, first + 4) if row != silent]
    assert filled[silent, 1].item() == pytest.approx(rewards_BK[others, 1].mean().item())
    assert torch.equal(filled[others], rewards_BK[others])
    assert group_advantages(filled, torch.ones(2, dtype=torch.float64), 4, combine=combine).isfinite().all()


TABLES = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=8, max_size=8)


@given(table=TABLES, combine=st.sampled_from(["sum", "decoupled"]), scale=st.sampled_from(["group", "batch", "none"]))
def test_contributions_add_up_to_the_advantage(table, combine, scale):
    rewards_BK = torch.tensor(table, dtype=torch.float64)
    weights_K = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64)
    advantage_B = group_advantages(rewards_BK, weights_K, 4, combine=combine, scale=scale)
    parts_BK = contributions(rewards_BK, weights_K, 4, combine=combine, scale=scale)
    torch.testing.assert_close(parts_BK.sum(dim=1), advantage_B, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("rewards", "weights", "share"),
    [
        ([[0.6], [0.6], [0.6], [0.6]], [1.0], 1.0),
        ([[1.0], [0.0], [0.6], [0.6]], [1.0], 0.5),
        ([[0.0, 1.0], [0.0, 2.0], [0.0, 1.0], [0.0, 1.0]], [1.0, 1.0], 0.5),
        ([[0.0, 1.0], [0.0, 2.0], [0.0, 1.0], [0.0, 1.0]], [1.0, 0.0], 1.0),  # a reward without weight teaches nothing
        ([[0.0], [1.0]], [0.0], 1.0),
        ([[1.0], [1.0 + 1e-7], [NAN], [NAN]], [1.0], 1.0),
    ],
)
def test_groups_without_a_signal(rewards, weights, share):
    rewards_BK = torch.tensor(rewards)
    assert silent_groups(rewards_BK, torch.tensor(weights), 2, torch.zeros_like(rewards_BK)) == share
    assert silent_groups(rewards_BK, torch.tensor(weights), 2, torch.ones_like(rewards_BK)) == 0


def test_a_gated_reward_counts_only_where_the_required_one_is_met():
    rewards_BK = torch.tensor([[1.0, 0.5], [0.0, 0.5], [NAN, 0.5], [1.0, NAN], [0.0, NAN]])
    gated = apply_gates(rewards_BK, {1: 0})[:, 1]
    assert gated[:2].tolist() == [0.5, 0]
    assert gated[2:4].isnan().all()  # neutral where it is neutral itself, or what it requires
    assert gated[4] == 0  # a wrong answer on which it failed


def test_a_reward_confined_to_tokens_moves_only_their_advantage():
    rewards_BK = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    weights_K = torch.ones(2)
    advantage_BT = group_advantages(rewards_BK, weights_K, 4)[:, None].expand(-1, 3)
    second_B = contributions(rewards_BK, weights_K, 4)[:, 1]
    mask_BT = torch.tensor([[True, False, False]]).expand(4, -1)
    confined = restrict_to_tokens(advantage_BT, second_B, mask_BT)
    first_B = contributions(rewards_BK, weights_K, 4)[:, 0]
    torch.testing.assert_close(confined[:, 1], first_B)
    assert torch.equal(confined[:, 0], advantage_BT[:, 0])
    assert torch.equal(restrict_to_tokens(advantage_BT, second_B, torch.ones_like(mask_BT)), advantage_BT)


def test_a_part_is_compared_with_the_same_part_of_the_rollouts_still_alive():
    values_BP = torch.tensor([[1.0, 2.0], [3.0, NAN], [2.0, 4.0], [2.0, NAN]])
    scored = part_advantages(values_BP, 4)
    assert scored[:, 0].tolist() == pytest.approx([-1.2246, 1.2246, 0, 0], abs=1e-3)
    assert scored[:, 1].tolist() == pytest.approx([-0.7071, 0, 0.7071, 0], abs=1e-3)
    assert part_advantages(torch.tensor([[1.0], [NAN]]), 2).tolist() == [[0], [0]]  # alone: nothing to compare with


def test_table_metrics_name_spread_share_and_correlation():
    rewards_BK = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
    size_BK = contributions(rewards_BK, torch.tensor([3.0, 1.0, 1.0]), 4).abs()
    found = table_metrics(rewards_BK, size_BK, 4, ["a", "b", "c"])
    assert found["rewards/a/share"] == pytest.approx(0.75, rel=1e-3)
    assert found["rewards/a/correlation/b"] == pytest.approx(-1)
    assert found["rewards/c/group_std"] == 0
    assert not any("correlation/c" in name for name in found)


def test_the_gap_of_failures_is_what_the_other_rewards_and_their_group_say():
    failed_B = torch.tensor([True, False, False, False, True, False, False, False])
    other_B = torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 1])
    filled_B = torch.ones(8)  # as it paid where it did not fail
    assert failure_gap(torch.stack([other_B, filled_B], dim=1), torch.ones(2), failed_B) == pytest.approx(
        -2.16, abs=0.01
    )
    assert failure_gap(torch.stack([other_B, filled_B], dim=1), torch.tensor([0.0, 1]), failed_B) == 0
    hard_group_B = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1])
    assert failure_gap(hard_group_B[:, None], torch.ones(1), failed_B & (hard_group_B == 0)) < -0.9
    assert failure_gap(filled_B[:, None], torch.ones(1), torch.ones(8, dtype=torch.bool)) is None
