"""How near a credit rule's gradient comes to the direction that equal credit finds with many rollouts.

The fidelity of a rule is the mean, over batches b, of cos(g_b(rule), sum over c != b of g_c(equal credit)). The sum
never holds the batch that it judges, and is the true direction of GRPO's objective where there are many batches. A
batch whose gradient has noise of relative size s has cos = 1 / sqrt(1 + s²), so a rule of another cosine is worth a
batch of another size. Pure: inner products in, figures out. Legend: R rules, B batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlattn.statistics import t95


@dataclass(frozen=True, kw_only=True)
class Products:
    """Inner products of gradients, float64. g_b(r) is the gradient of batch b whose advantages rule r has shaped."""

    equal_BB: Tensor
    """g_b(equal credit) · g_c(equal credit)."""
    shaped_RBB: Tensor
    """g_b(r) · g_c(equal credit)."""
    square_RB: Tensor
    """|g_b(r)|²."""
    sum_square_R: Tensor
    """|sum over b of g_b(r)|²."""

    def __post_init__(self) -> None:
        rules, batches = self.square_RB.shape
        shapes = {
            "equal_BB": (batches, batches), "shaped_RBB": (rules, batches, batches), "sum_square_R": (rules,),
        }  # fmt: skip
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(getattr(self, name).shape)}")
        if batches < 3:
            raise ValueError(f"fidelity: an interval needs at least 3 batches with a gradient, got {batches}")


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """One rule's figures; an interval is 95 %."""

    value: float
    """Mean cosine, -1 to 1."""
    difference: float
    """To that of equal credit on the same batches; 0 for equal credit itself."""
    low: float
    high: float
    bias: float
    """Cosine between the sums of all batches, the rule's and equal credit's: below 1, no batch is large enough."""
    worth: float
    """Equal credit comes as near with a batch so many times as large; 0 where the rule points away, NaN where equal
    credit's own cosine is not told apart from 0."""
    worth_low: float
    worth_high: float


def fidelities(products: Products) -> tuple[float, list[Fidelity]]:
    """Equal credit's own mean cosine, and every rule's figures.

    Intervals are the delete-one jackknife's over batches (Efron and Stein 1981) with Student's t: a batch is left out
    of what is judged and of the reference, so that what the reference shares between batches counts too.
    """
    batches = len(products.equal_BB)
    everything = torch.ones(batches, dtype=torch.bool)
    equal, shaped_R = _mean_cosines(products, everything)
    left_out = []
    for batch in range(batches):
        keep = everything.clone()
        keep[batch] = False
        left_out.append(_mean_cosines(products, keep))
    equal_without_B = torch.stack([one for one, _ in left_out])
    shaped_without_BR = torch.stack([others for _, others in left_out])
    gain_BR = shaped_without_BR - equal_without_B[:, None]
    spread_R = jackknife_spread(gain_BR)
    # Worth is judged on the logarithm, where a half and a double lie equally far from 1.
    worth_R, worth_BR = _worth(equal, shaped_R), _worth(equal_without_B[:, None], shaped_without_BR)
    if equal <= jackknife_spread(equal_without_B[:, None])[0]:
        worth_R = torch.full_like(worth_R, math.nan)
    worth_spread_R = jackknife_spread(worth_BR.clamp(min=1e-6).log())
    total = products.equal_BB.sum()
    bias_R = _safe_cosine(products.shaped_RBB.sum(dim=(1, 2)), products.sum_square_R * total)
    found = [
        Fidelity(
            value=shaped.item(),
            difference=(shaped - equal).item(),
            low=(shaped - equal - spread).item(),
            high=(shaped - equal + spread).item(),
            bias=bias.item(),
            worth=worth.item(),
            worth_low=worth.item() * math.exp(-worth_spread.item()),
            worth_high=worth.item() * math.exp(worth_spread.item()),
        )
        for shaped, spread, bias, worth, worth_spread in zip(shaped_R, spread_R, bias_R, worth_R, worth_spread_R)
    ]
    return equal.item(), found


FEWEST_GROUPS = 3  # that an interval needs


@dataclass(frozen=True, kw_only=True)
class OracleWorth:
    """What advantages of single tokens are worth, were they known: the most that a credit rule can gain."""

    worth: float
    """Equal credit comes as near with a batch so many times as large; NaN where the groups do not tell."""
    worth_low: float
    worth_high: float
    """95 %, the jackknife's over groups, on the logarithm."""
    estimated: float
    """The same of the advantages as they were estimated, with the noise of few continuations."""
    groups: int


def oracle_worth(toward_3G: Tensor, equal_square_G: Tensor, oracle_squares_2G: Tensor) -> OracleWorth:
    """From the gradients of single groups, where noise is nearly all: a squared signal over a mean square is then a
    squared cosine for each group, and their ratio the ratio of batch sizes.

    Args:
        toward_3G: products with the direction of all other batches: under equal credit, and under the oracle of either
            half of the continuations.
        equal_square_G: |g(equal credit)|².
        oracle_squares_2G: g(first half) · g(second half), whose noises of few continuations are independent; and |their
            mean|².
    """
    groups = toward_3G.shape[1]
    if groups < FEWEST_GROUPS:
        raise ValueError(f"oracle: an interval needs at least {FEWEST_GROUPS} groups, got {groups}")

    def worth(keep_G: Tensor) -> Tensor:
        equal, oracle = toward_3G[0][keep_G].mean(), toward_3G[1:, keep_G].mean()
        squares_2 = oracle_squares_2G[:, keep_G].mean(dim=1)
        noise_equal = equal_square_G[keep_G].mean() / equal**2
        found_2 = noise_equal * oracle**2 / squares_2
        return torch.where((squares_2 > 0) & (oracle > 0) & (equal > 0), found_2, math.nan)

    everything = torch.ones(groups, dtype=torch.bool)
    exact, estimated = worth(everything).tolist()
    without_G1 = torch.stack([worth(everything & (torch.arange(groups) != left))[:1] for left in range(groups)])
    spread = math.exp(min(jackknife_spread(without_G1.log()).item(), 50.0))
    return OracleWorth(
        worth=exact, worth_low=exact / spread, worth_high=exact * spread, estimated=estimated, groups=groups
    )


def _mean_cosines(products: Products, keep_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of the kept batches: equal credit's mean cosine, and every rule's."""
    equal_BB = products.equal_BB[keep_B][:, keep_B]
    shaped_RBB = products.shaped_RBB[:, keep_B][:, :, keep_B]
    to_others_B = equal_BB.sum(dim=1) - equal_BB.diagonal()
    reference_B = equal_BB.sum() - 2 * equal_BB.sum(dim=1) + equal_BB.diagonal()  # |sum over the others|²
    equal_B = _safe_cosine(to_others_B, equal_BB.diagonal() * reference_B)
    toward_RB = shaped_RBB.sum(dim=2) - shaped_RBB.diagonal(dim1=1, dim2=2)
    shaped_RB = _safe_cosine(toward_RB, products.square_RB[:, keep_B] * reference_B)
    return equal_B.mean(), shaped_RB.mean(dim=1)


def _safe_cosine(product: Tensor, squares: Tensor) -> Tensor:
    """0 where a gradient is zero: it has no direction."""
    return torch.where(squares > 0, product / squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt(), 0.0)


def _worth(equal: Tensor, shaped: Tensor) -> Tensor:
    """(1/equal² − 1) / (1/shaped² − 1): squared noise of equal credit over the rule's; 0 for a cosine not above 0."""
    noise_equal = 1 / equal.clamp(min=1e-6) ** 2 - 1
    noise_shaped = 1 / shaped.clamp(min=1e-6, max=1 - 1e-12) ** 2 - 1
    return torch.where(shaped > 0, noise_equal / noise_shaped, 0.0)


def jackknife_spread(left_out_BR: Tensor) -> Tensor:
    """Half the 95 % interval of every column's statistic."""
    batches = len(left_out_BR)
    around_BR = left_out_BR - left_out_BR.mean(dim=0)
    return t95(batches - 1) * ((batches - 1) / batches * (around_BR**2).sum(dim=0)).sqrt()
