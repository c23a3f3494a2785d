"""Which tokens of the measured batches carry the gradient: by fifths of what is known about a token, and by head.

Legend: B rollouts, T completion tokens, N batches, S signals (FAI, WAAD), H heads of all chosen layers, P trained
numbers.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlattn.credit.carriers import Share, shares, shares_of_sets, sums_by_quantile
from rlattn.credit.selection import delta
from rlattn.grpo.port import Port
from rlattn.grpo.shaped_gradients import HEAD_SIGNALS, NUDGES, MeasuredBatch, token_products

EXACT = 2e-3  # of both lengths: by so much the parts may miss the inner product that they add up to


@dataclass(frozen=True, kw_only=True)
class Carriers:
    """What is carried by the tokens of every fifth of a feature, and by those that a head picks."""

    features: dict[str, list[Share]]
    """By feature: the lowest to the highest fifth of a response, and the tokens without a value."""
    heads: list[dict[str, Any]]
    """Of every head of the chosen layers and each of its signals: layer, head, signal, and the share of its highest
    40 %."""

    def as_json(self) -> dict[str, Any]:
        features = {name: [asdict(share) for share in found] for name, found in self.features.items()}
        return {**features, "heads": self.heads}


@dataclass
class CarrierSums:
    """Sums over tokens, batch by batch."""

    port: Port
    layers: tuple[int, ...]
    by_feature: dict[str, list[Tensor]] = field(default_factory=dict)
    by_head: list[Tensor] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)
    missed: float = 0.0
    """The worst miss of the parts' sum so far, over the lengths of gradient and direction."""

    def add(self, batch: MeasuredBatch, gradient_P: Tensor, direction_P: Tensor) -> None:
        """`gradient_P`: the batch's own under equal credit. Collective."""
        part_BT, miss = self._parts(batch, gradient_P, direction_P)
        self.missed = max(self.missed, miss)
        counted_BT = batch.own_BT & batch.factor_BT.ne(0).any(dim=1, keepdim=True)
        for name, feature_BT in features_of(batch).items():
            sums_2Q = self._over_ranks(sums_by_quantile(part_BT, feature_BT, counted_BT))
            self.by_feature.setdefault(name, []).append(sums_2Q)
        picked = batch.picked_SHBT.to(part_BT.device) & counted_BT
        of_heads = torch.stack([(picked * part_BT).sum(dim=(2, 3)), picked.sum(dim=(2, 3))]).double()
        self.by_head.append(self._over_ranks(of_heads.flatten(1)))
        self.whole.append(self._over_ranks(torch.stack([part_BT.sum(), counted_BT.sum()]).double()))

    def _parts(self, batch: MeasuredBatch, gradient_P: Tensor, direction_P: Tensor) -> tuple[Tensor, float]:
        """part_BT, and by how much their sum misses the product of the gradients; smaller steps where it is much."""
        exact, lengths = gradient_P @ direction_P, gradient_P.norm() * direction_P.norm()
        found = []
        for nudge in NUDGES:
            part_BT = -batch.factor_BT * token_products(self.port, batch, direction_P, nudge)
            whole = self.port.gather(part_BT.sum()[None]).sum()
            miss = ((whole - exact).abs() / lengths).nan_to_num(nan=1.0).item()
            found.append((miss, part_BT))
            if miss < EXACT:
                break
        miss, part_BT = min(found, key=lambda one: one[0])
        return part_BT, miss

    def figures(self) -> Carriers | None:
        """None where the parts do not add up: the parameters' numbers are too coarse for them."""
        if not self.missed < EXACT:
            return None
        heads = len(self.by_head[0][0]) // len(self.layers) // len(HEAD_SIGNALS)
        found = shares_of_sets(torch.stack(self.by_head), torch.stack(self.whole))
        places = [
            {"signal": signal, "layer": layer, "head": head}
            for signal in HEAD_SIGNALS for layer in self.layers for head in range(heads)
        ]  # fmt: skip
        return Carriers(
            features={name: shares(torch.stack(sums)) for name, sums in self.by_feature.items()},
            heads=[{**place, **asdict(share)} for place, share in zip(places, found, strict=True)],
        )

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return self.port.gather(sums[None]).sum(dim=0).cpu()


def features_of(batch: MeasuredBatch) -> dict[str, Tensor]:
    """What may tell which tokens matter, (B, T) each."""
    signals, length = batch.signals, batch.factor_BT.shape[1]
    change_BN = delta(signals.waad_BN, signals.mask_BN)
    position_BT = torch.arange(length, device=batch.factor_BT.device).expand_as(batch.factor_BT)
    given = {"entropy": signals.entropy_BN, "FAI": signals.fai_BN, "WAAD": signals.waad_BN, "change of WAAD": change_BN}
    cut = {name: values_BN[:, -length:] for name, values_BN in given.items() if values_BN is not None}
    return {**cut, "position": position_BT}
