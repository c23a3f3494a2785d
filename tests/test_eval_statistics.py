"""pass@k, intervals and paired tests, against hand-worked and published figures."""

import math
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlattn.statistics import (
    bootstrap_interval,
    gain_interval,
    jaccard,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    pass_at_k,
    share_interval,
    wilson_interval,
)


def test_pass_at_k_by_hand():
    # 4 answers, 1 right: of the 6 pairs, 3 hold it.
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 0, 5) == 0
    assert pass_at_k(5, 1, 5) == 1
    assert pass_at_k(3, 2, 2) == 1  # any two hold a right one
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, data):
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(combinations(range(samples), k))
    held = sum(any(index < right for index in subset) for subset in subsets)
    assert pass_at_k(samples, right, k) == pytest.approx(held / len(subsets))


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_of_what_cannot_be(samples, right, k):
    with pytest.raises(ValueError, match="expected 1 <= k"):
        pass_at_k(samples, right, k)


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(3, 3) == 1
    # 1 and 7: 2 (C(8,0) + C(8,1)) / 2^8
    assert mcnemar_exact(1, 7) == mcnemar_exact(7, 1) == pytest.approx(18 / 256)
    assert mcnemar_exact(0, 6) == pytest.approx(2 / 64)
    assert 0 < mcnemar_exact(400, 600) < 1e-9


def test_paired_difference_by_hand():
    # 12 and 5 of 100 differ: centre 7/102, spread 1.96 sqrt(18 - 49/102) / 102
    value, low, high = paired_difference(12, 5, 100)
    assert value == pytest.approx(0.07)
    spread = 1.96 * math.sqrt(18 - 49 / 102) / 102
    assert (low, high) == (pytest.approx(7 / 102 - spread), pytest.approx(7 / 102 + spread))
    value, low, high = paired_difference(0, 0, 20)
    assert value == 0
    assert low < 0 < high  # agreement on 20 items is no proof of equality


def test_the_paired_interval_covers_the_truth():
    rng, held = Random(0), 0
    for _ in range(400):
        kinds = rng.choices(("first", "second", "same"), weights=(0.15, 0.05, 0.8), k=80)
        _, low, high = paired_difference(kinds.count("first"), kinds.count("second"), 80)
        held += low <= 0.10 <= high
    assert 0.92 <= held / 400 <= 0.985


def test_the_bootstrap_covers_the_truth_and_can_be_repeated():
    rng, held = Random(1), 0
    for seed in range(120):
        values = [rng.choice((0.0, 0.25, 0.5, 1.0)) for _ in range(60)]
        low, high = bootstrap_interval(values, seed, resamples=400)
        held += low <= 0.4375 <= high
    assert 0.88 <= held / 120 <= 0.99
    assert bootstrap_interval(values, 3) == bootstrap_interval(values, 3)


def test_a_share_interval_is_wilsons_where_problems_are_right_or_wrong():
    assert share_interval([1.0] * 10 + [0.0] * 10) == wilson_interval(10, 20)
    assert share_interval([0.5] * 20) == wilson_interval(10, 20)  # no spread to draw from
    low, high = share_interval([0.0, 0.5, 1.0, 0.5])
    assert 0 <= low < 0.5 < high <= 1
    assert share_interval([1.0] * 30)[0] < 0.9  # 30 of 30 is not certainty


def test_what_is_all_the_same_has_no_interval_of_no_width():
    assert mean_interval([81.0]) == mean_interval([81.0, 81.0]) == (None, None)
    assert mean_interval([80.0, 82.0]) == bootstrap_interval([80.0, 82.0])


def test_gains_that_are_all_equal_are_told_as_pairs():
    assert gain_interval([0.0] * 4) == paired_difference(0, 0, 4)[1:]
    assert gain_interval([1.0] * 4) == paired_difference(4, 0, 4)[1:]
    assert gain_interval([-1.0] * 4) == paired_difference(0, 4, 4)[1:]
    low, high = gain_interval([0.5] * 4)  # as two of four pairs
    assert (low, high) == paired_difference(2, 0, 4)[1:]
    assert low < 0.5 < high
    low, high = gain_interval([2 / 3 - 1 / 3, 1 - 2 / 3])  # equal but for rounding
    assert high - low > 0.1
    assert gain_interval([0.5, 0.0]) == bootstrap_interval([0.5, 0.0])


def test_jaccard():
    assert jaccard("aab", "bc") == pytest.approx(1 / 3)
    assert jaccard([], []) == 1
    assert jaccard([1], []) == 0
