"""What credit rules share: the protocol, the common options, and the way from picked tokens to a `Credit`.

Legend: B rollouts, N positions (prompt and completion). Nothing here imports torch: a recipe's rule is checked where
torch is slow or missing.
"""

import inspect
import logging
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from rlattn.credit.diagnostics import diagnose
from rlattn.credit.selection import Select, incomplete_rows
from rlattn.errors import UserError, describe
from rlattn.types import Credit, CreditRule, Signals

if TYPE_CHECKING:
    from torch import Tensor

Normalize = Literal["none", "mean_one"]
REFUSED = "credit/refused_rows"
LARGEST_AMPLIFICATION = 100.0
LARGEST_WEIGHT = 1e4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Amplify:
    """The options of every rule that raises the weight of some tokens."""

    amplification: float = 1.5
    """gamma_amp: the weight of a picked token."""
    top_fraction: float = 0.4
    """q: the share of a response's tokens that is picked, rounded up."""
    normalize: Normalize = "none"
    """`mean_one` divides by the mean weight of the response, so that the size of the step stays GRPO's."""

    needs_entropy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.amplification <= LARGEST_AMPLIFICATION:
            raise ValueError(f"amplification: expected 1 to {LARGEST_AMPLIFICATION:g}, got {self.amplification}")
        if not 0 < self.top_fraction <= 1:
            raise ValueError(f"top_fraction: expected more than 0 and at most 1, got {self.top_fraction}")
        check_choice("normalize", self.normalize, get_args(Normalize))

    def credit(
        self, signals: Signals, gain_BN: "Tensor", scores_BN: "Tensor", failed_B: "Tensor | None" = None
    ) -> Credit:
        """weight = 1 + (amplification − 1)·gain in the response of every row whose signals are usable, else 1.

        Args:
            gain_BN: bool or float >= 0.
            scores_BN: what the tokens were picked by; NaN counts as undefined.
            failed_B: bool, rows to leave at 1; None for none.
        """
        if failed_B is None:
            failed_B = signals.mask_BN.new_zeros(len(signals.mask_BN))
        raised_BN = signals.mask_BN & ~failed_B[:, None]
        weights_BN = (1 + (self.amplification - 1) * gain_BN.float()).masked_fill(~raised_BN, 1)
        if self.normalize == "mean_one":
            length_B1 = signals.mask_BN.sum(dim=1, keepdim=True)
            mean_B1 = weights_BN.masked_fill(~signals.mask_BN, 0).sum(dim=1, keepdim=True) / length_B1
            weights_BN = (weights_BN / mean_B1).masked_fill(~raised_BN, 1)
        undefined_BN = scores_BN.isnan() | failed_B[:, None]
        metrics = diagnose(
            weights_BN, signals, failed_B=failed_B, undefined_BN=undefined_BN, fraction=self.top_fraction
        )
        return Credit(weights_BN=weights_BN, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class Ranked(Amplify):
    """The options of rules that pick tokens by a score."""

    select: Select = "top"
    """`bottom` picks the lowest scores: the ablation that ruins training in the paper (33.1 against 43.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("select", self.select, get_args(Select))


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option}: expected {' or '.join(choices)}, got {value!r}")


def attention_failed(signals: Signals) -> "Tensor":
    """Bool (B,): rows whose attention signals cannot be trusted.

    Every response token has a WAAD, so a missing one means that the capture failed or the model overflowed. FAI has
    gaps by definition and may be missing throughout a short response; only infinite values speak against it.
    """
    infinite_B = (signals.fai_BN.isinf() & signals.mask_BN).any(dim=1)
    return incomplete_rows(signals.waad_BN, signals.mask_BN) | infinite_B


def compute_credit(rule: CreditRule, signals: Signals, step: int = 0, *, proven: bool = False) -> Credit:
    """The rule's credit, checked. The way to call any rule. It gets copies of the signals: what it writes into them
    reaches nothing else.

    Args:
        proven: a user's rule has worked before. Where it then raises, or gives no weights of the mask's shape, the
            batch has GRPO's equal credit, every rollout of it counts in `credit/refused_rows`, and each failure is
            logged once.

    Raises:
        ValueError: the signals hold no token, or their shapes or types do not belong together.
        UserError: a user's rule fails that is not proven. What a built-in rule raises comes as it is.
    """
    import torch  # here, so that checking a recipe does not import it

    check_signals(signals)
    try:
        with torch.no_grad():  # which also puts back what a rule does to the gradients' switch
            own = _copied(signals)
            credit = rule(own, step=step) if "step" in inspect.signature(rule).parameters else rule(own)
        return check_weights(credit, signals)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if type(rule).__module__.partition(".")[0] == __name__.partition(".")[0]:  # a built-in has no failure to bear
            raise
        if not proven:
            problem = f"the rule {_name(rule)} fails on its first step: {describe(error)}."
            raise UserError("credit", problem, "Mend it, or leave credit out for GRPO's equal weights.") from error
        _warn_once(_name(rule), describe(error))
        ones_BN = signals.mask_BN.float().new_ones(signals.mask_BN.shape)
        failed = ones_BN.new_tensor(float(len(ones_BN)))
        return Credit(weights_BN=ones_BN, metrics={**diagnose(ones_BN, signals), REFUSED: failed})


def _name(rule: CreditRule) -> str:
    return getattr(rule, "__name__", type(rule).__name__)


@lru_cache(maxsize=1000)
def _warn_once(rule: str, problem: str) -> None:
    logger.warning("credit rule %s failed, its weights are 1: %s", rule, problem)


def _copied(signals: Signals) -> Signals:
    values = {field.name: getattr(signals, field.name) for field in fields(signals)}
    return replace(signals, **{name: value.clone() for name, value in values.items() if hasattr(value, "clone")})


def check_signals(signals: Signals) -> None:
    """Raises ValueError unless there is a token, and WAAD, FAI and entropy have the bool mask's shape."""
    import torch

    shape = tuple(signals.mask_BN.shape)
    if len(shape) != 2 or 0 in shape or signals.mask_BN.dtype != torch.bool:
        raise ValueError(f"signals: expected a bool mask_BN of at least one token, found {shape}")
    for name in ("waad_BN", "fai_BN", "entropy_BN"):
        values_BN = getattr(signals, name)
        if values_BN is not None and (tuple(values_BN.shape) != shape or not values_BN.is_floating_point()):
            found = f"{tuple(values_BN.shape)}, {values_BN.dtype}"
            raise ValueError(f"signals: expected {name} as floats of the mask's shape {shape}, got {found}")


def check_weights(credit: Credit, signals: Signals) -> Credit:
    """A user's rule cannot spoil a run: a row with a negative or non-finite weight gets 1 everywhere.

    So does a row with a weight above LARGEST_WEIGHT, which would overflow the loss. Such rows count in
    `credit/refused_rows`. A rule without diagnostics gets the usual ones; of its own metrics the scalars are kept.
    Weights come out float32, detached, and 1 outside the response whatever the rule wrote there.

    Raises:
        ValueError: the weights have another shape than the response mask.
    """
    if credit.weights_BN.shape != signals.mask_BN.shape:
        shapes = f"{tuple(credit.weights_BN.shape)}, the response mask {tuple(signals.mask_BN.shape)}"
        raise ValueError(f"credit rule: its weights have shape {shapes}")
    weights_BN = credit.weights_BN.detach().float()
    sound_BN = weights_BN.isfinite() & (weights_BN >= 0) & (weights_BN <= LARGEST_WEIGHT)
    invalid_B = (~sound_BN & signals.mask_BN).any(dim=1)
    weights_BN = weights_BN.masked_fill(~signals.mask_BN | invalid_B[:, None], 1)
    own = {
        name if name.startswith("credit/") else f"credit/{name}": _scalar(value, weights_BN)
        for name, value in credit.metrics.items()
    }
    diagnosed = "credit/nonfinite_rows" in own
    metrics = {**({} if diagnosed else diagnose(weights_BN, signals)), **own, REFUSED: invalid_B.sum().float()}
    return Credit(weights_BN=weights_BN, metrics=metrics)


def _scalar(value: "Tensor | float", like: "Tensor") -> "Tensor":
    """A tensor stays where it is: reading it would wait for the GPU. A copy: the rule may go on counting in its own."""
    if isinstance(value, type(like)):
        return value.detach().to(like, copy=True).reshape(())
    return like.new_tensor(float(value))
