"""Chat turns as token ids: what the template writes around them, and what was said in them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from rlattn.formats.transcript import runs, write_transcript
from rlattn.policy.prompts import decode, piece_ids

TOOL_ERROR = re.compile(r"\{'error': .*")  # TRL's answer to a bad call, which repeats what the policy wrote
MARK = "\u2042"  # stands for a turn while the chat template's frame around it is read


def reply_ids(tokenizer: PreTrainedTokenizerBase, reply: str, template_kwargs: dict[str, Any]) -> list[int]:
    """What the chat template writes between the end of one turn and the beginning of the next, the reply in it."""
    return _after_turn(tokenizer, reply, template_kwargs)[1]


def reply_text(tokenizer: PreTrainedTokenizerBase, reply: str, template_kwargs: dict[str, Any]) -> str:
    """What the chat template writes between a turn's last word and the next turn's first, the reply in it."""
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": MARK},
        {"role": "user", "content": reply},
    ]
    text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_kwargs)
    return text.rpartition(MARK)[2]


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str | None]]
) -> tuple[list[int], list[bool]]:
    """A written dialogue as the tokens it would have been held in, and which are the policy's."""
    ids: list[int] = []
    mask: list[bool] = []
    end: Any = end_of_turn(tokenizer, {})
    for turn, reply in turns:
        own = [*piece_ids(tokenizer, turn), tokenizer.eos_token_id if end is None else end]
        told = [] if reply is None else reply_ids(tokenizer, reply, {})
        ids += [*own, *told]
        mask += [True] * len(own) + [False] * len(told)
    return ids, mask


def completion_text(
    tokenizer: Any, completion_ids: list[int], policy_mask: Sequence[bool] | None, ends: Collection[int] = ()
) -> str:
    """A completion as text: the transcript where some of it is replies or was asked through a tool.

    Args:
        ends: what ends a completion besides the tokenizer's own end token.
    """
    if policy_mask is None:
        return decode(tokenizer, completion_ids, ends)
    ends = dialogue_ends(end_of_turn(tokenizer, {}), ends)
    segments = [(completion_ids[start:end], own) for start, end, own in runs(policy_mask[: len(completion_ids)])]
    return write_transcript(
        (_own_text(tokenizer, ids, ends) if own else _told(tokenizer, ids), own) for ids, own in segments
    )


def _told(tokenizer: Any, ids: list[int]) -> str:
    """A reply, without the special tokens that the chat template puts around it."""
    return TOOL_ERROR.sub("(error)", tokenizer.decode(ids, skip_special_tokens=True))


def _own_text(tokenizer: Any, ids: list[int], ends: Collection[int]) -> str:
    """What the policy said in a turn; of a tool call the arguments, each on its own line."""
    if getattr(tokenizer, "response_template", None) is None:
        return decode(tokenizer, ids, ends)
    message = parse_response(tokenizer, ids, prefix=[])
    calls = [call["function"].get("arguments") for call in message.get("tool_calls") or []]
    values = [value for arguments in calls if isinstance(arguments, dict) for value in arguments.values()]
    return "\n".join(map(str, values)) or message.get("content") or ""


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> int | None:
    """The token with which the chat template ends the policy's turns: often another than the tokenizer's end token.
    None where it writes none.
    """
    if tokenizer.chat_template is None:
        return None
    return _after_turn(tokenizer, "?", template_kwargs)[0]


def _after_turn(
    tokenizer: PreTrainedTokenizerBase, reply: str, template_kwargs: dict[str, Any]
) -> tuple[int | None, list[int]]:
    """What the chat template writes after a turn's last word: its end token, and all up to the next turn's first word.
    A template that marks only where turns begin ends one with the next one's mark, and so do its policies.
    """
    text = reply_text(tokenizer, reply, template_kwargs)
    ids = piece_ids(tokenizer, text.lstrip())
    if ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] == tokenizer.eos_token_id):
        return ids[0], ids[1:]
    return None, piece_ids(tokenizer, text)


def dialogue_ends(turn_end: int | None, ends: Collection[int]) -> set[int]:
    return {*ends} if turn_end is None else {*ends, turn_end}
