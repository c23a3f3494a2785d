"""Logs what the credit rule did to the batches of a step, once, at its end."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlattn.statistics import means
from rlattn.types import Credit

COUNTS = ("credit/nonfinite_rows", "credit/refused_rows")  # sums over a step's batches and ranks; the rest are means


class CreditLog(TrainerCallback):
    """Keeps every batch's numbers as tensors until the step ends: to read one waits for the GPU, to gather it for every
    rank, and a step has many batches. One small gather a step.

    Attributes:
        proven: the rule has worked through a whole step of this session.
    """

    def __init__(self, log: Callable[[str, float], None]):
        self.log = log
        self.batches: list[dict[str, Tensor]] = []
        self.proven = False

    def add(self, credit: Credit, strength: float) -> None:
        """A batch's numbers, and how far the schedule lets its weights count."""
        filled = credit.weights_BN.new_full((), strength)  # new_tensor would wait for the GPU
        self.batches.append({**credit.metrics, "credit/strength": filled})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.batches.clear()  # of a step that an error broke off

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.batches:  # no credit: on every rank alike
            return
        self.proven = True
        values = iter(torch.stack([value for batch in self.batches for value in batch.values()]).tolist())
        numbers = [{name: next(values) for name in batch} for batch in self.batches]
        self.batches.clear()
        batches = [*zip(*gather_object([numbers]), strict=True)]
        for of_ranks in batches:
            for name, value in means(of_ranks).items():  # a rule that failed on one rank has other metrics there
                if name not in COUNTS:
                    self.log(name, value)
        for name in COUNTS:
            self.log(name, sum(found.get(name, 0) for of_ranks in batches for found in of_ranks))
