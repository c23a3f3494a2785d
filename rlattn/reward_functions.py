"""Glue: a reward as the function that TRL calls, and the guard that keeps a failing one from ending a run."""

import atexit
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlattn.dialogues import completion_text
from rlattn.errors import describe
from rlattn.prompts import render_text
from rlattn.rewards import Reward, score_safely
from rlattn.rewards.worker import ScoreWorker
from rlattn.tasks import Task
from rlattn.types import RewardBatch, Rollout

logger = logging.getLogger(__name__)
FAILURES_SHOWN = 3

Part = tuple[float | None, list[bool]]


class Guarded:
    """A reward function of TRL's kind. What raises, is not finite or has the wrong length is neutral and counted.

    Attributes, of the last call: `failed` (one bool a rollout), `problem` (the first one, as text).
    """

    def __init__(self, function: Callable[..., Sequence[float | None]], name: str | None = None):
        self.function = function
        self.__name__ = name or getattr(function, "__name__", type(function).__name__)
        self.failed: list[bool] = []
        self.problem = ""
        self.shown = 0

    def __call__(self, prompts: list, **inputs: Any) -> list[float | None]:
        try:
            returned = list(self.function(prompts=prompts, **inputs))
            if len(returned) != len(prompts):
                raise ValueError(f"returned {len(returned)} rewards for {len(prompts)} rollouts")
        except Exception as error:
            returned, problems = [None] * len(prompts), [describe(error)] * len(prompts)
        else:
            checked = [score_safely(_Given(value), None) for value in returned]  # type: ignore[arg-type]
            returned, problems = [value for value, _ in checked], [problem for _, problem in checked]
        texts = inputs.get("completions") or [""] * len(prompts)
        return self.report(returned, problems, [str(text) for text in texts])

    def report(self, values: list[float | None], problems: list[str], texts: list[str]) -> list[float | None]:
        """Counts the failures, shows the first few with their rollout, and hands the values on."""
        self.failed = [bool(problem) for problem in problems]
        self.problem = next(filter(None, problems), "")
        for problem, text in zip(problems, texts, strict=True):
            if problem and self.shown < FAILURES_SHOWN:
                self.shown += 1
                logger.warning("reward '%s' is neutral where it fails: %s, on %r", self.__name__, problem, text[:200])
        return values


class RewardFunction(Guarded):
    """A reward of rlattn's protocol (`rlattn/rewards/__init__.py`) as the function that TRL calls.

    Attributes, of the last call: `token_masks` and `parts`, one entry a rollout, where the reward gives them.
    """

    def __init__(
        self,
        name: str,
        reward: Reward,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: dict[str, Any],
        timeout: float | None = None,
    ):
        super().__init__(reward.score, name)  # type: ignore[arg-type]
        self.reward, self.task, self.tokenizer, self.template_kwargs = reward, task, tokenizer, template_kwargs
        self.worker = ScoreWorker(reward, timeout) if timeout else None
        if self.worker:
            atexit.register(self.worker.stop)
        self.token_masks: list[list[bool] | None] = []
        self.parts: list[list[Part]] = []
        # set by the trainer: this rank's rollouts -> a batch with the collective calls
        self.batch_of: Callable[[Sequence[Rollout]], RewardBatch] | None = None

    def __call__(self, prompts: list, **inputs: Any) -> list[float | None]:
        masks = inputs.get("policy_mask") or [None] * len(prompts)
        rollouts = self._rollouts(prompts, inputs["completion_ids"], masks, inputs["row"])
        problem = ""
        if hasattr(self.reward, "prepare") and self.batch_of:
            batch = self.batch_of(rollouts)
            try:
                notes = list(self.reward.prepare(batch))
                if len(notes) != len(rollouts):
                    raise ValueError(f"prepare() returned {len(notes)} notes for {len(rollouts)} rollouts")
                rollouts = [replace(rollout, note=note) for rollout, note in zip(batch.rollouts, notes)]
            except Exception as error:
                problem = f"prepare() failed: {describe(error)}"
        if problem:
            results: list[tuple[float | None, str]] = [(None, problem)] * len(rollouts)
        elif self.worker:
            results = self.worker.score(rollouts)
        else:
            results = [score_safely(self.reward, rollout) for rollout in rollouts]
        self.token_masks = [self._tokens(rollout) for rollout in rollouts] if hasattr(self.reward, "tokens") else []
        self.parts = [self._parts(rollout) for rollout in rollouts] if hasattr(self.reward, "parts") else []
        values, problems = [value for value, _ in results], [problem for _, problem in results]
        return self.report(values, problems, [rollout.completion for rollout in rollouts])

    def _rollouts(
        self, prompts: list, completion_ids: list[list[int]], masks: list[list[bool] | None], rows: list[dict]
    ) -> list[Rollout]:
        texts: dict[str, str] = {}  # a prompt comes once for each rollout of its group
        rollouts = []
        for prompt, ids, mask, row in zip(prompts, completion_ids, masks, rows, strict=True):
            key = str(prompt)
            if key not in texts:
                texts[key] = render_text(self.tokenizer, prompt, self.template_kwargs)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    prompt_text=texts[key],
                    completion=completion_text(self.tokenizer, ids, mask),
                    completion_ids=tuple(ids),
                    policy_mask=tuple(mask or ()),
                    row=row,
                    task=self.task,
                )
            )
        return rollouts

    def _tokens(self, rollout: Rollout) -> list[bool] | None:
        """The tokens that the reward names; all of them where it fails to name one flag a token."""
        try:
            mask = self.reward.tokens(rollout)  # type: ignore[attr-defined]
            return mask if mask is None or len(mask) == len(rollout.completion_ids) else None
        except Exception:
            return None

    def _parts(self, rollout: Rollout) -> list[Part]:
        try:
            parts = list(self.reward.parts(rollout))  # type: ignore[attr-defined]
            sound = all(len(mask) == len(rollout.completion_ids) for _, mask in parts)
            return parts[: self.reward.part_count] if sound else []  # type: ignore[attr-defined]
        except Exception:
            return []


class _Given:
    """A value that is there already, so that one place judges what is a finite number."""

    def __init__(self, value: Any):
        self.value = value

    def score(self, rollout: Any) -> Any:
        return self.value
