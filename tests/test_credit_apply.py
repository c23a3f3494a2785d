"""What a rule logs, what a user's own rule may not do, and how weights reach the advantage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlattn.credit import CREDIT_RULES, apply_credit, check_weights, compute_credit, schedule, scheduled_weights
from rlattn.types import Credit, Signals

NAN, INF = float("nan"), float("inf")


def signals(waad, fai, mask=None, entropy=None):
    """Signals of B rollouts from lists; the mask defaults to response everywhere."""
    waad_BN, fai_BN = torch.tensor(waad), torch.tensor(fai)
    mask_BN = torch.ones_like(waad_BN) if mask is None else torch.tensor(mask)
    entropy_BN = None if entropy is None else torch.tensor(entropy)
    return Signals(waad_BN=waad_BN, fai_BN=fai_BN, mask_BN=mask_BN.bool(), entropy_BN=entropy_BN)


def test_diagnostics_by_hand():
    table = [0.0, 8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0, 4.5]
    fai = [0.1, 0.2, 0.3, 0.9, 0.4, 0.5, 0.8, 0.7, NAN, NAN]
    entropy = [0.0, 3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    metrics = CREDIT_RULES["global_anchor"]()(signals([table], [fai], entropy=[entropy])).metrics
    # Anchors (4 of 10): t3 .9, t6 .8, t7 .7, t5 .5. Deltas 8 7 6 5 4 3 2 1 .5: preplans t0 t1 t2 t3, of which t3 is an
    # anchor. Peaks (2 of 10): WAAD t1 and t3; FAI t3 (at one) and t6 (after none). Entropy at t1, t3: 2.5 against 0.5.
    expected = {
        "mean": 1.2,  # (6 + 4·1.5)/10
        "max": 1.5,
        "share_amplified": 0.4,
        "gini": 0.1,  # sum over the sorted: 1.0·(−9−7−5−3−1+1) + 1.5·(3+5+7+9) = 12; 12/(10·12)
        "effective_tokens": 0.96,  # 144/(10·15)
        "share_undefined": 0.2,
        "anchor_preplan_overlap": 0.25,
        "waad_entropy_coupling": 5.0,
        "fai_waad_coupling": 0.5,
        "nonfinite_rows": 0.0,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {f"credit/{name}": value for name, value in expected.items()}
    )


def test_uniform_without_any_signal():
    empty = signals([[NAN] * 3], [[NAN] * 3])
    metrics = CREDIT_RULES["uniform"]()(empty).metrics
    assert metrics["credit/gini"] == 0 and metrics["credit/effective_tokens"] == 1
    assert metrics["credit/nonfinite_rows"] == 0 and metrics["credit/share_amplified"] == 0
    assert metrics["credit/fai_waad_coupling"].isnan() and "credit/waad_entropy_coupling" not in metrics


# -- a user's own rule ------------------------------------------------------------------------------------------------


class Own:
    """As a user would write it: no step, no diagnostics."""

    def __call__(self, signals):
        table = torch.tensor([[NAN, 2.0, 3.0], [-1.0, 2.0, 3.0], [1.0, INF, 3.0]], dtype=torch.float64)
        return Credit(weights_BN=table, metrics={"credit/mine": torch.tensor(7.0)})


def test_a_users_rule_is_checked_and_gets_the_diagnostics():
    mask = [[0, 1, 1], [1, 1, 1], [1, 1, 1]]
    credit = compute_credit(Own(), signals([[1.0] * 3] * 3, [[1.0] * 3] * 3, mask), step=3)
    assert credit.weights_BN.tolist() == [[1, 2, 3], [1, 1, 1], [1, 1, 1]]  # NaN in the prompt does no harm
    assert credit.metrics["credit/refused_rows"] == 2 and credit.metrics["credit/nonfinite_rows"] == 0
    assert credit.metrics["credit/mine"] == 7
    assert credit.metrics["credit/mean"] == pytest.approx(11 / 8)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2\), the response mask \(1, 3\)"):
        check_weights(Credit(weights_BN=torch.ones(1, 2), metrics={}), signals([[1.0] * 3], [[1.0] * 3]))


# -- on to the advantage ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), st.sampled_from(["both", "positive", "negative"])
)
def test_uniform_leaves_the_advantage_bit_for_bit(advantages, sign):
    advantage_B = torch.tensor(advantages)
    batch = signals([[1.0] * 4] * len(advantages), [[1.0] * 4] * len(advantages))
    weights_BT = scheduled_weights(CREDIT_RULES["uniform"]()(batch).weights_BN, 0.37)
    assert torch.equal(apply_credit(advantage_B, weights_BT, sign), advantage_B[:, None].expand(-1, 4))
    assert torch.equal(
        apply_credit(advantage_B[:, None].expand(-1, 4), weights_BT, sign), advantage_B[:, None].expand(-1, 4)
    )


def test_sign():
    advantage_B, weights_BT = torch.tensor([2.0, -2.0, 0.0]), torch.tensor([[1.0, 1.5]] * 3)
    assert apply_credit(advantage_B, weights_BT).tolist() == [[2, 3], [-2, -3], [0, 0]]
    assert apply_credit(advantage_B, weights_BT, "positive").tolist() == [[2, 3], [-2, -2], [0, 0]]
    assert apply_credit(advantage_B, weights_BT, "negative").tolist() == [[2, 2], [-2, -3], [0, 0]]
    mixed_BT = torch.tensor([[2.0, -2.0]])  # rewards may speak for different tokens of a rollout
    assert apply_credit(mixed_BT, torch.tensor([[1.5, 1.5]]), "positive").tolist() == [[3, -2]]
    with pytest.raises(ValueError, match="sign"):
        apply_credit(advantage_B, weights_BT, "neither")


def test_schedule():
    # 100 steps: up over 10, down over the last 20.
    strengths = [schedule(step, 100, warmup=0.1, decay=0.2) for step in (0, 5, 10, 80, 90, 100, 120)]
    assert strengths == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])
    assert [schedule(step, 100) for step in (0, 50, 100)] == [1, 1, 1]
    for options in ({"max_steps": 0}, {"max_steps": 9, "warmup": -0.1}, {"max_steps": 9, "warmup": 0.6, "decay": 0.6}):
        with pytest.raises(ValueError):
            schedule(0, **options)


@given(st.lists(st.floats(0, 8, width=32), min_size=1, max_size=5), st.floats(0, 1))
def test_scheduled_weights(values, strength):
    weights_BT = torch.tensor([values])
    assert torch.equal(scheduled_weights(weights_BT, 1.0), weights_BT)
    assert torch.equal(scheduled_weights(weights_BT, 0.0), torch.ones_like(weights_BT))
    torch.testing.assert_close(scheduled_weights(weights_BT, strength), 1 + strength * (weights_BT - 1))
