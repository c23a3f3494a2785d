"""Effort: how much thought a prompt asks for, as a line `Effort: 0.50` before it (arXiv 2510.27042). Pure.

A recipe's `task.efforts` is the set. All rollouts of a group share one effort, and the row they come from carries it
(`row["effort"]`) beside the prompt as the task wrote it. In training a row's effort is drawn without replacement by
(seed, epoch, prompt): it meets every effort once in as many epochs, on every rank and after a resume alike. Evaluation
asks every held-out row at every effort.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from rlattn.errors import UserError
from rlattn.formats.thought import CLOSE, OPEN, opens_thought
from rlattn.formats.token_span import Decode, token_span
from rlattn.types import Messages

if TYPE_CHECKING:
    from rlattn.types import Row, Split, WarmStartable

FULL = 1.0  # asks for as much thought as it takes
FREE = 4  # an answer of up to a fourth of the thought's tokens is not counted


def check_efforts(efforts: Sequence[float]) -> None:
    """Raises ValueError where `efforts` is no set that a recipe may name."""
    for effort in efforts:
        if not 0 < effort <= FULL or round(effort, 2) != effort:
            raise ValueError(f"expected numbers above 0 and up to 1, with at most two decimals, got {effort!r}")
    if len(set(efforts)) != len(efforts) or len(efforts) < 2:
        raise ValueError(f"expected at least two different efforts, got {list(efforts)}")
    if FULL not in efforts:
        raise ValueError(f"expected 1.0 among them, the effort that asks for no brevity, got {list(efforts)}")


def effort_text(effort: float) -> str:
    return f"{effort:.2f}"


def with_effort_line(prompt: str | Messages, effort: float) -> str | Messages:
    """The prompt, with the effort's line before it; before the last user message where it is a chat."""
    line = f"Effort: {effort_text(effort)}\n"
    if isinstance(prompt, str):
        return line + prompt
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise UserError("task.efforts", "a prompt has no user message that the effort could be written into.")
    content = prompt[last]["content"]
    content = line + content if isinstance(content, str) else [{"type": "text", "text": line}, *content]
    return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]


def at_effort(example: Any, effort: float) -> Any:
    """An example (a mapping with `prompt` and `row`) at an effort: the prompt says it, the row carries it."""
    if "effort" in example["row"]:
        raise UserError("task.efforts", "the task's rows have a column 'effort' of their own.", "Rename that column.")
    prompt = with_effort_line(example["prompt"], effort)
    return {**example, "prompt": prompt, "row": {**example["row"], "effort": effort}, "effort": effort}


@dataclass(frozen=True, kw_only=True)
class EffortDraw:
    """Which effort a training example has in an epoch."""

    efforts: tuple[float, ...]
    seed: int

    def __call__(self, example: Any, epoch: int) -> Any:
        cycle, place = divmod(epoch, len(self.efforts))
        order = Random(f"{self.seed} {cycle} {query_key(example['row'])}").sample(self.efforts, len(self.efforts))
        return at_effort(example, order[place])


def query_key(row: Mapping[str, Any]) -> str:
    """What names the query of a row, whatever its effort: the prompt as the task wrote it."""
    return json.dumps(row["prompt"], sort_keys=True, default=str)


def thought_tokens(ids: Sequence[int], decode: Decode, prompt_text: str) -> int:
    """Tokens of the `<think>` block that a completion begins with, tags included, and of what follows it beyond a
    quarter of them: an answer is free, more of the solution is thought in another place.

    The prompt may have opened the block. Where nobody did, or there is a tag besides its own, the whole completion
    counts: else a policy could think in one place and be measured by another.

    Args:
        decode: token ids to text, special tokens written out. Cost: called about 2·log2(len(ids)) times.
        prompt_text: what the completion goes on from.
    """
    text = decode(ids)
    before, close, after = text.partition(CLOSE)
    own = before.strip()
    opened = own.startswith(OPEN) != opens_thought(prompt_text)
    if not close or not opened or OPEN in own.removeprefix(OPEN) or OPEN in after or CLOSE in after:
        return len(ids)
    thought = len(token_span(0, len(before) + len(close), ids, decode))
    return max(thought, len(ids) - thought // FREE)


def by_effort(values: Mapping[str, Any] | None) -> dict[str, tuple[float, float]]:
    """Effort -> accuracy and tokens of thought, from an evaluation's flat numbers; empty where there are none."""
    found = values or {}
    efforts = sorted(match[1] for key in found if (match := re.fullmatch(r"effort_(\d\.\d\d)/tokens", key)))
    return {
        effort: (found[f"effort_{effort}/accuracy"], found[f"effort_{effort}/tokens"])
        for effort in efforts
        if f"effort_{effort}/accuracy" in found
    }


@dataclass(frozen=True, kw_only=True)
class AtEveryEffort:
    """A task as the tiny policy's warm start reads it: every row at every effort, which `trace` finds in the row."""

    task: "WarmStartable"
    efforts: tuple[float, ...]

    def rows(self, split: "Split") -> "Iterable[Row]":
        rows = self.task.rows(split)
        return [
            {**row, "prompt": with_effort_line(row["prompt"], e), "effort": e} for row in rows for e in self.efforts
        ]

    def verify(self, completion: str, row: "Row") -> float:
        return self.task.verify(completion, row)

    def gold(self, row: "Row") -> str:
        return self.task.gold(row)

    def trace(self, row: "Row", rng: Random, noise: float) -> str:
        return self.task.trace(row, rng, noise)
