"""Attention maps of a short text, averaged over a set of heads, for figures only. Training never makes a map.

Legend: L chosen layers, H heads, N positions, T shown positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlattn.attention.capture import decoder_layers, text_decoder


@torch.no_grad()
def average_maps(
    model: PreTrainedModel, ids_N: Tensor, start: int, layers: Sequence[int], head_sets: Sequence[Tensor]
) -> list[Tensor]:
    """map_TT of every head set (bool, L x H): the mean attention of rows and columns from `start` on, float32.

    The model's own eager attention makes the maps, so whatever it does (sliding windows, caps, sinks) is in them. A
    row's mass on the columns before `start` is left out. Cost: one forward, and H maps of N x N at a time.
    """
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.ndim == 4:
                # a copy: a view would keep the whole map
                found[layer] = weights[0, :, start:, start:].to(torch.float32, copy=True)

        return hook

    stack = decoder_layers(text_decoder(model))
    hooks = [
        module.register_forward_hook(keep(layer))
        for layer in layers
        for module in stack[layer].modules()
        if hasattr(module, "layer_idx")
    ]
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        model(input_ids=ids_N[None], use_cache=False)
    finally:
        model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    maps_LHTT = torch.stack([found[layer] for layer in layers]).cpu()
    return [maps_LHTT[heads_LH.cpu()].mean(dim=0) for heads_LH in head_sets]
