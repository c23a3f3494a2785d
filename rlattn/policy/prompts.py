"""Prompts: from a task's row to what the policy reads."""

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
    """The prompt's token ids, exactly as TRL makes them for training."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    rendered = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
    )
    return rendered["input_ids"]


def render_text(tokenizer: Any, prompt: str | Messages, template_kwargs: dict[str, Any]) -> str:
    """The prompt as the policy reads it, chat template applied."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **template_kwargs)


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt's token ids: special tokens that a text spells out become real, ids stay what they are."""
    pieces = [prompt] if isinstance(prompt, str) else prompt
    return [
        token
        for piece in pieces
        for token in (tokenizer(piece, add_special_tokens=False)["input_ids"] if isinstance(piece, str) else piece)
    ]


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


def decode(tokenizer: Any, completion_ids: list[int]) -> str:
    """A completion as text, special tokens dropped."""
    return tokenizer.decode(completion_ids, skip_special_tokens=True)
