"""Held-out accuracy: greedy, with an interval, on every rank's share of the rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from rlattn.generation import generate_greedy
from rlattn.prompts import decode, render_ids, render_text
from rlattn.tasks import Row, Task
from rlattn.trainer import AttentionGRPOTrainer
from rlattn.types import Messages

Generate = Callable[[list[list[int]]], list[list[int]]]  # prompts to completions, as token ids


class Example(TypedDict):
    """A task's row, and its prompt as the policy gets it (chat messages unless plain)."""

    prompt: str | Messages
    row: Row


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Greedy pass@1 on held-out rows, with its 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    rows: int
    mean_length: float
    """Tokens a completion."""

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.accuracy:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = {self.rows:.0f})"

    def metrics(self) -> dict[str, float]:
        return {f"eval_{key}": float(value) for key, value in asdict(self).items()}


def evaluate(
    trainer: AttentionGRPOTrainer, task: Task, examples: Sequence[Example], *, samples: int = 0
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Greedy accuracy of the current policy, and the first `samples` completions (on rank 0).

    Collective: every rank takes every world_size-th row and makes the same number of generation calls; all ranks return
    the same numbers. Cost: one greedy completion a row. The training RNG is left as it was.
    """
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    totals, kept = score_greedy(
        lambda prompt_ids: generate_greedy(trainer, prompt_ids),
        trainer._tokenizer,
        task,
        examples[rank::ranks],
        calls=math.ceil(math.ceil(len(examples) / ranks) / trainer.args.per_device_eval_batch_size),
        batch_size=trainer.args.per_device_eval_batch_size,
        filler=examples[0],
        template_kwargs=trainer.chat_template_kwargs,  # type: ignore[arg-type]
        samples=samples,
    )
    return summarise(trainer.accelerator.reduce(totals.to(trainer.accelerator.device), "sum")), kept


def score_greedy(
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    *,
    calls: int,
    batch_size: int,
    filler: Example,
    template_kwargs: dict[str, Any],
    samples: int = 0,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Totals (right answers, completion tokens, rows) of one rank's rows, and its first `samples` completions.

    `calls`: how often to generate; a rank out of rows completes `filler`, as collective generation needs every rank.
    """
    totals = torch.zeros(3)
    kept: list[dict[str, Any]] = []
    for start in range(0, calls * batch_size, batch_size):
        part = examples[start : start + batch_size]
        prompts = [render_ids(tokenizer, example["prompt"], template_kwargs) for example in part or [filler]]
        for example, ids in zip(part, generate(prompts), strict=False):
            text = decode(tokenizer, ids)
            right = task.verify(text, example["row"])
            totals += torch.tensor([right, len(ids), 1.0])
            if len(kept) < samples:
                prompt = render_text(tokenizer, example["prompt"], template_kwargs)
                kept.append({"prompt": prompt, "completion": text, "gold": task.gold(example["row"]), "score": right})
    return totals, kept


def summarise(totals: torch.Tensor) -> Evaluation:
    """From totals (right answers, completion tokens, rows) to shares and the interval."""
    right, tokens, rows = totals.tolist()
    low, high = wilson_interval(right, int(rows))
    return Evaluation(accuracy=right / rows, low=low, high=high, rows=int(rows), mean_length=tokens / rows)


def wilson_interval(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927): honest near 0 and 1, where the normal one is not."""
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    # exact at the ends, where rounding would leave 1e-17
    return (0.0 if right == 0 else low), (1.0 if right == count else high)
