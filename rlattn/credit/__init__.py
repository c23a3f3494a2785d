"""Credit rules: one weight a token. One file a family, one line here.

A rule is a frozen dataclass; its fields are its options in a recipe (`credit: {kind: local_chunk, top_fraction: 0.4}`).
"""

from rlattn.credit.apply import apply_credit, check_credit, schedule, scheduled_weights
from rlattn.credit.base import check_weights, compute_credit
from rlattn.credit.controls import Entropy, Random, Shuffled, Uniform
from rlattn.credit.rhythm import CoupledRhythm, GlobalAnchor, LocalChunk
from rlattn.types import CreditRule

__all__ = [
    "CREDIT_RULES",
    "CreditRule",
    "apply_credit",
    "check_credit",
    "check_weights",
    "compute_credit",
    "schedule",
    "scheduled_weights",
]

CREDIT_RULES: dict[str, type] = {
    "uniform": Uniform,
    "random": Random,
    "entropy": Entropy,
    "shuffled": Shuffled,
    "local_chunk": LocalChunk,
    "global_anchor": GlobalAnchor,
    "coupled_rhythm": CoupledRhythm,
}
