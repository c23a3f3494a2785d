"""What each token changed in the reward that is to be expected: advantages by Monte Carlo, which no rule can beat.

VinePPO (arXiv 2410.01679): the value of a text that was begun is the mean reward of continuations that the policy
writes, and a token's advantage the value behind it less the value before it. Only tokens that the policy was not sure
of are judged: the advantage of one with probability p is at most 1 - p of the range of rewards. Legend: B rollouts of
this rank, T completion tokens, G rollouts a group, V texts to be valued, 2 halves of the continuations.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlattn.grpo.port import Port
from rlattn.grpo.shaped_gradients import MeasuredBatch, paid
from rlattn.progress import progress

SURE = 0.99  # probability


def oracle_factors(port: Port, batch: MeasuredBatch, rows: list[int]) -> Tensor:
    """factor_2BT: what `MeasuredBatch.factor_BT` would be under the oracle, 0 in other rows; from each half of the
    continuations, so that the product of two gradients is free of the noise of few continuations.

    A rollout counts by what it was paid in all: rewards that speak for some tokens only, or are normalised one by one
    (`combine: decoupled`), are taken together.

    Args:
        rows: of whole groups.

    Cost: G continuations for every token of these rows below `SURE`, a generation batch at a time. Collective.
    """
    places = {row: _unsure(batch, row) for row in rows}
    begun = [(row, token) for row, tokens in places.items() for token in tokens]
    value_2V = _values(port, batch, begun)
    value = {place: value_2V[:, number] for number, place in enumerate(begun)}
    factor_2BT = batch.factor_BT.new_zeros(2, *batch.factor_BT.shape)
    for row, tokens in places.items():
        final_2 = batch.reward_B[row].expand(2)
        values = [*(value[row, token] for token in tokens), final_2]
        for token, (before_2, behind_2) in zip(tokens, pairwise(values)):
            factor_2BT[:, row, token] = (behind_2 - before_2) * _scale(batch, row, port.group_size, port.args.loss_type)
    return factor_2BT


def _unsure(batch: MeasuredBatch, row: int) -> list[int]:
    unsure_T = batch.own_BT[row] & (batch.logp_BT[row].exp() < SURE)
    return [int(token) for token in unsure_T.nonzero()[:, 0]]


def _scale(batch: MeasuredBatch, row: int, group_size: int, loss_type: str) -> float:
    """What a reward above the mean of its group is multiplied by in the gradient of one token."""
    first = row - row % group_size
    group = slice(first, first + group_size)
    tokens_G = batch.own_BT[group].sum(dim=1).clamp(min=1)
    own_G = tokens_G if loss_type == "grpo" else torch.ones_like(tokens_G)  # each rollout's mean over its tokens
    above_G = batch.reward_B[group] - batch.reward_B[group].mean()
    factor_G = (batch.factor_BT[group] * batch.own_BT[group]).sum(dim=1) / tokens_G
    slope = (factor_G * own_G * above_G).sum() / above_G.square().sum().clamp(min=1e-12)
    return float(slope / own_G[row - first])


def _values(port: Port, batch: MeasuredBatch, begun: list[tuple[int, int]]) -> Tensor:
    """value_2V: of each rollout's text before a token, from either half of G continuations."""
    size = port.group_size
    at_once = len(batch.inputs) // size
    calls = -(-int(port.gather(torch.tensor([len(begun)], device=port.device)).max()) // at_once)
    found = [torch.zeros(2, 0, device=port.device)]
    with progress("continuations", calls) if port.is_main else nullcontext(lambda done, text: None) as update:
        for call in range(calls):
            part = begun[call * at_once : (call + 1) * at_once]
            filled = part + [(0, 0)] * (at_once - len(part))  # every rank generates equally often
            rows = [place for place in filled for _ in range(size)]
            prefixes = [_written(batch, row)[:token] for row, token in rows]
            with port.turns_by(partial(_going_on, prefixes, port.max_completion_length)):
                port.roll_out([batch.inputs[row] for row, _ in rows])
            halves = paid(port).view(at_once, size)[: len(part)].split([size // 2, size - size // 2], dim=1)
            found.append(torch.stack([half.mean(dim=1) for half in halves]))
            update(call + 1, f"{at_once * size} at once")
    return torch.cat(found, dim=1)


def _written(batch: MeasuredBatch, row: int) -> list[int]:
    return batch.out["completion_ids"][row][batch.out["completion_mask"][row].bool()].tolist()


def _going_on(prefixes: list[list[int]], longest: int, generate: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's generation of completions that were begun; what it gives holds their beginnings."""

    def go_on(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        begun = [asked + prefix for asked, prefix in zip(prompt_ids, prefixes, strict=True)]
        completion_ids, logprobs = generate(begun, *args, **kwargs)
        whole = [(prefix + own)[:longest] for prefix, own in zip(prefixes, completion_ids, strict=True)]
        if logprobs is not None:  # under vLLM; nothing is trained on them
            logprobs = [[0.0] * len(ids) for ids in whole]
        return whole, logprobs

    return go_on


def groups_with_signal(batch: MeasuredBatch, group_size: int) -> Iterator[list[int]]:
    """The rows of each group whose rollouts were paid differently."""
    for first in range(0, len(batch.factor_BT), group_size):
        if batch.factor_BT[first : first + group_size].any():
            yield list(range(first, first + group_size))
