"""What a second rollout is asked: texts, and images where the policy sees, as token ids and the processor's fields."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from rlattn.policy.prompts import missing_beginning, piece_ids, text_ids
from rlattn.types import Prompt

# What a generation batch may hold beside tokens, as TRL's forward takes it.
IMAGE_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One entry a prompt."""

    prompt_ids: list[list[int]]
    """Image marks grown to the tokens that the images take."""
    images: list[list[Any] | None] | None = None
    """None: nothing is shown."""
    fields: dict[str, Any] = field(default_factory=dict)
    """As TRL's generation takes them: those of images one after the other, those of tokens one list a prompt."""


def ask(processor: Any, prompts: Sequence[Prompt], images: Sequence[Sequence[Any] | None] | None = None) -> Asked:
    """
    Args:
        processor: the policy's processor, or its tokenizer.
        prompts: with the processor's own mark where an image belongs, as a rendered chat template has it. Marks beyond
            the images are text that somebody quoted: they are read as they are spelt.
        images: of each prompt, in its order, as PIL images or arrays; None or empty for a text alone.

    Raises:
        ValueError: no such images, fewer marks than images, or the policy reads text only.
    """
    shown = _shown(images, len(prompts))
    if not hasattr(processor, "image_processor"):
        if any(shown):
            raise ValueError("images: the policy reads text only, it has no image processor")
        return Asked(prompt_ids=[text_ids(processor, prompt) for prompt in prompts])
    mark = getattr(processor, "image_token", None)
    # A piece is a text and the images whose marks it holds, or token ids.
    pieces = [
        list(_pieces(place, prompt, of_prompt, mark, processor.tokenizer))
        for place, (prompt, of_prompt) in enumerate(zip(prompts, shown, strict=True))
    ]
    seeing = [piece for of_prompt in pieces for piece in of_prompt if piece[1]]
    made: dict[str, Any] = {"input_ids": []}
    if seeing:
        texts, of_texts = zip(*seeing, strict=True)
        made = dict(processor(text=list(texts), images=list(of_texts), add_special_tokens=False))
    of_tokens = {name: iter(value) for name, value in made.items() if _of_tokens(value, made["input_ids"])}
    rows: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in of_tokens}
    for place, (prompt, of_prompt) in enumerate(zip(prompts, pieces, strict=True)):
        for content, of_piece in of_prompt:
            ids = [] if of_piece else piece_ids(processor.tokenizer, [content])
            for name, values in of_tokens.items():
                alone = ids if name == "input_ids" else [0] * len(ids)
                rows[name][place] += next(values) if of_piece else alone
        begin = missing_beginning(processor.tokenizer, prompt, rows["input_ids"][place])
        for name in of_tokens:
            rows[name][place][:0] = begin if name == "input_ids" else [0] * len(begin)
    fields = {name: value for name, value in {**made, **rows}.items() if name not in ("input_ids", "attention_mask")}
    images_of = [of_prompt or None for of_prompt in shown] if seeing else None
    return Asked(prompt_ids=rows["input_ids"], images=images_of, fields=fields)


def _shown(images: Any, count: int) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, list | tuple) or len(images) != count:
        got = len(images) if isinstance(images, list | tuple) else type(images).__name__
        raise ValueError(f"images: expected a list with one entry a prompt, {count}, got {got}")
    for place, of_prompt in enumerate(images):
        if not isinstance(of_prompt, list | tuple | None):
            raise ValueError(f"images[{place}]: expected a list of images, or None, got {type(of_prompt).__name__}")
        for number, image in enumerate(of_prompt or []):
            if not isinstance(image, Image | np.ndarray | torch.Tensor):  # a path or an address would be fetched
                problem = f"expected a PIL image or an array, got {type(image).__name__}"
                raise ValueError(f"images[{place}][{number}]: {problem}")
    return [list(of_prompt or []) for of_prompt in images]


def _pieces(
    place: int, prompt: Prompt, images: list[Any], mark: str | None, tokenizer: Any
) -> Iterator[tuple[str | Sequence[int], list[Any]]]:
    left = list(images)
    for piece in [prompt] if isinstance(prompt, str) else prompt:
        if not isinstance(piece, str):
            yield piece, []
        elif not mark:  # the processor has a way of its own: all go to the first text
            yield piece, left
            left = []
        else:
            parts = piece.split(mark)
            here, left = left[: len(parts) - 1], left[len(parts) - 1 :]
            yield mark.join(parts[: len(here) + 1]), here
            for quoted in parts[len(here) + 1 :]:
                yield piece_ids(tokenizer, mark[:2]) + piece_ids(tokenizer, mark[2:]), []
                yield quoted, []
    if left:
        missing = f"has {len(images)} image(s), and {mark or 'a text'} for {len(images) - len(left)}"
        raise ValueError(f"images: prompt {place} {missing}: {str(prompt)[:80]!r}")


def _of_tokens(value: Any, input_ids: Sequence[Sequence[int]]) -> bool:
    """Whether a field has one number a token, as lists; what is of images comes as arrays or tensors."""
    of_texts = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return of_texts and [len(row) for row in value] == [len(ids) for ids in input_ids]
