"""rlattn: RL fine-tuning for language models with attention-aware credit assignment, on top of TRL."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AttentionGRPOTrainer", "__version__"]

if TYPE_CHECKING:
    from rlattn.grpo.trainer import AttentionGRPOTrainer


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import: whoever only asks for the version or --help does not pay for it.
    if name == "AttentionGRPOTrainer":
        from rlattn.grpo.trainer import AttentionGRPOTrainer

        return AttentionGRPOTrainer
    raise AttributeError(f"module 'rlattn' has no attribute '{name}'")
