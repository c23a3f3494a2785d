"""Texts that end a completion, in TRL's own generation with transformers, which knows end tokens only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList

from rlattn.grpo.port import Port
from rlattn.policy.generate import stop_at


@contextmanager
def stopping_at(port: Port, texts: Sequence[str]) -> Iterator[None]:
    """Adds a stopping criterion to the policy's `generate`, which TRL calls without one."""
    policy: Any = port.generating_policy
    generate: Callable = policy.generate

    def generate_until(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        stopped = stop_at(port.tokenizer, texts, input_ids.shape[1])
        return generate(*args, input_ids=input_ids, stopping_criteria=StoppingCriteriaList([stopped]), **kwargs)

    policy.generate = generate_until
    try:
        yield
    finally:
        del policy.generate


def without_padding(port: Port, ids: list[int]) -> list[int]:
    """TRL cuts a completion after its end token; one that a stop string ended has padding there instead."""
    pad = port.tokenizer.pad_token_id
    end = len(ids)
    while end > 1 and ids[end - 1] == pad and pad not in port.end_ids:
        end -= 1
    return ids[:end]
