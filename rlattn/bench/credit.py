"""`rlattn bench credit`: is a credit rule right for this policy and this task? Asked of gradients, before any training.

Every batch is rolled out as training does it, and kept with its gradient under equal credit. Then every batch's
gradient under every rule is held against the sum of all other batches' under equal credit
(`rlattn/credit/fidelity.py`).
Legend: R shaped gradients, B batches, T completion tokens, P trained numbers.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from rlattn.bench.credit_carriers import Carriers, CarrierSums
from rlattn.bench.credit_oracle import least, measure_oracle
from rlattn.credit import CREDIT_RULES, compute_credit
from rlattn.credit.base import REFUSED
from rlattn.credit.fidelity import Fidelity, OracleWorth, Products, fidelities
from rlattn.errors import UserError
from rlattn.grpo.port import Port
from rlattn.grpo.shaped_gradients import MeasuredBatch, roll_out, shaped_gradients
from rlattn.progress import progress
from rlattn.rank import is_main
from rlattn.types import AttentionOptions, CreditRule

FEWEST = 3  # batches that an interval needs
ALONE = "alone"
PERMUTED = "permuted"
BACKWARD_SHARE = 2 / 3  # of a forward and backward pass
FORWARDS = 3  # a batch, beside those of its rollouts: one for the rules, two for the parts of its tokens


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures of every rule, by its name."""

    uniform: float
    """Fidelity of equal credit: the cosine of one batch with the direction of all others."""
    batches: int
    silent: int
    """Batches without any gradient: no group whose rollouts were paid differently. They are left out."""
    shaped: dict[str, Fidelity]
    alone: dict[str, Fidelity]
    """The same in the limit of a large amplification, where only what the rule raises counts."""
    refused: dict[str, int]
    """Rollouts on which a rule gave weights that training would refuse, by rule: they count as equal credit."""
    oracle: OracleWorth | None
    """What known advantages of single tokens would be worth; None where it was not asked for."""
    carriers: Carriers | None
    """Which tokens carry the gradient; None where the policy's numbers are too coarse to tell."""
    seconds: float


def rules_of(own: CreditRule | None, name: str) -> dict[str, CreditRule]:
    """Every shipped rule as it is by default, and the recipe's own where it is another."""
    rules: dict[str, CreditRule] = {kind: make() for kind, make in CREDIT_RULES.items() if kind != "uniform"}
    if own is not None and own not in rules.values() and own != CREDIT_RULES["uniform"]():
        rules[f"{name} (recipe)" if name in rules else name] = own
    return rules


def measure_credit(
    port: Port,
    rules: dict[str, CreditRule],
    permuted: str,
    attention: AttentionOptions,
    *,
    batches: int,
    minutes: float,
    oracle: int,
) -> Measured:
    """Rolls out and measures. Collective: every rank takes its share of every batch.

    Args:
        permuted: the rule whose weights are also tried on other rollouts, at the same positions.
        batches: at most; fewer where `minutes` would not do, as the first batch tells.
        oracle: groups whose tokens are judged by Monte Carlo, at most as many minutes again; 0 for none.

    Raises:
        UserError: too little memory for the gradients, or too few batches whose rollouts were paid differently.
    """
    began = time.monotonic()
    port.policy.train()
    inputs = _endless(port)
    kept: list[MeasuredBatch] = []
    equal: list[Tensor] = []
    silent = 0
    with _progress("rollouts", batches) as update:
        while len(kept) + silent < batches:
            batch = roll_out(port, next(inputs), attention)
            if not port.gather(torch.tensor([batch.speaks], device=port.device)).any():
                silent += 1
                update(len(kept) + silent, "no group whose rollouts were paid differently")
                continue
            timed = time.monotonic()
            (gradient_P,) = shaped_gradients(port, batch, [torch.ones_like(batch.factor_BT)])
            if not kept:
                own = time.monotonic() - timed
                passes = FORWARDS * (1 - BACKWARD_SHARE) + BACKWARD_SHARE * (len(rules) + 1)
                cost = time.monotonic() - began + own * passes
                batches = int(least(port, max(FEWEST, min(batches, int(60 * minutes / cost)))))
                _check_memory(port, batches, len(rules) + 1, len(gradient_P))
            kept.append(batch)
            equal.append(gradient_P)
            update(len(kept) + silent, f"of {batches}")
    if len(kept) < FEWEST:
        problem = f"{silent} of {len(kept) + silent} batches hold no group whose rollouts were paid differently."
        raise UserError(
            "rewards", f"{problem} They have no gradient to measure.", "Take more --batches, or other rows."
        )
    equal_BP = torch.stack(equal)
    names = [*rules, PERMUTED]
    refused = Counter[str]()
    sums, direction_P = CarrierSums(port, kept[0].signals.layers), equal_BP.sum(dim=0)
    tables = {table: _Table(len(names), equal_BP) for table in ("shaped", ALONE)}
    with _progress("gradients", len(kept)) as update:
        for number, batch in enumerate(kept):
            weights, refused_R = _weights(batch, rules, permuted, step=number * port.ranks + port.rank)
            refused.update(dict(zip(rules, port.gather(refused_R[None]).sum(dim=0).tolist(), strict=True)))
            floors_B1 = [_row_floor(weights_BT, batch.own_BT) for weights_BT in weights]
            floors = [_same_everywhere(port, floor_B1[:, 0]) for floor_B1 in floors_B1]
            raised = [weights_BT - floor_B1 for weights_BT, floor_B1 in zip(weights, floors_B1, strict=True)]
            uneven = [place for place, floor in enumerate(floors) if floor is None]
            given = [*raised, *(weights[place] for place in uneven)]
            gradients_RP, uneven_RP = shaped_gradients(port, batch, given).split([len(raised), len(uneven)])
            of_uneven = dict(zip(uneven, uneven_RP, strict=True))
            for place, (alone_P, floor) in enumerate(zip(gradients_RP, floors, strict=True)):
                tables[ALONE].add(place, number, alone_P)
                whole_P = of_uneven[place] if floor is None else floor * equal_BP[number] + alone_P
                tables["shaped"].add(place, number, whole_P)
            sums.add(batch, equal_BP[number], direction_P - equal_BP[number])
            update(number + 1, f"{len(names)} rules")
    uniform, shaped = fidelities(tables["shaped"].products())
    _, alone = fidelities(tables[ALONE].products())
    return Measured(
        uniform=uniform,
        batches=len(kept),
        silent=silent,
        shaped=dict(zip(names, shaped, strict=True)),
        alone=dict(zip(names, alone, strict=True)),
        carriers=sums.figures(),
        oracle=measure_oracle(port, kept, equal_BP, oracle, time.monotonic() + 60 * minutes) if oracle else None,
        refused={name: int(count) for name, count in refused.items() if count},
        seconds=time.monotonic() - began,
    )


class _Table:
    """Inner products of every rule's gradients, gathered batch by batch."""

    def __init__(self, rules: int, equal_BP: Tensor):
        self._equal_BP = equal_BP
        batches = len(equal_BP)
        self._sum_RP = torch.zeros(rules, equal_BP.shape[1], device=equal_BP.device)
        self._shaped_RBB = torch.zeros(rules, batches, batches, dtype=torch.float64)
        self._square_RB = torch.zeros(rules, batches, dtype=torch.float64)

    def add(self, rule: int, batch: int, gradient_P: Tensor) -> None:
        self._sum_RP[rule] += gradient_P
        self._shaped_RBB[rule, batch] = (self._equal_BP @ gradient_P).double().cpu()
        self._square_RB[rule, batch] = gradient_P.square().sum().double().cpu()

    def products(self) -> Products:
        return Products(
            equal_BB=(self._equal_BP @ self._equal_BP.T).double().cpu(),
            shaped_RBB=self._shaped_RBB,
            square_RB=self._square_RB,
            sum_square_R=self._sum_RP.square().sum(dim=1).double().cpu(),
        )


def _weights(
    batch: MeasuredBatch, rules: dict[str, CreditRule], permuted: str, step: int
) -> tuple[list[Tensor], Tensor]:
    """weights_BT of every rule and of the permuted one, and on how many rollouts each rule's were refused."""
    length = batch.factor_BT.shape[1]
    given = {name: compute_credit(rule, batch.signals, step=step) for name, rule in rules.items()}
    weights = {name: credit.weights_BN[:, -length:] for name, credit in given.items()}
    refused_R = torch.stack([credit.metrics[REFUSED].to(batch.factor_BT.device) for credit in given.values()])
    return [*weights.values(), weights[permuted].roll(1, dims=0)], refused_R


def _row_floor(weights_BT: Tensor, own_BT: Tensor) -> Tensor:
    """The smallest weight of every rollout, (B, 1)."""
    return weights_BT.masked_fill(~own_BT, torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=1.0)


def _same_everywhere(port: Port, floor_B: Tensor) -> float | None:
    """The smallest weight, where it is the same in every rollout of every rank; else None. Collective."""
    everyone_B = port.gather(floor_B.contiguous())
    return everyone_B[0].item() if bool((everyone_B == everyone_B[0]).all()) else None


def _progress(label: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
    """Rank 0 tells it for all."""
    return progress(label, total) if is_main() else nullcontext(lambda done, text: None)


def _endless(port: Port) -> Iterator[list[dict[str, Any]]]:
    while True:
        yield from port.generation_inputs()


def _check_memory(port: Port, batches: int, rules: int, numbers: int) -> None:
    """Raises UserError on every rank where the gradients do not fit on one. Collective."""
    needed = 4 * numbers * (2 * batches + 3 * rules) / 1e9
    free = torch.cuda.mem_get_info()[0] if port.device.type == "cuda" else psutil.virtual_memory().available
    fits = least(port, free / 1e9)
    if needed > fits:
        problem = f"{batches} batches and {rules} rules keep {needed:.1f} GB of gradients; {fits:.1f} GB are free."
        raise UserError("--batches", problem, "Take fewer, or measure with an adapter: policy.lora='{r: 16}'.")
