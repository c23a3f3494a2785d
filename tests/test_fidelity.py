"""Fidelity of credit rules from inner products: against gradients written out, and on planted rules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlattn.credit.fidelity import Products, fidelities, oracle_worth
from rlattn.statistics import t95


def products(equal_BP, shaped_RBP):
    return Products(
        equal_BB=equal_BP @ equal_BP.T,
        shaped_RBB=shaped_RBP @ equal_BP.T,
        square_RB=shaped_RBP.square().sum(dim=2),
        sum_square_R=shaped_RBP.sum(dim=1).square().sum(dim=1),
    )


def drawn(seed, batches=12, numbers=40, noise=2.0, rules=()):
    """Gradients of equal credit, one truth plus noise; a rule has another share of the noise, or none of the truth."""
    random = torch.Generator().manual_seed(seed)
    truth_P = torch.randn(numbers, generator=random, dtype=torch.float64)
    noise_BP = torch.randn(batches, numbers, generator=random, dtype=torch.float64) * noise
    return truth_P + noise_BP, torch.stack([right * truth_P + share * noise_BP for right, share in rules])


def written_out(equal_BP, shaped_BP, left_out=None):
    """Mean cosine of a rule's gradients with the sum of the others, batch by batch."""
    there = [b for b in range(len(equal_BP)) if b != left_out]
    found = [
        torch.cosine_similarity(shaped_BP[b], sum(equal_BP[c] for c in there if c != b), dim=0).item() for b in there
    ]
    return sum(found) / len(found)


@given(st.integers(0, 2**32 - 1), st.integers(3, 9))
def test_figures_are_those_of_gradients_written_out(seed, batches):
    equal_BP, shaped_RBP = drawn(seed, batches=batches, numbers=7, rules=[(1, 0.5), (0.2, 1)])
    uniform, found = fidelities(products(equal_BP, shaped_RBP))
    assert uniform == pytest.approx(written_out(equal_BP, equal_BP))
    for shaped_BP, one in zip(shaped_RBP, found, strict=True):
        assert one.value == pytest.approx(written_out(equal_BP, shaped_BP))
        assert one.difference == pytest.approx(one.value - uniform)
        gains = [written_out(equal_BP, shaped_BP, out) - written_out(equal_BP, equal_BP, out) for out in range(batches)]
        mean = sum(gains) / batches
        spread = math.sqrt((batches - 1) / batches * sum((gain - mean) ** 2 for gain in gains)) * t95(batches - 1)
        assert (one.high - one.low) / 2 == pytest.approx(spread)
        sums = shaped_BP.sum(dim=0), equal_BP.sum(dim=0)
        assert one.bias == pytest.approx(torch.cosine_similarity(*sums, dim=0).item())


def test_equal_credit_differs_from_itself_by_nothing():
    equal_BP, _ = drawn(0, rules=[(1, 1)])
    _, (one, thrice) = fidelities(products(equal_BP, torch.stack([equal_BP, 3 * equal_BP])))
    for same in (one, thrice):  # a cosine knows no size
        assert (same.difference, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)
        assert (same.bias, same.worth, same.worth_low, same.worth_high) == pytest.approx((1, 1, 1, 1))


def test_a_rule_of_less_noise_is_ahead_and_worth_the_batch_that_it_saves():
    equal_BP, shaped_RBP = drawn(1, batches=64, numbers=4000, noise=3.0, rules=[(1, 0.5), (1, 2), (-1, 0.5)])
    uniform, (good, bad, backwards) = fidelities(products(equal_BP, shaped_RBP))
    assert uniform == pytest.approx(1 / math.sqrt(10), abs=0.05)
    assert good.low > 0 and good.worth == pytest.approx(4, rel=0.1)  # half the noise: a quarter of its square
    assert bad.high < 0 and bad.worth == pytest.approx(1 / 4, rel=0.1)
    assert backwards.high < 0 and backwards.worth == 0 and backwards.bias < 0


@pytest.mark.parametrize("seed", range(5))
def test_an_interval_holds_nothing_where_there_is_nothing(seed):
    random = torch.Generator().manual_seed(100 + seed)
    equal_BP, _ = drawn(seed, batches=32, numbers=500, rules=[(1, 1)])
    other_BP = equal_BP + 0.5 * torch.randn(equal_BP.shape, generator=random, dtype=torch.float64)
    _, (noisier,) = fidelities(products(equal_BP, other_BP[None]))
    assert noisier.high < 0.01 and noisier.worth_low < noisier.worth < noisier.worth_high


def test_where_equal_credit_finds_no_direction_no_worth_is_told():
    equal_BP, shaped_RBP = drawn(3, batches=6, numbers=200, noise=1000.0, rules=[(1, 0.5)])
    uniform, (one,) = fidelities(products(equal_BP, shaped_RBP))
    assert abs(uniform) < 0.3 and math.isnan(one.worth) and math.isnan(one.worth_low)
    assert one.low <= one.difference <= one.high


def test_a_rule_without_any_gradient_has_no_direction():
    equal_BP, _ = drawn(0, rules=[(1, 1)])
    uniform, (none,) = fidelities(products(equal_BP, torch.zeros_like(equal_BP)[None]))
    assert (none.value, none.difference, none.bias, none.worth) == (0, -uniform, 0, 0)


def test_two_batches_are_too_few():
    equal_BP, shaped_RBP = drawn(0, batches=2, rules=[(1, 1)])
    with pytest.raises(ValueError, match="at least 3 batches"):
        products(equal_BP, shaped_RBP)


def of_oracle(groups, own_noise, few_noise, numbers=100):
    """Gradients of single groups: equal credit with noise 4, an oracle with `own_noise`, estimated with `few_noise`."""
    random = torch.Generator().manual_seed(0)
    truth_P = torch.ones(numbers, dtype=torch.float64)

    def noise(size):
        return size * torch.randn(groups, numbers, generator=random, dtype=torch.float64)

    equal_GP, oracle_GP = truth_P + noise(4), truth_P + noise(own_noise)
    halves = [oracle_GP + noise(few_noise) for _ in range(2)]
    toward_3G = torch.stack([gradients @ truth_P for gradients in (equal_GP, *halves)])
    mean_GP = (halves[0] + halves[1]) / 2
    squares_2G = torch.stack([(halves[0] * halves[1]).sum(dim=1), mean_GP.square().sum(dim=1)])
    return oracle_worth(toward_3G, equal_GP.square().sum(dim=1), squares_2G)


def test_an_oracles_worth_is_free_of_the_noise_of_few_continuations():
    found = of_oracle(2000, own_noise=1.0, few_noise=3.0)
    assert found.worth == pytest.approx((1 + 4**2) / (1 + 1**2), rel=0.1)
    assert found.estimated == pytest.approx((1 + 4**2) / (1 + 1**2 + 3**2 / 2), rel=0.1)
    assert found.worth_low < found.worth < found.worth_high < 1.4 * found.worth and found.groups == 2000


def test_an_oracle_that_knows_no_more_than_equal_credit_is_worth_nothing():
    found = of_oracle(300, own_noise=4.0, few_noise=0.5)
    assert found.worth_low < 1 < found.worth_high
    with pytest.raises(ValueError, match="at least 3 groups"):
        of_oracle(2, own_noise=1.0, few_noise=1.0)
    none = oracle_worth(-torch.ones(3, 5), torch.ones(5), torch.ones(2, 5))  # it leads away
    assert math.isnan(none.worth) and math.isnan(none.estimated)
