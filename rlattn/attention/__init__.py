"""Attention as a signal: how far heads look, and which tokens they look at."""

from rlattn.attention.metrics import AttentionMetrics, attention_metrics

__all__ = ["AttentionMetrics", "attention_metrics"]
