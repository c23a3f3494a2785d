"""Held-out accuracy: greedy, with an interval, on every rank's share of the rows."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from rlattn.formats.effort import effort_text, thought_tokens
from rlattn.formats.thought import with_opened_thought
from rlattn.grpo.dialogues import greedy_dialogues
from rlattn.grpo.port import Port
from rlattn.grpo.second_rollouts import generate_greedy
from rlattn.policy.chat_tokens import completion_text
from rlattn.policy.prompts import decode, render_ids, render_text
from rlattn.statistics import wilson_interval
from rlattn.tasks.guarded_metrics import metrics_of, safe_text, safe_verify
from rlattn.tasks.rows import storable
from rlattn.types import DialogueTask, Example, Task


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the policy wrote about a row, or the dialogue it held about it."""

    text: str
    ids: list[int]
    """All tokens of it, a dialogue's replies too."""
    tokens: int
    """Of its own."""
    thought: int = 0
    """Tokens of the `<think>` block."""


Generate = Callable[[Sequence[Example]], list[Completion]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one held-out row."""

    right: float | None
    """None where the verifier failed."""
    tokens: int
    measured: dict[str, float] | None
    """The task's own metrics; None where they failed."""
    effort: float | None = None
    """What the prompt asked for, where the run has efforts."""
    thought: int = 0
    """Tokens of the `<think>` block; counted only where there is an effort."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Greedy pass@1 on held-out rows, with its 95 % Wilson interval; None where no completion could be judged."""

    accuracy: float | None
    low: float | None
    high: float | None
    rows: int
    """Those that were judged."""
    mean_length: float
    """Tokens a completion."""
    measured: dict[str, float] = field(default_factory=dict)
    """Means of the task's own metrics; accuracy and tokens of thought by effort."""
    failed: int | None = None
    """Completions on which the verifier failed, if on any: they are left out."""

    def __str__(self) -> str:
        without = f"; verify() failed on {self.failed:.0f} more" if self.failed else ""
        if self.accuracy is None or self.low is None or self.high is None:
            return f"unknown{without}"
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.accuracy:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = {self.rows:.0f}{without})"

    def metrics(self) -> dict[str, float]:
        return {f"eval_{key}": float(value) for key, value in self.flat().items()}

    def flat(self) -> dict[str, float]:
        """Every number that is known, by its name, the task's own beside ours."""
        values = asdict(self)
        return {**values.pop("measured"), **{name: value for name, value in values.items() if value is not None}}


def evaluate(
    port: Port, task: Task, examples: Sequence[Example], *, samples: int = 0
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Greedy accuracy of the current policy, and the first `samples` completions (on rank 0).

    Collective: every rank takes every world_size-th row and makes the same number of generation calls; all ranks return
    the same numbers. Cost: one greedy completion a row. The training RNG is left as it was.
    """
    rank, ranks = port.rank, port.ranks
    kwargs: Any = port.template_kwargs
    if isinstance(task, DialogueTask):
        generate = in_dialogue(lambda part: greedy_dialogues(port, task, part), port.tokenizer, port.end_ids)
    else:
        generate = in_one_turn(lambda ids: generate_greedy(port, ids), port.tokenizer, kwargs, port.end_ids)

    def timed(part: Sequence[Example]) -> Any:
        with port.phases.phase("evaluation"):  # anew for every batch: the watchdog counts from there
            return generate(part)

    with port.phases.phase("evaluation"):
        outcomes, kept = score_greedy(
            timed,
            port.tokenizer,
            task,
            examples[rank::ranks],
            calls=math.ceil(math.ceil(len(examples) / ranks) / port.args.per_device_eval_batch_size),
            batch_size=port.args.per_device_eval_batch_size,
            filler=examples[0],
            template_kwargs=kwargs,
            samples=samples,
        )
        return summarise(gather_object(outcomes)), kept


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
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """What came of each of one rank's rows, and its first `samples` completions.

    `calls`: how often to generate; a rank out of rows completes `filler`, as collective generation needs every rank.
    """
    verify, measure, gold = safe_verify(task), metrics_of(task), safe_text(task, "gold")
    outcomes: list[Outcome] = []
    kept: list[dict[str, Any]] = []
    for start in range(0, calls * batch_size, batch_size):
        part = examples[start : start + batch_size]
        for example, completion in zip(part, generate(part or [filler]), strict=False):
            text = completion.text
            prompt = render_text(tokenizer, example["prompt"], template_kwargs)
            right = verify(with_opened_thought(text, prompt), example["row"])
            effort = example.get("effort")
            outcomes.append(
                Outcome(
                    right=right,
                    tokens=completion.tokens,
                    measured=measure(text, example["row"]),
                    effort=effort,
                    thought=completion.thought if effort else 0,
                )
            )
            if len(kept) < samples:
                kept.append(
                    {
                        "prompt": prompt,
                        "completion": text,
                        "gold": gold(example["row"]),
                        "score": right,
                        "row": storable(example["row"]),
                    }
                )
    return outcomes, kept


def in_one_turn(
    generate: Callable[[list[list[int]]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
    ends: Collection[int] = (),
) -> Generate:
    """From prompts to completions as token ids -> from examples to what was written. `ends`: see `decode`."""

    spell: Callable[[Sequence[int]], Any] = partial(tokenizer.decode, skip_special_tokens=False)

    def complete(examples: Sequence[Example]) -> list[Completion]:
        prompts = [render_ids(tokenizer, example["prompt"], template_kwargs) for example in examples]
        return [
            Completion(
                text=decode(tokenizer, ids, ends),
                ids=ids,
                tokens=len(ids),
                thought=thought_tokens(ids, spell, spell(prompt)),
            )
            for prompt, ids in zip(prompts, generate(prompts), strict=True)
        ]

    return complete


def in_dialogue(
    converse: Callable[[Sequence[Example]], list[tuple[list[int], list[bool]]]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int] = (),
) -> Generate:
    """From examples to dialogues, as token ids and policy masks -> from examples to what was said."""

    def complete(examples: Sequence[Example]) -> list[Completion]:
        return [
            Completion(text=completion_text(tokenizer, ids, own, ends), ids=ids, tokens=sum(own))
            for ids, own in converse(examples)
        ]

    return complete


def summarise(outcomes: Sequence[Outcome]) -> Evaluation:
    """From what came of every row to shares and the interval. A row asked at several efforts counts as one row."""
    efforts = sorted({outcome.effort for outcome in outcomes if outcome.effort})
    times = max(1, len(efforts))
    judged = [outcome.right for outcome in outcomes if outcome.right is not None]
    right, count = sum(judged) / times, len(judged) / times
    low, high = wilson_interval(right, count) if judged else (None, None)
    by_effort = {}
    for effort in efforts:
        at = [outcome for outcome in outcomes if outcome.effort == effort]
        if found := [outcome.right for outcome in at if outcome.right is not None]:
            by_effort[f"effort_{effort_text(effort)}/accuracy"] = fmean(found)
        by_effort[f"effort_{effort_text(effort)}/tokens"] = fmean(outcome.thought for outcome in at)
    numbers = [outcome.measured for outcome in outcomes if outcome.measured is not None]
    names = sorted({name for found in numbers for name in found})
    measured = {name: fmean(found[name] for found in numbers if name in found) for name in names}
    if unmeasured := len(outcomes) - len(numbers):
        measured["metrics_failed"] = float(unmeasured)
    return Evaluation(
        accuracy=right / count if judged else None,
        low=low,
        high=high,
        rows=math.ceil(count),
        mean_length=fmean(outcome.tokens for outcome in outcomes),
        measured=measured | by_effort,
        failed=len(outcomes) - len(judged) or None,
    )
