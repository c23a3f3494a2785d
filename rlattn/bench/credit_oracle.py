"""What the best of all credit rules would be worth here: advantages of single tokens, for some groups of rollouts."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from rlattn.credit.fidelity import FEWEST_GROUPS, OracleWorth, oracle_worth
from rlattn.errors import UserError
from rlattn.grpo.oracle import groups_with_signal, oracle_factors
from rlattn.grpo.port import Port
from rlattn.grpo.shaped_gradients import MeasuredBatch, shaped_gradients

AT_ONCE = 4  # groups; then the time is looked at


def check_whole_groups(port: Port) -> None:
    """Raises UserError where a rank's rollouts are no whole groups."""
    rollouts = port.args.per_device_train_batch_size * port.args.steps_per_generation
    if rollouts % port.group_size:
        problem = f"a rank has {rollouts} rollouts, no multiple of trainer.num_generations={port.group_size}."
        raise UserError("--oracle", problem, "Choose trainer.per_device_train_batch_size accordingly.")


def measure_oracle(port: Port, kept: list[MeasuredBatch], equal_BP: Tensor, groups: int, until: float) -> OracleWorth:
    """Of so many groups, on every rank, of the first batches. Collective.

    Args:
        until: no more groups than an interval needs are begun after this time (`time.monotonic`).

    Raises:
        UserError: too few groups whose rollouts were paid differently.
    """
    direction_P = equal_BP.sum(dim=0)
    toward: list[Tensor] = []
    squares: list[Tensor] = []
    products: list[Tensor] = []
    for batch, equal_P in zip(kept, equal_BP, strict=True):
        own = list(groups_with_signal(batch, port.group_size))
        count = int(least(port, len(own)))
        for first in range(0, count, AT_ONCE):
            late = not least(port, int(time.monotonic() < until))
            if len(toward) >= (FEWEST_GROUPS if late else groups):
                break
            chosen = own[first : min(first + AT_ONCE, count, first + groups - len(toward))]
            factor_2BT = oracle_factors(port, batch, [row for group in chosen for row in group])
            for group in chosen:
                here_B1 = torch.zeros_like(batch.own_BT[:, :1])
                here_B1[group] = True
                alone = replace(batch, factor_BT=(batch.own_BT & here_B1).float())
                equal_g_P, *oracle_2P = shaped_gradients(port, alone, [batch.factor_BT, *factor_2BT])
                toward.append(torch.stack([one @ (direction_P - equal_P) for one in (equal_g_P, *oracle_2P)]))
                squares.append(equal_g_P.square().sum())
                mean_P = (oracle_2P[0] + oracle_2P[1]) / 2
                products.append(torch.stack([oracle_2P[0] @ oracle_2P[1], mean_P.square().sum()]))
    if len(toward) < FEWEST_GROUPS:
        problem = f"{len(toward)} groups have rollouts that were paid differently; an interval needs {FEWEST_GROUPS}."
        raise UserError("--oracle", problem, "Take more --batches.")
    toward_G3, square_G, product_G2 = (torch.stack(found).double().cpu() for found in (toward, squares, products))
    return oracle_worth(toward_G3.T, square_G, product_G2.T)


def least(port: Port, number: float) -> float:
    """Of all ranks, so that all do the same. Collective."""
    return port.gather(torch.tensor([number], device=port.device)).min().item()
