"""Prompts: from a task's row to what the policy reads, and from what it wrote to text."""

from collections.abc import Collection, Iterable
from typing import Any

from rlattn.recipe.schema import Policy
from rlattn.types import Messages, Prompt


def chat_or_plain(prompt: str | Messages, policy: Policy) -> str | Messages:
    """A text prompt becomes a user message (after the system prompt) unless `prompt_style: plain`; messages stay."""
    if policy.prompt_style == "plain":
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if policy.system_prompt and messages[0]["role"] != "system":
        return [{"role": "system", "content": policy.system_prompt}, *messages]
    return messages


def render_ids(tokenizer: Any, prompt: str | Messages, template_kwargs: dict[str, Any]) -> list[int]:
    """The prompt's token ids: of chat messages as the chat template has them, of text as `text_ids` has them."""
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
    )
    return rendered["input_ids"]


def render_text(tokenizer: Any, prompt: str | Messages, template_kwargs: dict[str, Any]) -> str:
    """The prompt as the policy reads it, chat template applied."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **template_kwargs)


def text_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A whole prompt's token ids, begun as the tokenizer begins every text (a beginning-of-sequence token, say).

    A text that begins so already, or as the policy's chat template begins a conversation, has been rendered before:
    nothing is added to it. Nor is an end token, which some tokenizers put after a text: a prompt is there to go on.
    """
    ids = piece_ids(tokenizer, prompt)
    return [*missing_beginning(tokenizer, prompt, ids), *ids]


def piece_ids(tokenizer: Any, piece: Prompt) -> list[int]:
    """Token ids of what goes on from others: special tokens that a text spells out become real, ids stay the same."""
    if isinstance(piece, str):
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])
    return [token for part in piece for token in (piece_ids(tokenizer, part) if isinstance(part, str) else part)]


def missing_beginning(tokenizer: Any, prompt: Prompt, ids: list[int]) -> list[int]:
    """What the tokenizer puts before every text, where a prompt of these ids lacks it: not before a piece of ids."""
    if not isinstance(prompt, str) and not isinstance(prompt[0], str):
        return []
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    begin = next((whole[:place] for place in range(len(whole)) if whole[place:][: len(bare)] == bare), [])
    first = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    rendered = first is not None and str(first) in str(tokenizer.chat_template)
    return [] if rendered or ids[: len(begin)] == begin else begin


def rendered_mark(tokenizer: Any, prompt: Any) -> str | None:
    """The special token that a text prompt begins with, as one that has been through a chat template does."""
    text = prompt.lstrip() if isinstance(prompt, str) else ""
    return next((mark for mark in tokenizer.all_special_tokens if text.startswith(mark)), None)


def without_images(prompt: str | Messages, *, keep_marks: bool = False) -> str | Messages:
    """The same messages, nothing shown in them; `keep_marks` leaves `{"type": "image"}` where something was."""
    if isinstance(prompt, str):
        return prompt

    def blind(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        marked = [{"type": "image"} if _shows(part) else part for part in content]
        return [part for part in marked if keep_marks or not _shows(part)]

    return [
        {**message, "content": blind(message["content"])} if "content" in message else message for message in prompt
    ]


def _shows(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def decode(tokenizer: Any, completion_ids: Iterable[int], ends: Collection[int] = ()) -> str:
    """What a policy wrote, as text: without padding, beginning and end tokens, every other token as it is spelled.

    Marks that rewards read, such as `<think>`, are special tokens in some tokenizers, and stay.

    Args:
        tokenizer: the policy's, or its processor.
        ends: what ends a completion besides the tokenizer's own end token (`end_tokens`, or a port's `end_ids`).
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    dropped = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, *ends}
    return tokenizer.decode([token for token in completion_ids if token not in dropped], skip_special_tokens=False)
