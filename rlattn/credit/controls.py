"""Controls: what the rhythm rules must beat, and plain GRPO. Cost: none worth measuring. Logs: see diagnostics.py."""

import random
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from rlattn.credit.base import Amplify, Ranked, check_choice
from rlattn.credit.diagnostics import diagnose
from rlattn.credit.rhythm import CoupledRhythm, GlobalAnchor, LocalChunk
from rlattn.credit.selection import incomplete_rows, top_fraction
from rlattn.types import Credit, CreditRule, Signals

if TYPE_CHECKING:
    from torch import Tensor

SHUFFLED: dict[str, type] = {
    "local_chunk": LocalChunk,
    "global_anchor": GlobalAnchor,
    "coupled_rhythm": CoupledRhythm,
}


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Weight 1 everywhere: plain GRPO, bit for bit, through the same product as every rule."""

    needs_entropy: ClassVar[bool] = False

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        weights_BN = signals.waad_BN.new_ones(signals.mask_BN.shape).float()
        return Credit(weights_BN=weights_BN, metrics=diagnose(weights_BN, signals))


@dataclass(frozen=True, kw_only=True)
class Random(Amplify):
    """Raises a random top_fraction of every response: does it matter which tokens? (Baseline of arXiv 2510.13554.)

    The draw depends on (seed, step) and the batch's shape, and is the same on any device.
    """

    seed: int = 0

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        scores_BN = _draw(signals.mask_BN, self.seed, step)
        picked_BN = top_fraction(scores_BN, signals.mask_BN, self.top_fraction)
        return self.credit(signals, picked_BN, scores_BN)


@dataclass(frozen=True, kw_only=True)
class Entropy(Ranked):
    """Raises the tokens drawn with the highest entropy (baseline of arXiv 2510.13554, after arXiv 2506.01939)."""

    needs_entropy: ClassVar[bool] = True

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        entropy_BN = signals.entropy_BN
        if entropy_BN is None:
            raise ValueError("entropy credit: the signals have no entropy; ask for it with entropy=True")
        picked_BN = top_fraction(entropy_BN, signals.mask_BN, self.top_fraction, self.select)
        return self.credit(signals, picked_BN, entropy_BN, incomplete_rows(entropy_BN, signals.mask_BN))


@dataclass(frozen=True, kw_only=True)
class Shuffled(CoupledRhythm):
    """The weights of a rhythm rule, shuffled among the response tokens of each rollout.

    The same weights, mean and variance, but no longer where attention put them: what is left is not the rhythm. Takes
    the options of the rule that it shuffles (`lookback` and `alpha` go to coupled_rhythm only). The draw depends on
    (seed, step) and the batch's shape, and is the same on any device.
    """

    of: Literal["local_chunk", "global_anchor", "coupled_rhythm"] = "coupled_rhythm"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("of", self.of, tuple(SHUFFLED))

    @property
    def reads_fai(self) -> bool:  # type: ignore[override]  # a class's own, where it does not depend on an option
        return getattr(SHUFFLED[self.of], "reads_fai", False)

    def __call__(self, signals: Signals, step: int = 0) -> Credit:
        rule = SHUFFLED[self.of]
        ordered: CreditRule = rule(**{field.name: getattr(self, field.name) for field in fields(rule)})
        credit = ordered(signals)
        # Both orders list the response tokens first, then the rest: at random, and as they come.
        draw_BN = _draw(signals.mask_BN, self.seed, step).masked_fill(~signals.mask_BN, float("inf"))
        random_BN = draw_BN.argsort(dim=1, stable=True)
        plain_BN = (~signals.mask_BN).byte().argsort(dim=1, stable=True)
        weights_BN = credit.weights_BN.scatter(1, plain_BN, credit.weights_BN.gather(1, random_BN))
        return Credit(weights_BN=weights_BN, metrics=credit.metrics)  # which do not depend on the order


def _draw(mask_BN: "Tensor", seed: int, step: int) -> "Tensor":
    """Uniform numbers from (seed, step), drawn on the CPU and without the training's own generators."""
    import torch  # here, so that checking a recipe does not import it

    # A text seed mixes both numbers: with seed + step, step 1 of seed 0 would be step 0 of seed 1.
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(32))
    return torch.rand(mask_BN.shape, generator=generator).to(mask_BN.device)
