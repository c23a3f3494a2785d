"""What the policy's attention says about its tokens: WAAD, FAI and the spans of its heads (arXiv 2510.13554)."""

from typing import TYPE_CHECKING, Any

from rlattn.attention.metrics import AttentionMetrics, attention_metrics

if TYPE_CHECKING:
    from rlattn.attention.capture import rhythm_signals

__all__ = ["AttentionMetrics", "attention_metrics", "rhythm_signals"]


def __getattr__(name: str) -> Any:
    # capture.py needs transformers, the metrics only torch
    if name == "rhythm_signals":
        from rlattn.attention.capture import rhythm_signals

        return rhythm_signals
    raise AttributeError(f"module 'rlattn.attention' has no attribute '{name}'")
