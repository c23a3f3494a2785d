"""What holds for every credit rule and every batch; eq. 18-19 of arXiv 2510.13554 against one token after another."""

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlattn.credit import CREDIT_RULES
from rlattn.credit.selection import top_fraction
from rlattn.types import Signals

NAN = float("nan")


@st.composite
def batches(draw, rows=2, least=1):
    """Signals with holes, ties (few distinct values, exact in float32) and undefined FAI."""
    length = draw(st.integers(least, 14))
    number = st.integers(0, 6).map(lambda i: i / 4)
    table = st.lists(st.lists(number, min_size=length, max_size=length), min_size=rows, max_size=rows)
    mask = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    undefined = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    mask_BN, gone_BN = torch.tensor(mask), torch.tensor(undefined)
    waad_BN, fai_BN, entropy_BN = (torch.tensor(draw(table)).masked_fill(~mask_BN, NAN) for _ in range(3))
    return Signals(waad_BN=waad_BN, fai_BN=fai_BN.masked_fill(gone_BN, NAN), mask_BN=mask_BN, entropy_BN=entropy_BN)


FRACTIONS = st.sampled_from([0.01, 0.1, 0.2, 0.4, 0.55, 0.7, 1.0])


@given(batches(), FRACTIONS, st.sampled_from(["top", "bottom"]))
def test_top_fraction_against_sorting(batch, fraction, select):
    picked_BN = top_fraction(batch.fai_BN, batch.mask_BN, fraction, select)
    for scores, mask, picked in zip(batch.fai_BN.tolist(), batch.mask_BN.tolist(), picked_BN.tolist()):
        count = math.ceil(Fraction(str(fraction)) * sum(mask))
        defined = [i for i, (score, inside) in enumerate(zip(scores, mask)) if inside and score == score]
        ranked = sorted(defined, key=lambda i: (-scores[i] if select == "top" else scores[i], i))
        assert [i for i, flag in enumerate(picked) if flag] == sorted(ranked[:count])


def test_the_count_is_that_of_the_decimal_fraction():
    # In floating point 0.55 · 100 = 55.00000000000001 and 0.07 · 100 = 7.000000000000001.
    for fraction, count in ((0.55, 55), (0.07, 7), (0.4, 40), (1.0, 100), (1e-9, 1)):
        picked_BN = top_fraction(torch.rand(1, 100), torch.ones(1, 100, dtype=torch.bool), fraction)
        assert picked_BN.sum() == count


def coupled_by_token(waad, fai, mask, q, k, alpha, b):
    """Eq. 18-19, one token after another."""
    n, length = sum(mask), len(mask)
    response = [t for t in range(length) if mask[t]]
    steps = {t: abs(waad[t] - waad[t + 1]) for t in response if t + 1 < length and mask[t + 1]}
    count = math.ceil(Fraction(str(q)) * n)
    anchors = sorted((t for t in response if fai[t] == fai[t]), key=lambda t: (-fai[t], t))[:count]
    preplans = sorted(steps, key=lambda t: (-steps[t], t))[:count]
    gamma = [1.0] * length
    intros = set()
    for t in anchors:
        before = [u for u in range(t - k, t) if u in steps]
        intro = max(before, key=lambda u: (steps[u], -u), default=None)
        dominated = (
            intro is not None
            and waad[t] <= statistics.median([waad[u] for u in response])
            and steps[intro] >= min(steps[u] for u in preplans)
        )
        gamma[t] += (1 - alpha) * b if dominated else b
        if dominated:
            intros.add(intro)
    for u in intros:
        gamma[u] += alpha * b
    return gamma


@given(
    batches(rows=3), FRACTIONS, st.integers(1, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([1.5, 3.0])
)
def test_coupled_rhythm_against_one_token_after_another(batch, q, k, alpha, amplification):
    rule = CREDIT_RULES["coupled_rhythm"](top_fraction=q, lookback=k, alpha=alpha, amplification=amplification)
    rows = zip(batch.waad_BN.tolist(), batch.fai_BN.tolist(), batch.mask_BN.tolist())
    expected = [coupled_by_token(*row, q, k, alpha, amplification - 1) for row in rows]
    assert rule(batch).weights_BN.tolist() == expected  # sums of quarters: exact


@pytest.mark.parametrize("name", CREDIT_RULES)
@given(batch=batches(), fraction=FRACTIONS, mean_one=st.booleans())
def test_weights_of_every_rule(name, batch, fraction, mean_one):
    normalize = "mean_one" if mean_one else "none"
    rule = CREDIT_RULES[name]() if name == "uniform" else CREDIT_RULES[name](top_fraction=fraction, normalize=normalize)
    weights_BN = rule(batch).weights_BN
    assert weights_BN.dtype == torch.float32 and weights_BN.isfinite().all() and (weights_BN >= 0).all()
    assert (weights_BN[~batch.mask_BN] == 1).all()
    assert torch.equal(rule(batch).weights_BN, weights_BN)
    if mean_one:
        for row, mask in zip(weights_BN, batch.mask_BN):
            assert not mask.any() or row[mask].mean().item() == pytest.approx(1, abs=1e-5)
    elif name in ("random", "entropy"):
        counts = [math.ceil(Fraction(str(fraction)) * n) for n in batch.mask_BN.sum(1).tolist()]
        assert (weights_BN > 1).sum(1).tolist() == counts


@pytest.mark.parametrize("name", ["local_chunk", "global_anchor", "entropy"])
@given(seed=st.integers(0, 99), length=st.integers(5, 40))
def test_top_and_bottom_do_not_meet_where_scores_are_distinct(name, seed, length):
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(3, length, generator=generator, dtype=torch.float64).float()
    batch = Signals(waad_BN=table, fai_BN=table, mask_BN=table >= 0, entropy_BN=table)
    top, bottom = (CREDIT_RULES[name](top_fraction=0.3, select=s)(batch).weights_BN > 1 for s in ("top", "bottom"))
    assert not (top & bottom).any()
    assert top.sum(1).tolist() == bottom.sum(1).tolist() == [math.ceil(Fraction(3, 10) * length)] * 3


@pytest.mark.parametrize("of", ["local_chunk", "global_anchor", "coupled_rhythm"])
@given(batch=batches(), step=st.integers(0, 9))
def test_shuffled_keeps_the_weights_of_each_response(of, batch, step):
    plain = CREDIT_RULES[of](top_fraction=0.3)(batch)
    moved = CREDIT_RULES["shuffled"](of=of, top_fraction=0.3)(batch, step=step)
    for row in range(2):
        mask = batch.mask_BN[row]
        assert torch.equal(plain.weights_BN[row][mask].sort().values, moved.weights_BN[row][mask].sort().values)
    assert moved.metrics.keys() == plain.metrics.keys()


@pytest.mark.parametrize("name", ["random", "shuffled"])
def test_draws_differ_from_step_to_step_and_repeat(name):
    table = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    batch = Signals(waad_BN=table, fai_BN=table, mask_BN=table >= 0)
    state = torch.get_rng_state()
    drawn = [CREDIT_RULES[name](seed=seed)(batch, step=step).weights_BN for seed in (0, 1) for step in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(drawn[i], drawn[j])
    assert torch.equal(CREDIT_RULES[name](seed=1)(batch, step=1).weights_BN, drawn[3])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert torch.equal(torch.get_rng_state(), state)  # the training's own draws stay what they were


def test_random_picks_every_token_equally_often():
    mask = torch.ones(200, 10)
    batch = Signals(waad_BN=mask, fai_BN=mask, mask_BN=mask.bool())
    share_N = (CREDIT_RULES["random"]()(batch).weights_BN > 1).float().mean(0)
    assert share_N.sum() == pytest.approx(4)
    assert (share_N - 0.4).abs().max() < 0.15  # 0.4 ± 4 standard errors of 0.035
