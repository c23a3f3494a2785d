"""Glue: a reward as the function that TRL calls."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlattn.prompts import decode, render_text
from rlattn.rewards import Reward, score_safely
from rlattn.tasks import Task
from rlattn.types import Rollout

logger = logging.getLogger(__name__)
FAILURES_SHOWN = 3


def reward_function(
    name: str, reward: Reward, task: Task, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]
) -> Callable[..., list[float | None]]:
    """TRL's view of a reward. A rollout whose score raises or is not finite is neutral; the first are shown."""
    shown = 0

    def score(prompts: list, completion_ids: list[list[int]], row: list[dict], **_: Any) -> list[float | None]:
        nonlocal shown
        texts: dict[str, str] = {}  # a prompt comes once for each rollout of its group
        scores: list[float | None] = []
        for prompt, ids, one_row in zip(prompts, completion_ids, row, strict=True):
            key = str(prompt)
            if key not in texts:
                texts[key] = render_text(tokenizer, prompt, template_kwargs)
            rollout = Rollout(
                prompt=prompt,
                prompt_text=texts[key],
                completion=decode(tokenizer, ids),
                completion_ids=tuple(ids),
                row=one_row,
                task=task,
            )
            value, problem = score_safely(reward, rollout)
            if problem and shown < FAILURES_SHOWN:
                shown += 1
                logger.warning(
                    "reward '%s' is neutral where it fails: %s, on %r", name, problem, rollout.completion[:200]
                )
            scores.append(value)
        return scores

    score.__name__ = name
    return score
