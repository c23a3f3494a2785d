"""Texts that end a completion, in TRL's own generation with transformers, which knows end tokens only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList

from rlattn.grpo.port import Port
from rlattn.policy.generate import StopAt


@contextmanager
def stopping_at(port: Port, texts: Sequence[str]) -> Iterator[list[StopAt]]:
    """Adds a stopping criterion to the policy's `generate`, which TRL calls without one; the list takes it."""
    stopped: list[StopAt] = []
    policy: Any = port.generating_policy
    generate: Callable = policy.generate

    def generate_until(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        stopped.append(StopAt(port.tokenizer, texts, input_ids.shape[1]))
        return generate(*args, input_ids=input_ids, stopping_criteria=StoppingCriteriaList(stopped), **kwargs)

    policy.generate = generate_until
    try:
        yield stopped
    finally:
        del policy.generate
