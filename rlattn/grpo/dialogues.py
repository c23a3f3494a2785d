"""Dialogues between the policy and a task's `reply`, in training and in evaluation.

Free text: every turn of the policy's is a chat message, and so is every reply (TRL's `rollout_func`). Tool calls: the
policy calls `ask` (TRL's `environment_factory`). Both end in one row of tokens with a mask of those that the policy
wrote, so that credit, rewards and metrics are the same. A reply's tokens are never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

from rlattn.errors import UserError, describe
from rlattn.grpo.port import Port
from rlattn.grpo.second_rollouts import generate_turn
from rlattn.policy.chat_tokens import dialogue_ends, end_of_turn, reply_ids, reply_text
from rlattn.policy.prompts import decode, render_ids
from rlattn.types import DialogueTask, Example, Row

# prompts to one turn each, as token ids, and the tokens' log-probabilities where the backend has them
GenerateTurn = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float]] | None]]
ENOUGH = "Enough."  # names no value


@dataclass
class Dialogue:
    """One dialogue while it is held."""

    prompt_ids: list[int]
    row: Row
    completion_ids: list[int] = field(default_factory=list)
    policy_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    over: bool = False

    def add(self, ids: list[int], *, own: bool, logprobs: list[float] | None = None) -> None:
        self.completion_ids += ids
        self.policy_mask += [own] * len(ids)
        self.logprobs += (logprobs or [0.0] * len(ids))[: len(ids)]


def hold(
    generate: GenerateTurn,
    tokenizer: PreTrainedTokenizerBase,
    task: DialogueTask,
    dialogues: Sequence[Dialogue],
    *,
    most_tokens: int,
    template_kwargs: dict[str, Any],
    ends: Collection[int] = (),
    anywhere: Callable[[bool], bool] = bool,
) -> None:
    """Holds the dialogues to their ends, in free text, all of them side by side. What the policy reads is what the
    chat template makes of the turns so far.

    Args:
        most_tokens: of a completion, replies included; a dialogue that reaches it ends.
        ends: what ends a completion besides the tokenizer's own end token.
        anywhere: whether a flag is set on any rank: every rank generates equally often (ZeRO-3 needs that).
    """
    end: int = tokenizer.eos_token_id  # type: ignore[assignment]
    turn_end = end_of_turn(tokenizer, template_kwargs)
    ends = {end, *ends}
    for turn in range(task.questions + 1):
        alive = [dialogue for dialogue in dialogues if not dialogue.over]
        if not anywhere(bool(alive)):
            break
        prompts = [dialogue.prompt_ids + dialogue.completion_ids for dialogue in alive]
        written, logprobs = generate(prompts or [[end]])
        for index, dialogue in enumerate(alive):
            ids = (written[index] or [end])[: most_tokens - len(dialogue.completion_ids)]
            if turn_end in ids:  # which ends the turn even where the policy's generation settings do not name it
                ids = ids[: ids.index(turn_end) + 1]
            text = decode(tokenizer, ids, dialogue_ends(turn_end, ends))
            reply = task.reply(text, dialogue.row) if turn < task.questions else None
            kept, told = ids, reply_ids(tokenizer, reply, template_kwargs) if reply is not None else []
            if told and ids[-1] != turn_end:  # a turn that was cut, or ended as the template ends none
                kept = ids[:-1] if ids[-1] in ends else ids
                told = [turn_end, *told] if turn_end is not None else told
            length = len(dialogue.completion_ids) + len(kept) + len(told)
            dialogue.over = not told or not kept or length >= most_tokens
            dialogue.add(ids if dialogue.over else kept, own=True, logprobs=logprobs[index] if logprobs else None)
            if not dialogue.over:
                dialogue.add(told, own=False)


def rollouts_in_text(task: DialogueTask) -> Callable[[list[Any], Any], dict[str, Any]]:
    """The `rollout_func` for TRL: one dialogue a prompt; prompts come repeated already."""

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        port: Port = trainer.port
        dialogues = _begun(port, prompts, trainer.rows_in_hand)
        _hold_with_port(port, task, dialogues, greedy=False)
        return {
            "prompt_ids": [dialogue.prompt_ids for dialogue in dialogues],
            "completion_ids": [dialogue.completion_ids for dialogue in dialogues],
            "logprobs": [dialogue.logprobs for dialogue in dialogues] if port.vllm is not None else None,
            "env_mask": [[int(own) for own in dialogue.policy_mask] for dialogue in dialogues],
        }

    return rollout


def greedy_dialogues(port: Port, task: DialogueTask, examples: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
    """One greedy dialogue an example: token ids and policy mask. Collective; leaves training as it was."""
    if task.style == "tools":
        return _greedy_tool_dialogues(port, examples)
    dialogues = _begun(port, [example["prompt"] for example in examples], [example["row"] for example in examples])
    _hold_with_port(port, task, dialogues, greedy=True)
    return [(dialogue.completion_ids, dialogue.policy_mask) for dialogue in dialogues]


def plain_dialogues(
    write: Callable[[list[list[int]]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    task: DialogueTask,
    examples: Sequence[Example],
    *,
    most_tokens: int,
    template_kwargs: dict[str, Any],
    ends: Collection[int] = (),
) -> list[tuple[list[int], list[bool]]]:
    """The same, in free text, without a trainer: `write` gives one turn a prompt, as token ids."""
    dialogues = [
        Dialogue(prompt_ids=render_ids(tokenizer, example["prompt"], template_kwargs), row=example["row"])
        for example in examples
    ]
    hold(
        lambda prompt_ids: (write(prompt_ids), None),
        tokenizer,
        task,
        dialogues,
        most_tokens=most_tokens,
        template_kwargs=template_kwargs,
        ends=ends,
    )
    return [(dialogue.completion_ids, dialogue.policy_mask) for dialogue in dialogues]


def trl_arguments(task: DialogueTask | None) -> dict[str, Any]:
    """What GRPOTrainer is given for a task of dialogues."""
    if task is None:
        return {}
    if task.style == "tools":
        return {"environment_factory": lambda: Customer(task)}
    return {"rollout_func": rollouts_in_text(task)}


class Customer:
    """The other side of a dialogue, as an environment of TRL's: its public methods are the policy's tools."""

    def __init__(self, task: DialogueTask):
        self._task, self._asked = task, 0
        self._row: Row = {}

    def reset(self, row: Row, **_: Any) -> None:
        self._row, self._asked = row, 0

    def ask(self, question: str) -> str:
        """Ask the customer one question.

        Args:
            question: The question, about one thing.
        """
        self._asked += 1
        return (self._asked <= self._task.questions and self._task.reply(question, self._row)) or ENOUGH


def check_dialogues(task: DialogueTask, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> None:
    """Raises UserError where the policy's chat template cannot carry replies or tool calls."""
    key = "policy.path"
    try:
        text = reply_text(tokenizer, "yes", template_kwargs)
    except Exception as error:
        raise UserError(key, f"its chat template cannot carry a dialogue: {describe(error)}.") from None
    if "yes" not in text:
        raise UserError(key, "its chat template leaves a reply of the user's out.", "Use another policy.")
    if task.style != "tools":
        return
    fix = "Use task.style: text, or a policy whose template can, such as Qwen/Qwen3-4B."
    if not supports_tool_calling(tokenizer):
        raise UserError(key, "its chat template cannot carry tool calls.", fix)
    try:
        if getattr(tokenizer, "response_template", None) is None:
            add_response_schema(tokenizer)
        if not is_chat_template_prefix_preserving(tokenizer):
            get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(key, f"TRL cannot read tool calls in its chat template: {describe(error)}.", fix) from None


def _begun(port: Port, prompts: Sequence[Any], rows: Sequence[Row]) -> list[Dialogue]:
    ids: dict[str, list[int]] = {}  # a prompt comes once for each rollout of its group
    for prompt in prompts:
        if str(prompt) not in ids:
            ids[str(prompt)] = render_ids(port.tokenizer, prompt, port.template_kwargs)
    return [Dialogue(prompt_ids=ids[str(prompt)], row=row) for prompt, row in zip(prompts, rows, strict=True)]


def _hold_with_port(port: Port, task: DialogueTask, dialogues: Sequence[Dialogue], *, greedy: bool) -> None:
    def generate(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        return generate_turn(port, prompt_ids, max_new_tokens=task.turn_tokens, greedy=greedy)

    def anywhere(flag: bool) -> bool:
        return bool(port.gather(torch.tensor([flag], device=port.device)).any())

    hold(
        generate,
        port.tokenizer,
        task,
        dialogues,
        most_tokens=port.max_completion_length,
        template_kwargs=port.template_kwargs,
        ends=port.end_ids,
        anywhere=anywhere,
    )


def _greedy_tool_dialogues(port: Port, examples: Sequence[Example]) -> list[tuple[list[int], list[bool]]]:
    """Through TRL's own tool loop."""
    with port.apart(), port.settings(temperature=0.0):
        prompts, rows = [example["prompt"] for example in examples], [example["row"] for example in examples]
        completion_ids, mask = port.generate_with_tools(prompts, rows)
    return [(ids, [bool(flag) for flag in own]) for ids, own in zip(completion_ids, mask, strict=True)]
