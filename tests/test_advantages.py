"""Advantages equal TRL's own, and a neutral reward neither pays nor costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlattn.advantages import fill_neutral, group_advantages

NAN = float("nan")


def test_sum_and_decoupled_on_the_worked_example():
    # Two groups of two, two rewards: {(0, 0), (1, 0)} and {(0, 0), (1, 1)} (GDPO, arXiv 2601.05242).
    rewards_BK = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    weights_K = torch.ones(2)
    summed = group_advantages(rewards_BK, weights_K, 2)
    torch.testing.assert_close(summed, torch.tensor([-0.7071, 0.7071, -0.7071, 0.7071]), atol=2e-4, rtol=0)
    decoupled = group_advantages(rewards_BK, weights_K, 2, combine="decoupled")
    assert decoupled[3] / decoupled[1] == pytest.approx(2, rel=1e-3)


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
