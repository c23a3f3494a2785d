"""Layers and heads: the paper's choice, ties, short models, empty responses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlattn.attention.heads import average_over, choose_layers, head_sets, receiver_heads

NAN = float("nan")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (36, (12, 15, 18, 21, 24)),  # Qwen3-4B
        (28, (9, 11, 14, 16, 18)),  # a = 9, b = 18: 9, 11.25, 13.5, 15.75, 18; 13.5 rounds to the even 14
        (15, (5, 6, 8, 9, 10)),  # 5, 6.25, 7.5, 8.75, 10
        (4, (1, 2)),  # 1, 1.25, 1.5, 1.75, 2
        (2, (0, 1)),
        (1, (0,)),
    ],
)
def test_five_layers_of_the_middle_third(count, expected):
    assert choose_layers(count) == expected


def test_the_nearest_usable_layers_of_a_hybrid():
    # Full attention in every fourth layer: 16, 20, 24, 28, 32 are wanted; 15 is nearer to 16 than 19 is.
    assert choose_layers(48, range(3, 48, 4)) == (15, 19, 23, 27, 31)
    # 10, 13, 16, 18, 21 are wanted; 16 is as far from 12 as from 20 and takes the lower one.
    assert choose_layers(32, [4, 12, 20, 28]) == (12, 20)
    assert choose_layers(36, [35, 0]) == (0, 35)  # the order given does not matter


@pytest.mark.parametrize(("count", "usable"), [(0, None), (4, []), (4, [4]), (4, [-1])])
def test_layers_that_cannot_be_chosen(count, usable):
    with pytest.raises(ValueError):
        choose_layers(count, usable)


@given(st.integers(1, 200))
def test_layers_lie_in_the_middle_third(count):
    layers = choose_layers(count)
    assert sorted(set(layers)) == list(layers) and 1 <= len(layers) <= 5
    assert count // 3 == layers[0] and layers[-1] == 2 * count // 3


def test_local_and_global_heads():
    # 2 layers of 5 heads, so 3 heads a set. Lowest spans: 1, 2, 3; highest: 10, 9, and of the two 8s the earlier.
    span_BLH = torch.tensor([[[5.0, 1, 8, 2, 9], [8, 3, 10, 4, 6]]])
    local_BLH, global_BLH = head_sets(span_BLH)
    assert local_BLH.int().tolist() == [[[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]]
    assert global_BLH.int().tolist() == [[[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]]


def test_equal_spans_go_to_the_earlier_heads():
    local_BLH, global_BLH = head_sets(torch.full((1, 2, 5), 7.0))
    assert local_BLH.flatten().nonzero().flatten().tolist() == [0, 1, 2]
    assert torch.equal(local_BLH, global_BLH)


def test_scopes_and_empty_responses():
    span_BLH = torch.tensor([[[1.0, 2, 3]], [[9, 2, 1]], [[NAN, NAN, NAN]]])
    local_BLH, global_BLH = head_sets(span_BLH)
    assert local_BLH[:, 0].int().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert global_BLH[:, 0].int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    # Means 5, 2, 2: one local head, the earlier of the two 2s, and one global head for all.
    local_BLH, global_BLH = head_sets(span_BLH, scope="batch")
    assert local_BLH[:, 0].int().tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert global_BLH[:, 0].int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 0.6}, {"scope": "group"}])
def test_bad_options_of_head_sets(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        head_sets(torch.ones(1, 1, 4), **options)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_sets_hold_their_share(layers, heads, seed):
    span_BLH = torch.rand(3, layers, heads, generator=torch.Generator().manual_seed(seed))
    local_BLH, global_BLH = head_sets(span_BLH)
    count = max(1, round(0.3 * layers * heads))
    assert local_BLH.flatten(1).sum(1).tolist() == global_BLH.flatten(1).sum(1).tolist() == [count] * 3
    for row in range(3):
        assert span_BLH[row][local_BLH[row]].max() <= span_BLH[row][~local_BLH[row]].min() if layers * heads > 1 else 1
    if layers * heads > 1:
        assert not (local_BLH & global_BLH).any()


def test_receiver_heads_have_spiky_columns():
    # Kurtosis by hand: 9 zeros and a one have mean 0.1, variance 0.09, fourth moment (9·0.1^4 + 0.9^4)/10 = 0.0657,
    # so 0.0657/0.0081 − 3 = 5.11. Five zeros and five ones: 0.0625/0.0625 − 3 = −2. Flat: undefined.
    spike, halves, flat = [0.0] * 9 + [1e-4], [0.0, 1e-4] * 5, [1e-4] * 10
    received_BHN = torch.tensor([[halves, spike, flat], [flat, flat, flat]])
    heads_BH, kurtosis_BH = receiver_heads(received_BHN)
    torch.testing.assert_close(kurtosis_BH[0, :2], torch.tensor([-2.0, 5.1111]), atol=1e-3, rtol=0)
    assert heads_BH.int().tolist() == [[0, 1, 0], [0, 0, 0]]
    gaps_BLHN = torch.cat([received_BHN, torch.full((2, 3, 7), NAN)], dim=2)[:, None]  # undefined columns do not count
    heads_BLH, kurtosis_BLH = receiver_heads(gaps_BLHN)
    torch.testing.assert_close(kurtosis_BLH[:, 0], kurtosis_BH, equal_nan=True, atol=1e-3, rtol=0)
    assert torch.equal(heads_BLH[:, 0], heads_BH)
    with pytest.raises(ValueError, match="share"):
        receiver_heads(received_BHN, share=1.5)


def test_average_over_a_set_of_heads():
    values_BLHN = torch.tensor(
        [[[[1.0, 2, NAN, NAN]], [[3, NAN, NAN, 6]]], [[[1, 2, 3, 4]], [[1, 2, 3, float("inf")]]]]
    )
    heads_BLH = torch.tensor([[[True], [True]], [[False], [False]]])
    average_BN = average_over(values_BLHN, heads_BLH)
    expected_BN = torch.tensor([[2.0, 2, NAN, 6], [NAN] * 4])
    assert torch.equal(average_BN.nan_to_num(-1), expected_BN.nan_to_num(-1))
    assert average_over(values_BLHN, torch.ones(2, 2, 1, dtype=torch.bool))[1].tolist() == [1, 2, 3, float("inf")]
