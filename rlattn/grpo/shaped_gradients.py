"""The gradients that training would take at a policy, with the advantages shaped by any number of credit rules.

Nothing is trained: one forward over a batch serves all rules, one backward pass each. The parameters must lie whole on
every rank (no ZeRO-3, no FSDP). Legend: R shaped gradients, B rollouts of this rank, T completion tokens, N positions,
P trained numbers, S signals of a head, H heads of all chosen layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlattn.attention.capture import batch_heads, capture
from rlattn.credit.selection import top_fraction
from rlattn.grpo.port import Port
from rlattn.types import AttentionOptions, Signals

ROWS = 32  # rollouts a forward, at most: little padding, and activations that stay in a CPU's cache
PICKED = 0.4  # the rhythm rules' own share
HEAD_SIGNALS = ("FAI", "WAAD")
NUDGES = 5e-5, 1e-5, 2e-6  # of the parameters' length: few tokens need the small ones, where rounding is larger


@dataclass(frozen=True, kw_only=True)
class MeasuredBatch:
    """One generation batch, this rank's share."""

    inputs: list[dict[str, Any]]
    """The examples that were rolled out."""
    out: dict[str, Tensor]
    """Ids and masks, as TRL's forward takes them."""
    factor_BT: Tensor
    """What the gradient of each token's log-probability is multiplied by at weight 1: advantage over tokens of the
    batch, as `trainer.loss_type` divides; 0 outside what the policy wrote."""
    own_BT: Tensor
    """Bool: what the policy wrote."""
    logp_BT: Tensor
    """Of every token under the policy."""
    reward_B: Tensor
    """What each rollout was paid in all."""
    signals: Signals
    picked_SHBT: Tensor
    """Bool, on the CPU: the tokens whose FAI and WAAD at one head are the highest 40 % of a response."""

    @property
    def speaks(self) -> bool:
        return bool(self.factor_BT.any())


def roll_out(port: Port, inputs: list[dict[str, Any]], attention: AttentionOptions) -> MeasuredBatch:
    """Rollouts with rewards and advantages, as training makes them, and the signals that rules read. Collective."""
    out = port.roll_out(inputs)
    own_BT = out["completion_mask"] * out.get("tool_mask", 1)
    response_BN = torch.cat([torch.zeros_like(out["prompt_mask"]), own_BT], dim=1)
    attention_BN = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
    kept = {name: out[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    with capture(port.policy, attention_BN, response_BN, options=attention) as captured, torch.no_grad():
        logp_BT, entropy_BT = port.score(kept, batch_size=port.args.per_device_train_batch_size, compute_entropy=True)
    entropy_BN = torch.full(response_BN.shape, torch.nan, device=response_BN.device)
    if entropy_BT is not None:
        entropy_BN[:, -entropy_BT.shape[1] :] = entropy_BT.float()
    entropy_BN = entropy_BN.masked_fill(response_BN == 0, torch.nan)
    spans_BLH, waad_BLHN, fai_BLHN = captured.metrics()
    heads = None if attention.scope == "sequence" else batch_heads(port.gather(spans_BLH), attention.share)
    signals = captured.signals(share=attention.share, heads=heads, entropy_BN=entropy_BN)
    of_heads = [
        top_fraction(scores_BN, response_BN.bool(), PICKED)[:, -own_BT.shape[1] :].cpu()
        for scores_BLHN in (fai_BLHN, waad_BLHN)
        for scores_BN in scores_BLHN.flatten(1, 2).unbind(dim=1)
    ]
    return MeasuredBatch(
        inputs=inputs,
        out=kept,
        factor_BT=_factor(port, out["advantages"], own_BT),
        own_BT=own_BT.bool(),
        logp_BT=logp_BT.float(),
        reward_B=paid(port),
        signals=signals,
        picked_SHBT=torch.stack(of_heads).unflatten(0, (len(HEAD_SIGNALS), -1)),
    )


def paid(port: Port) -> Tensor:
    """What each of this rank's latest rollouts was paid in all, its rewards weighed."""
    table = port.reward_table
    reward_B = (table.used_BK * table.weights_K.to(table.used_BK.device)).nansum(dim=1)
    return reward_B.view(port.ranks, -1)[port.rank]


def _factor(port: Port, advantage_BT: Tensor, own_BT: Tensor) -> Tensor:
    advantage_BT = advantage_BT * own_BT
    if port.args.loss_type == "grpo":  # each rollout's mean over its tokens
        return advantage_BT / own_BT.sum(dim=1, keepdim=True).clamp(min=1) / (len(own_BT) * port.ranks)
    return advantage_BT / port.gather(own_BT.sum()).sum().clamp(min=1)


def shaped_gradients(port: Port, batch: MeasuredBatch, weights: Sequence[Tensor]) -> Tensor:
    """gradients_RP, float32: of -sum(weight · advantage · log-probability) over all ranks' rollouts. Collective.

    Args:
        weights: R tables (B, T); they may be 0 or negative.

    Cost: one forward over the rollouts that have an advantage, and R backward passes; memory for R · P numbers and for
    the activations of at most `per_device_train_batch_size` rollouts.
    """
    parameters, sizes = _trained(port)
    gradients_RP = torch.zeros(len(weights), sum(sizes), device=port.device)
    for rows in _alike(batch, port.args.per_device_train_batch_size):
        part = _trimmed({name: values[rows] for name, values in batch.out.items()})
        length = part["completion_ids"].shape[1]
        with port.without_checkpointing():
            logps_BT, _ = port.score(part)
        for place, weights_BT in enumerate(weights):
            shaped_BT = (weights_BT * batch.factor_BT)[rows, :length]
            if not shaped_BT.any():
                continue
            of_rows = torch.autograd.grad(
                -(shaped_BT * logps_BT).sum(), parameters, retain_graph=True, allow_unused=True
            )  # the graph goes with logps_BT
            for part_P, found in zip(gradients_RP[place].split(sizes), of_rows, strict=True):
                if found is not None:
                    part_P += found.flatten().float()
        del logps_BT
    if port.ranks > 1:
        torch.distributed.all_reduce(gradients_RP)
    return gradients_RP


@torch.no_grad()
def token_products(port: Port, batch: MeasuredBatch, direction_P: Tensor, nudge: float = NUDGES[0]) -> Tensor:
    """product_BT, float32: of the gradient of every token's log-probability with a direction; 0 where a rollout has no
    advantage.

    By central differences: the trained parameters are moved by `nudge` of their length along the direction and against
    it, and put back bit for bit. They must be float32: in bfloat16 so small a step is lost to rounding.
    Cost: two forwards without gradients over the rollouts that have an advantage.
    """
    parameters, sizes = _trained(port)
    kept = [parameter.clone() for parameter in parameters]
    length = torch.stack([parameter.float().norm() for parameter in parameters]).norm()
    step = nudge * length / direction_P.norm().clamp(min=torch.finfo(torch.float32).tiny)
    moved = []
    try:
        for sign in (1, -1):
            for parameter, own, part_P in zip(parameters, kept, direction_P.split(sizes), strict=True):
                parameter.copy_(own + sign * step * part_P.view_as(own))
            moved.append(_log_probabilities(port, batch))
    finally:
        for parameter, own in zip(parameters, kept, strict=True):
            parameter.copy_(own)
    return (moved[0] - moved[1]) / (2 * step)


def _log_probabilities(port: Port, batch: MeasuredBatch) -> Tensor:
    logps_BT = torch.zeros_like(batch.factor_BT, dtype=torch.float32)
    for rows in _alike(batch, port.args.per_device_train_batch_size):
        part = _trimmed({name: values[rows] for name, values in batch.out.items()})
        found_BT = port.score(part)[0].float() * part["completion_mask"]
        logps_BT[rows, : found_BT.shape[1]] = found_BT
    return logps_BT


def _trained(port: Port) -> tuple[list[torch.nn.Parameter], list[int]]:
    """The parameters that training moves, and their sizes."""
    parameters = [parameter for parameter in port.policy.parameters() if parameter.requires_grad]
    return parameters, [parameter.numel() for parameter in parameters]


def _alike(batch: MeasuredBatch, most: int) -> tuple[Tensor, ...]:
    """The rollouts that have an advantage, those of like length together."""
    speaking = batch.factor_BT.ne(0).any(dim=1).nonzero()[:, 0]
    length_B = batch.out["completion_mask"].sum(dim=1)[speaking]
    chunks = speaking[length_B.argsort(stable=True)].split(min(most, ROWS))
    return tuple(rows for rows in chunks if len(rows))  # a rank may have none


def _trimmed(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that are padding in every row: at the left of prompts, at the right of completions."""
    first = int(out["prompt_mask"].any(dim=0).int().argmax())
    length = max(1, int(out["completion_mask"].any(dim=0).sum()))
    return {name: values[:, first:] if "prompt" in name else values[:, :length] for name, values in out.items()}
