"""Chat turns as token ids: what the template writes around them, and what was said in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from rlattn.formats.transcript import runs, write_transcript
from rlattn.policy.prompts import decode

TOOL_ERROR = re.compile(r"\{'error': .*")  # TRL's answer to a bad call, which repeats what the policy wrote
MARK = "\u2042"  # stands for a turn while the chat template's frame around it is read


def reply_ids(tokenizer: PreTrainedTokenizerBase, reply: str, template_kwargs: dict[str, Any]) -> list[int]:
    """What the chat template writes between the end of one turn and the beginning of the next, the reply in it."""
    return list(tokenizer(reply_text(tokenizer, reply, template_kwargs), add_special_tokens=False)["input_ids"])


def reply_text(tokenizer: PreTrainedTokenizerBase, reply: str, template_kwargs: dict[str, Any]) -> str:
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": MARK},
        {"role": "user", "content": reply},
    ]
    text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)
    frame: str = text.rpartition(MARK)[2]
    before, end, after = frame.partition(str(tokenizer.eos_token))
    return after if end and reply not in before else frame  # the turn's own end token stands there already


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str | None]]
) -> tuple[list[int], list[bool]]:
    """A written dialogue as the tokens it would have been held in, and which are the policy's."""
    ids: list[int] = []
    mask: list[bool] = []
    for turn, reply in turns:
        own = [*tokenizer(turn, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        told = [] if reply is None else reply_ids(tokenizer, reply, {})
        ids += [*own, *told]
        mask += [True] * len(own) + [False] * len(told)
    return ids, mask


def completion_text(tokenizer: Any, completion_ids: list[int], policy_mask: Sequence[bool] | None) -> str:
    """A completion as text: the transcript where some of it is replies or was asked through a tool."""
    if policy_mask is None:
        return decode(tokenizer, completion_ids)
    segments = runs(policy_mask[: len(completion_ids)])
    return write_transcript(
        (_own_text(tokenizer, completion_ids[start:end]) if own else _told(tokenizer, completion_ids[start:end]), own)
        for start, end, own in segments
    )


def _told(tokenizer: Any, ids: list[int]) -> str:
    return TOOL_ERROR.sub("(error)", decode(tokenizer, ids))


def _own_text(tokenizer: Any, ids: list[int]) -> str:
    """What the policy said in a turn; of a tool call the arguments, each on its own line."""
    if getattr(tokenizer, "response_template", None) is None:
        return decode(tokenizer, ids)
    message = parse_response(tokenizer, ids, prefix=[])
    calls = [call["function"].get("arguments") for call in message.get("tool_calls") or []]
    values = [value for arguments in calls if isinstance(arguments, dict) for value in arguments.values()]
    return "\n".join(map(str, values)) or message.get("content") or ""
