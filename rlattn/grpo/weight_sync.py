"""Sends vLLM an adapter merged into its base without ever writing into the base itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rlattn.errors import UserError
from rlattn.grpo.port import Port


def keep_base(port: Port) -> None:
    """Sends vLLM what PEFT's merge gives, one layer at a time, each merged into copies of its base weights.

    TRL merges all of the adapter into the base and takes it out again. In bfloat16 that rounds: at every sync the base
    drifts from the one that the exported adapter belongs to. TRL's code still names, gathers and sends the weights.
    Cost: the memory of two copies of one layer.

    Raises:
        UserError: FSDP 1, into whose flat shards nothing can be merged.
    """
    engine = port.vllm
    if not is_peft_model(engine.model):
        return
    if port.is_fsdp1:
        raise UserError("trainer.fsdp_config", "FSDP 1 cannot send vLLM an adapter.", "Set version: 2.")
    read = port.vllm_weights

    def read_merged() -> Iterator[tuple[str, Any]]:
        with _layer_by_layer(engine.model):
            yield from read()

    port.read_vllm_weights_by(read_merged)


@contextmanager
def _layer_by_layer(model: Any) -> Iterator[None]:
    """From `model.merge_adapter()` to `model.unmerge_adapter()`, `model.named_parameters()` merges what it reads."""
    check = model.merge_adapter

    def merge_adapter() -> None:  # weights that are spread over ranks have been gathered by now
        check(adapter_names=[])  # merges none, and refuses what PEFT cannot merge
        names = [name for name, _ in model.named_parameters()]
        model.named_parameters = lambda: _merged_parameters(model, names)

    def unmerge_adapter() -> None:
        del model.named_parameters

    model.merge_adapter, model.unmerge_adapter = merge_adapter, unmerge_adapter
    try:
        yield
    finally:
        for shadowed in ("merge_adapter", "unmerge_adapter", "named_parameters"):
            vars(model).pop(shadowed, None)


def _merged_parameters(model: nn.Module, names: list[str]) -> Iterator[tuple[str, Any]]:
    layers: dict[nn.Module, list[BaseTunerLayer]] = {}  # by the module they adapt; one may have several
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layers.setdefault(module.get_base_layer(), []).append(module)
    for path, inside in groupby(names, key=lambda name: name.rpartition(".")[0]):
        base = model.get_submodule(path)
        with _merged(base, layers.get(base, [])):
            for name in inside:  # looked up anew: some adapters put another module or parameter there
                yield name, getattr(model.get_submodule(path), name.rpartition(".")[2])


@contextmanager
def _merged(base: nn.Module, layers: list[BaseTunerLayer]) -> Iterator[None]:
    """Merges adapters into copies of their base's weights, and puts the weights themselves back."""
    weights = dict(base.named_parameters(recurse=False)) if layers else {}

    def set_weights(own: bool) -> None:
        for name, weight in weights.items():
            base.register_parameter(name, weight if own else copy.deepcopy(weight))

    try:
        set_weights(own=False)
        for layer in layers:
            layer.merge()
        yield
    finally:
        set_weights(own=False)  # vLLM's client still reads what it was sent: PEFT unmerges from other copies
        for layer in layers:
            layer.unmerge()
        set_weights(own=True)
