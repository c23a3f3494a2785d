"""What the parts of the GPU smoke run share. Imports neither torch nor TRL.

The policy is randomly initialised in the shapes of Qwen2.5-0.5B (0.49 B parameters), or tiny where `Scale.small`.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any

HALF_BILLION = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scale:
    device: str
    small: bool

    @property
    def shapes(self) -> dict[str, Any]:
        return TINY if self.small else HALF_BILLION

    def of(self, full: int, small: int) -> int:
        return small if self.small else full


@dataclass(frozen=True, kw_only=True)
class Outcome:
    detail: str
    met: bool = True
    """False where a target was missed; what is wrong raises instead."""
    figures: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """Cannot run here, and why."""


def need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise Skipped(f"{package} cannot be imported ({error})") from None
