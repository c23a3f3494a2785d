"""What a second rollout is asked: texts, and images where the policy sees, as token ids and the processor's fields."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlattn.prompts import prompt_tokens
from rlattn.types import Prompt


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
        prompts: with the processor's own mark where an image belongs, as a rendered chat template has it.
        images: of each prompt, in its order; None or empty for a text alone.

    Raises:
        ValueError: the policy reads text only, or a prompt with images has no mark for one, or is no single text.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    shown = [list(of_prompt or []) for of_prompt in images or []]
    if images is not None and len(shown) != len(prompts):
        raise ValueError(f"images: expected one entry a prompt, {len(prompts)}, got {len(shown)}")
    seeing = [place for place, of_prompt in enumerate(shown) if of_prompt]
    if not seeing:
        return Asked(prompt_ids=[prompt_tokens(tokenizer, prompt) for prompt in prompts])
    _check(processor, [prompts[place] for place in seeing])
    made = processor(
        text=[prompts[place] for place in seeing],
        images=[shown[place] for place in seeing],
        add_special_tokens=False,
    )
    written = dict(zip(seeing, made["input_ids"], strict=True))
    prompt_ids = [
        list(written[place]) if place in written else prompt_tokens(tokenizer, prompt)
        for place, prompt in enumerate(prompts)
    ]
    fields = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    for name, value in fields.items():
        if _of_tokens(value, made["input_ids"]):
            rows = dict(zip(seeing, value, strict=True))
            fields[name] = [rows.get(place, [0] * len(ids)) for place, ids in enumerate(prompt_ids)]
    return Asked(prompt_ids=prompt_ids, images=[of_prompt or None for of_prompt in shown], fields=fields)


def _check(processor: Any, prompts: list[Prompt]) -> None:
    if not hasattr(processor, "image_processor"):
        raise ValueError("images: the policy reads text only, it has no image processor")
    mark = getattr(processor, "image_token", None)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError("images: a prompt with images is one text, not pieces")
        if mark and mark not in prompt:
            raise ValueError(f"images: a prompt with images has no {mark} where one belongs: {prompt[:80]!r}")


def _of_tokens(value: Any, input_ids: Sequence[Sequence[int]]) -> bool:
    """Whether a field has one number a token, as lists; what is of images comes as arrays or tensors."""
    of_prompts = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return of_prompts and [len(row) for row in value] == [len(ids) for ids in input_ids]
