"""Credit rules against hand-worked examples of every equation (arXiv 2510.13554, eq. 14-19), and the edges."""

from dataclasses import replace

import pytest
import torch
from conftest import without

from rlattn.credit import CREDIT_RULES, CreditRule, compute_credit
from rlattn.credit.selection import delta, largest_before, response_median
from rlattn.grpo.credit_log import CreditLog
from rlattn.types import Credit, Signals

NAN, INF = float("nan"), float("inf")


def signals(waad, fai, mask=None, entropy=None):
    """Signals of one or more rollouts from lists; the mask defaults to response everywhere."""
    waad_BN, fai_BN = (torch.tensor(rows if isinstance(rows[0], list) else [rows]).float() for rows in (waad, fai))
    mask_BN = torch.ones_like(waad_BN) if mask is None else torch.tensor(mask).view_as(waad_BN)
    entropy_BN = None if entropy is None else torch.tensor(entropy).float().view_as(waad_BN)
    return Signals(waad_BN=waad_BN, fai_BN=fai_BN, mask_BN=mask_BN.bool(), entropy_BN=entropy_BN)


def weights(name, given_signals, step=0, **options):
    credit = compute_credit(CREDIT_RULES[name](**options), given_signals, step=step)
    assert credit.weights_BN.dtype == torch.float32
    return credit.weights_BN.squeeze(0).tolist()


# -- the equations by hand --------------------------------------------------------------------------------------------

# Two prompt tokens, eight response tokens, two of padding; n = 8, so ceil(0.4·8) = 4 tokens are picked.
#         prompt        response t0 .. t7                       padding
WAAD = [NAN, NAN, 5.0, 1.0, 2.0, 6.0, 1.0, 1.5, 4.0, 1.0, NAN, NAN]
# Delta             4.0  1.0  4.0  5.0  0.5  2.5  3.0  --              the four largest: t3 5, t0 4, t2 4, t6 3
FAI = [
    NAN,
    NAN,
    0.3,
    0.9,
    0.1,
    0.2,
    0.8,
    0.2,
    NAN,
    NAN,
    NAN,
    NAN,
]  # t1 .9, t4 .8, t0 .3, and of the .2s the earlier, t3
MASK = [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
WORKED = signals(WAAD, FAI, MASK)


def test_local_chunk_eq_14_15():
    expected = [NAN, NAN, 4.0, 1.0, 4.0, 5.0, 0.5, 2.5, 3.0, NAN, NAN, NAN]
    assert delta(WORKED.waad_BN, WORKED.mask_BN)[0].tolist() == pytest.approx(expected, nan_ok=True)
    assert weights("local_chunk", WORKED) == [1, 1, 1.5, 1, 1.5, 1.5, 1, 1, 1.5, 1, 1, 1]


def test_global_anchor_eq_16_17():
    assert weights("global_anchor", WORKED) == [1, 1, 1.5, 1.5, 1, 1.5, 1.5, 1, 1, 1, 1, 1]
    assert weights("global_anchor", WORKED, amplification=3) == [1, 1, 3, 3, 1, 3, 3, 1, 1, 1, 1, 1]
    # Of six defined scores the four lowest: .1, .2, .2, .3.
    assert weights("global_anchor", WORKED, select="bottom") == [1, 1, 1.5, 1, 1.5, 1.5, 1, 1.5, 1, 1, 1, 1]


def test_coupled_rhythm_eq_18_19():
    # WAAD in order: 1 1 1 1.5 2 4 5 6, so its median is 1.5 (or 1.75: the same tokens lie below); tau_delta = 3.
    assert response_median(WORKED.waad_BN, WORKED.mask_BN).item() == 1.5
    # t0: WAAD 5, an anchor alone. t1: WAAD 1, before it t0 with Delta 4 >= 3: dominated, shares with t0.
    # t3: WAAD 6, an anchor alone. t4: WAAD 1, before it t1 1, t2 4, t3 5: dominated, shares with t3.
    # t0 and t3 are anchors and intros: 1 + .5 + .25. t1 and t4: 1 + .25.
    assert weights("coupled_rhythm", WORKED) == [1, 1, 1.75, 1.25, 1, 1.75, 1.25, 1, 1, 1, 1, 1]
    # All of a dominated anchor's gain to its intro.
    assert weights("coupled_rhythm", WORKED, alpha=1.0) == [1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]


def test_coupled_rhythm_looks_back_no_further_than_k():
    # Anchor t3 (the only one, q = 0.25 of 4): WAAD 1 is below the median 1 or 2, Deltas 8, 0, 1: tau_delta 8, at t0.
    three_before = signals([[10.0, 2.0, 2.0, 1.0]], [[0.1, 0.2, 0.3, 0.9]])
    assert weights("coupled_rhythm", three_before, top_fraction=0.25) == [1.25, 1, 1, 1.25]
    assert weights("coupled_rhythm", three_before, top_fraction=0.25, lookback=2) == [1, 1, 1, 1.5]


def test_two_anchors_with_one_intro_raise_it_once():
    # Delta 8 at t0, 0 and 0; the anchors t1 and t2 (q = 0.5 of 4) are both dominated by t0.
    shared = signals([[10.0, 2.0, 2.0, 2.0]], [[0.1, 0.9, 0.8, 0.2]])
    # q = 0.5 takes two Deltas, 8 and the earlier 0, so tau_delta = 0: the largest Delta is still at t0.
    assert weights("coupled_rhythm", shared, top_fraction=0.5) == [1.25, 1.25, 1.25, 1]


def test_equal_deltas_are_introduced_by_the_earlier_token():
    largest_BN, lag_BN = largest_before(torch.tensor([[NAN, 4.0, 4.0, 1.0, NAN]]), lookback=3)
    assert largest_BN.tolist() == [[-INF, -INF, 4, 4, 4]]
    assert lag_BN.tolist() == [[0, 0, 1, 2, 3]]


def test_entropy_and_its_bottom():
    given_signals = signals([[1.0] * 5], [[1.0] * 5], entropy=[0.1, 0.9, 0.3, 0.9, 0.2])
    assert weights("entropy", given_signals) == [1, 1.5, 1, 1.5, 1]
    assert weights("entropy", given_signals, select="bottom") == [1.5, 1, 1, 1, 1.5]
    with pytest.raises(ValueError, match="entropy"):
        CREDIT_RULES["entropy"]()(signals([[1.0]], [[1.0]]))


def test_mean_one_divides_by_the_mean_of_the_response():
    # 4 of 8 tokens at 1.5: the mean is 1.25.
    expected = [1, 1, 1.2, 1.2, 0.8, 1.2, 1.2, 0.8, 0.8, 0.8, 1, 1]
    assert weights("global_anchor", WORKED, normalize="mean_one") == pytest.approx(expected)


# -- edges ------------------------------------------------------------------------------------------------------------

RULES = [name for name in CREDIT_RULES if name != "uniform"]


@pytest.mark.parametrize("name", CREDIT_RULES)
def test_edges(name):
    # Rows: empty response; one token (no Delta, no FAI); shorter than Hlo (no FAI); all scores equal; a hole.
    mask = [[0] * 6, [0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 1, 1]]
    waad = [[1.0 if m else NAN for m in row] for row in mask]
    fai = [[NAN] * 6, [NAN] * 6, [NAN] * 6, [0.5] * 6, [0.5 if m else NAN for m in mask[4]]]
    given_signals = signals(waad, fai, mask, entropy=[[1.0] * 6] * 5)
    credit = compute_credit(CREDIT_RULES[name](), given_signals)
    assert credit.weights_BN.isfinite().all() and (credit.weights_BN[~given_signals.mask_BN] == 1).all()
    assert credit.metrics["credit/nonfinite_rows"] == 0
    all_equal = credit.weights_BN[3].tolist()
    expected = {"uniform": [1.0] * 6, "coupled_rhythm": [1.75, 1.25, 1.25, 1, 1, 1]}
    if name not in ("random", "shuffled"):  # ceil(0.4·6) = 3, ties to the earlier token
        assert all_equal == expected.get(name, [1.5, 1.5, 1.5, 1, 1, 1])
    if name in ("global_anchor", "coupled_rhythm", "local_chunk"):
        assert credit.weights_BN[1].tolist() == [1] * 6
    if name in ("global_anchor", "coupled_rhythm"):
        assert credit.weights_BN[2].tolist() == [1] * 6
    if name == "local_chunk":  # a Delta across the hole would be a jump that the policy did not make
        assert credit.weights_BN[4].tolist() == [1.5, 1, 1, 1, 1.5, 1]


@pytest.mark.parametrize("name", CREDIT_RULES)
def test_a_batch_without_any_response(name):
    credit = CREDIT_RULES[name]()(signals([[NAN] * 3], [[NAN] * 3], [[0] * 3], entropy=[[NAN] * 3]))
    assert credit.weights_BN.tolist() == [[1, 1, 1]]
    assert credit.metrics["credit/mean"] == 1


@pytest.mark.parametrize(
    ("waad", "fai"),
    [
        ([NAN] * 4, [NAN] * 4),
        ([1.0, INF, 2.0, 3.0], [0.1] * 4),
        ([1.0, NAN, 2.0, 3.0], [0.1] * 4),
        ([1.0] * 4, [-INF] * 4),
    ],
)
@pytest.mark.parametrize("name", ["local_chunk", "global_anchor", "coupled_rhythm", "shuffled"])
def test_a_row_whose_signals_failed_keeps_weight_one_and_is_counted(name, waad, fai):
    good = [4.0, 1.0, 2.0, 3.0]
    credit = CREDIT_RULES[name](normalize="mean_one")(signals([good, waad], [good, fai]))
    assert credit.weights_BN[1].tolist() == [1] * 4
    assert credit.weights_BN[0].max() > 1
    assert credit.metrics["credit/nonfinite_rows"] == 1
    assert credit.metrics["credit/share_undefined"] >= 0.5


def test_failed_entropy_is_counted_too():
    given_signals = signals([[1.0] * 3] * 2, [[1.0] * 3] * 2, entropy=[[1.0, 2.0, NAN], [NAN, 1.0, 2.0]])
    credit = CREDIT_RULES["entropy"]()(given_signals)
    assert credit.weights_BN.tolist() == [[1, 1, 1], [1, 1.5, 1.5]]  # nothing comes before position 0: no entropy there
    assert credit.metrics["credit/nonfinite_rows"] == 1


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, "top_fraction", q) for name in RULES for q in (0, 1.1, -0.1, NAN)]
    + [(name, "amplification", a) for name in RULES for a in (0.5, NAN, INF)]
    + [(name, "normalize", "sum") for name in RULES]
    + [("local_chunk", "select", "middle"), ("coupled_rhythm", "lookback", 0), ("coupled_rhythm", "alpha", 1.5)]
    + [("shuffled", "of", "random"), ("shuffled", "select", "middle")],
)
def test_bad_options(name, option, value):
    with pytest.raises(ValueError, match=option):
        CREDIT_RULES[name](**{option: value})


@pytest.mark.parametrize("name", CREDIT_RULES)
def test_every_rule_says_what_it_needs(name):
    rule = CREDIT_RULES[name]()
    assert isinstance(rule, CreditRule)
    assert rule.needs_entropy == (name == "entropy")
    assert getattr(rule, "reads_fai", False) == (name in ("global_anchor", "coupled_rhythm", "shuffled"))


def test_a_number_that_a_rule_goes_on_counting_is_kept_as_it_was():
    """Read at the end of a step, not of the batch."""
    count = torch.zeros(())

    def rule(given):
        count.add_(1)
        return Credit(weights_BN=torch.ones_like(given.waad_BN), metrics={"count": count})

    seen = [compute_credit(rule, signals([1, 2], [1, 2])).metrics["credit/count"] for _ in range(3)]
    assert [float(value) for value in seen] == [1, 2, 3]


def test_a_rule_reaches_neither_the_signals_nor_the_gradients_switch(caplog):
    def spoils(given):
        given.mask_BN.zero_()
        given.waad_BN.resize_(0)
        torch.set_grad_enabled(False)
        raise RuntimeError("spoiled")

    def negative_behind_a_mask(given):
        far_BN = given.mask_BN
        far_BN &= given.waad_BN > 2
        return Credit(weights_BN=torch.where(far_BN, 1.5, -1.0))

    given = signals([1, 2, 3], [1, 2, NAN])
    for _ in range(3):
        credit = compute_credit(spoils, given, proven=True)
        assert credit.weights_BN.tolist() == [[1, 1, 1]] and credit.metrics["credit/refused_rows"] == 1
    assert caplog.text.count("spoiled") == 1
    assert torch.is_grad_enabled()
    assert given.mask_BN.all() and given.waad_BN.tolist() == [[1, 2, 3]]
    credit = compute_credit(negative_behind_a_mask, given)
    assert credit.weights_BN.tolist() == [[1, 1, 1]] and credit.metrics["credit/refused_rows"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask_BN": torch.ones(1, 3)}, "bool mask_BN"),
        ({"mask_BN": torch.ones(0, 3, dtype=torch.bool)}, "at least one token"),
        ({"waad_BN": torch.ones(1, 2)}, "waad_BN"),
        ({"entropy_BN": torch.ones(1, 3, dtype=torch.long)}, "entropy_BN"),
    ],
)
def test_signals_that_do_not_belong_together_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        compute_credit(CREDIT_RULES["uniform"](), replace(signals([1, 2, 3], [1, 2, 3]), **change))


def test_numbers_of_a_step_are_logged_once_and_those_of_a_broken_one_never():
    logged = []
    callback = CreditLog(lambda name, value: logged.append((name, value)))
    callback.batches.append({"credit/mean": torch.tensor(9.0)})  # an error breaks the step off
    callback.on_step_begin(None, None, None)
    callback.batches += [
        {"credit/mean": torch.tensor(1.0), "credit/refused_rows": torch.tensor(1.0)},
        {"credit/mean": torch.tensor(2.0), "credit/refused_rows": torch.tensor(2.0), "credit/own": torch.tensor(4)},
    ]
    callback.on_step_end(None, None, None)
    callback.on_step_end(None, None, None)
    means, counts = logged[:3], logged[3:]
    assert means == [("credit/mean", 1.0), ("credit/mean", 2.0), ("credit/own", 4.0)]
    assert counts == [("credit/nonfinite_rows", 0), ("credit/refused_rows", 3.0)]


def test_rules_are_listed_and_validated_without_torch():
    without({"torch"}, "from rlattn.credit import CREDIT_RULES; CREDIT_RULES['shuffled'](of='local_chunk')")
