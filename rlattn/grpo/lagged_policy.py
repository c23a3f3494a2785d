"""The policy as it was some steps ago, for second rollouts that must not follow every step of the one in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlattn.errors import UserError
from rlattn.grpo.port import Port


class LaggedPolicy:
    """A copy of the trained weights, refreshed every `every` optimizer steps (0: never), swapped in to generate.

    Under LoRA only the adapter is trained, so only it is copied. The swap exchanges pointers: nothing moves, and the
    weights in training come back as they were. Cost: the memory of the trained weights, once.

    Raises:
        UserError: the weights are spread over ranks (ZeRO-3, FSDP), where a rank has none to copy.
    """

    def __init__(self, model: nn.Module, every: int):
        self.every, self.step = every, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if any(p.numel() == 0 or hasattr(p, "ds_id") or hasattr(p, "placements") for p in self.parameters.values()):
            raise UserError(
                "rewards", "a lagged policy needs whole weights on every rank, which ZeRO-3 and FSDP spread.",
                "Use DDP or ZeRO-2, or a label source other than lagged.",
            )  # fmt: skip
        self.copies = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def refresh(self, step: int) -> bool:
        """Takes the current weights over where `every` steps have passed since it last did; whether it did."""
        if not self.every or step - self.step < self.every:
            return False
        for name, parameter in self.parameters.items():
            self.copies[name].copy_(parameter)
        self.step = step
        return True

    @contextmanager
    def in_place(self, port: Port) -> Iterator[None]:
        """The policy's weights are the lagged ones inside the context, also those that vLLM has."""
        self._swap(port)
        try:
            yield
        finally:
            self._swap(port)

    def save(self, file: Path) -> None:
        tensors = {name: copy.contiguous().cpu() for name, copy in self.copies.items()}
        save_file(tensors, file, metadata={"step": str(self.step)})

    @torch.no_grad()
    def load(self, file: Path) -> None:
        with safe_open(file, framework="pt") as stored:
            self.step = int(stored.metadata()["step"])
            for name, copy in self.copies.items():
                copy.copy_(stored.get_tensor(name))

    def _swap(self, port: Port) -> None:
        for name, parameter in self.parameters.items():
            # DeepSpeed moves the model after the copies were made
            lagged: Tensor = self.copies[name].to(device=parameter.device, dtype=parameter.dtype)
            self.copies[name], parameter.data = parameter.data, lagged
        port.send_weights_again()
