"""Plain generation with a transformers model, outside of any trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList


@torch.no_grad()
def write_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    stop_strings: Sequence[str] = (),
    **sampling: Any,
) -> list[list[int]]:
    """One completion a prompt from a plain model, greedy at temperature 0, as token ids up to and with the end token.

    Args:
        sampling: `top_p`, `top_k`, `min_p`, `repetition_penalty`; the model's own generation settings do not count.
    """
    ends = end_tokens(model, tokenizer)
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    longest = max(len(ids) for ids in prompt_ids)
    ids_BN = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompt_ids], device=model.device)
    mask_BN = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=model.device)
    config = GenerationConfig(
        **{"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, **sampling},
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    writer: Any = model.eval()  # transformers' types do not know that it can generate
    written = writer.generate(
        input_ids=ids_BN,
        attention_mask=mask_BN,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([stop_at(tokenizer, stop_strings, longest)] if stop_strings else []),
    )
    return [_up_to_end(ids, ends, pad) for ids in written[:, longest:].tolist()]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a completion: the tokenizer's, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {int(one) for one in ids if isinstance(one, int)}


def stop_at(tokenizer: Any, texts: Sequence[str], prompt_length: int) -> Any:
    """A stopping criterion that ends a completion at any of `texts`.

    transformers' own `stop_strings` cannot read every tokenizer; decoding the last few tokens can.
    """
    tail = max(len(text.encode()) for text in texts) + 1  # a token has at least one byte

    def stopped(ids_BN: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        last = tokenizer.batch_decode(ids_BN[:, max(prompt_length, ids_BN.shape[1] - tail) :])
        return torch.tensor([any(text in end for text in texts) for end in last], device=ids_BN.device)

    return stopped


def _up_to_end(ids: list[int], ends: set[int], pad: int) -> list[int]:
    end = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
    if end is not None:
        return ids[:end]
    last = len(ids)
    while last > 1 and ids[last - 1] == pad:  # what a stop string ended
        last -= 1
    return ids[:last]
