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
    stopped = StopAt(tokenizer, stop_strings, longest)
    writer: Any = model.eval()  # transformers' types do not know that it can generate
    written = writer.generate(
        input_ids=ids_BN,
        attention_mask=mask_BN,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([stopped] if stop_strings else []),
    )
    return stopped.cut([_up_to_end(ids, ends) for ids in written[:, longest:].tolist()])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a completion: the tokenizer's, and those of the model's generation settings. In a trainer they
    are TRL's `eos_token_ids`.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {int(one) for one in ids if isinstance(one, int)}


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


class StopAt:
    """A stopping criterion that ends a completion at any of `texts`, and knows where: transformers pads what has ended
    with a token that the policy may write, too.

    transformers' own `stop_strings` cannot read every tokenizer; decoding the last few tokens can.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_length: int):
        self.tokenizer, self.texts, self.prompt_length = tokenizer, tuple(texts), prompt_length
        self.tail = max((len(text.encode()) for text in texts), default=0) + 1  # a token has at least one byte
        self.lengths: dict[int, int] = {}  # row -> tokens of its completion

    def __call__(self, ids_BN: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        length = ids_BN.shape[1] - self.prompt_length
        last = self.tokenizer.batch_decode(ids_BN[:, -min(self.tail, length) :])
        stopped = [any(text in end for text in self.texts) for end in last]
        for row, stops in enumerate(stopped):
            if stops:
                self.lengths.setdefault(row, length)
        return torch.tensor(stopped, device=ids_BN.device)

    def cut(self, completion_ids: Sequence[list[int]]) -> list[list[int]]:
        """The completions without what follows their stop text. An end token may have ended one before."""
        return [ids[: self.lengths.get(row)] for row, ids in enumerate(completion_ids)]
