"""Shares of the gradient by tokens, against sums written out."""

import pytest
import torch

from rlattn.credit.carriers import QUANTILES, UNDEFINED, quantiles, shares, shares_of_sets, sums_by_quantile

NAN = float("nan")


def test_fifths_of_a_response_ties_in_the_middle_and_the_undefined_apart():
    feature_BT = torch.tensor([[5.0, 4, 3, 2, 1, NAN, 9], [7, 7, 7, 7, 7, 7, 7]])
    own_BT = torch.tensor([[True] * 6 + [False], [True] * 7])
    assert quantiles(feature_BT, own_BT).tolist() == [[4, 3, 2, 1, 0, UNDEFINED, UNDEFINED], [2] * 7]


def test_every_token_is_counted_once_and_shares_add_up():
    torch.manual_seed(0)
    sums = []
    for _ in range(4):
        part_BT, feature_BT = torch.randn(6, 23) + 0.5, torch.randn(6, 23)
        feature_BT[torch.rand(6, 23) < 0.2] = NAN
        counted_BT = torch.rand(6, 23) < 0.8
        sums_2Q = sums_by_quantile(part_BT, feature_BT, counted_BT)
        place_BT = quantiles(feature_BT, counted_BT)
        for place in range(QUANTILES + 1):
            chosen_BT = counted_BT & (place_BT == place)
            assert sums_2Q[0, place].item() == pytest.approx(part_BT[chosen_BT].sum().item(), abs=1e-4)
            assert sums_2Q[1, place] == chosen_BT.sum()
        sums.append(sums_2Q)
    found = shares(torch.stack(sums))
    assert sum(one.share for one in found) == pytest.approx(1) and sum(one.tokens for one in found) == pytest.approx(1)
    assert all(one.low <= one.share <= one.high for one in found)
    whole_N2 = torch.stack([sums_2Q.sum(dim=1) for sums_2Q in sums])
    for one, other in zip(found, shares_of_sets(torch.stack(sums), whole_N2), strict=True):
        assert other.share == pytest.approx(one.share) and other.high == pytest.approx(one.high)


def test_tokens_that_carry_all_are_found_for_certain():
    feature_BT = torch.arange(50.0).expand(4, 50)
    sums = [sums_by_quantile((feature_BT >= 40) * (1 + 0.1 * torch.rand(4, 50)), feature_BT, feature_BT >= 0)] * 5
    *others, highest, undefined = shares(torch.stack(sums))
    assert highest.share == pytest.approx(1) and highest.low > 0.99 and highest.tokens == pytest.approx(0.2)
    assert undefined.tokens == 0 and all(one.share == pytest.approx(0) for one in others)
