"""From weights to the advantage that the loss sees. Pure. Legend: B rollouts, T completion tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlattn.types import AttentionOptions, CreditOptions

if TYPE_CHECKING:
    from torch import Tensor

Sign = Literal["both", "positive", "negative"]


def check_credit(credit: Any, attention: Any, options: Any, importance_sampling: str) -> None:
    """Raises ValueError or TypeError where a trainer is given what credit cannot work with."""
    if credit is not None and importance_sampling == "sequence":
        raise ValueError(
            "credit needs importance_sampling_level='token': one ratio a sequence spreads every token's gradient over "
            "all of them, so weights would not stay where they are put"
        )
    if credit is not None and (isinstance(credit, type) or not callable(credit)):
        raise TypeError(f"credit: expected a rule such as CREDIT_RULES['coupled_rhythm'](), got {credit!r}")
    for name, given, wanted in (("attention", attention, AttentionOptions), ("credit_options", options, CreditOptions)):
        if given is not None and not isinstance(given, wanted):
            raise TypeError(f"{name}: expected {wanted.__name__}, got {type(given).__name__}")


def apply_credit(advantage: Tensor, weights_BT: Tensor, sign: Sign = "both") -> Tensor:
    """advantage_BT: every token's advantage times its weight (arXiv 2510.13554, the shaped advantage A_t·gamma_t).

    Weights of 1 leave the advantage as it is, bit for bit. Zero advantages stay zero.

    Args:
        advantage: (B,), one a rollout, or (B, T).
        weights_BT: >= 0.
        sign: where the weights count: at every token, or only where the advantage is positive (negative). The paper
            finds both best (43.2; positive 42.0; negative 40.8; GRPO 39.4).
    """
    if sign not in ("both", "positive", "negative"):
        raise ValueError(f"sign: expected both, positive or negative, got {sign!r}")
    advantage_BT = advantage[:, None] if advantage.ndim == 1 else advantage
    return advantage_BT * effective_weights(advantage_BT, weights_BT, sign)


def effective_weights(advantage_BT: Tensor, weights_BT: Tensor, sign: Sign = "both") -> Tensor:
    """weights_BT where they count, 1 elsewhere."""
    if sign == "positive":
        return weights_BT.masked_fill(advantage_BT <= 0, 1)
    if sign == "negative":
        return weights_BT.masked_fill(advantage_BT >= 0, 1)
    return weights_BT


def scheduled_weights(weights_BT: Tensor, strength: float) -> Tensor:
    """1 + strength·(weight − 1): 1 everywhere at strength 0, the weights themselves at strength 1, both exactly."""
    return weights_BT.new_ones(()).lerp(weights_BT, strength)


def schedule(step: int, max_steps: int, warmup: float = 0.0, decay: float = 0.0) -> float:
    """The strength of credit at a step, in [0, 1]: a linear rise, a plateau at 1, a linear fall.

    Args:
        step: optimiser steps done so far: 0 at the first.
        max_steps: of the run.
        warmup: the share of the run in which strength rises from 0 (at step 0) to 1.
        decay: the share of the run, at its end, in which strength falls from 1 to 0 (at max_steps).
    """
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    if not (warmup >= 0 and decay >= 0 and warmup + decay <= 1):
        raise ValueError(f"expected warmup and decay >= 0, together at most 1; got {warmup} and {decay}")
    done, left = step / max_steps, (max_steps - step) / max_steps
    rise = done / warmup if warmup else 1.0
    fall = left / decay if decay else 1.0
    return max(0.0, min(1.0, rise, fall))
