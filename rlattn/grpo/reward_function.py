"""Makes a reward the function that TRL calls, and keeps a failing one from ending a run."""

import atexit
import logging
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlattn.errors import describe
from rlattn.policy.chat_tokens import completion_text
from rlattn.policy.prompts import render_text, without_images
from rlattn.processes.collective import Lockstep
from rlattn.rewards.protocol import checked_score, score_safely
from rlattn.rewards.timeout import ScoreWorker
from rlattn.types import Reward, RewardBatch, Rollout, Task

logger = logging.getLogger(__name__)
FAILURES_SHOWN = 3
ONE_A_ROLLOUT = ("prompts", "completions", "completion_ids", "environments")  # of TRL's arguments for a reward
ROLLOUT = "rollout"  # rlattn's own argument, beside TRL's: the rollout, decoded once for all rewards

Part = tuple[float | None, list[bool]]


class Guarded:
    """A reward function of TRL's kind. What raises, is not finite or has the wrong length is neutral and counted.

    Attributes, of the last call: `failed` (one bool a rollout), `problem` (the first one, as text), `failing` (its
    rollout: `prompt`, `completion` and, where a task gave it, `row`).
    """

    def __init__(self, function: Callable[..., Sequence[float | None]], name: str | None = None):
        self.function = function
        self.__name__ = name or getattr(function, "__name__", type(function).__name__)
        self.failed: list[bool] = []
        self.problem = ""
        self.failing: dict[str, Any] = {}
        self.shown = 0

    def __call__(self, *arguments: Any, **inputs: Any) -> list[float | None]:
        try:
            returned: Any = self.function(*arguments, **_of_trl(inputs))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            returned = error
        return self._judged(returned, inputs)

    def _judged(self, returned: Any, inputs: dict[str, Any]) -> list[float | None]:
        """What the function gave, or the error it raised, as one reward a rollout."""
        count = next((len(inputs[key]) for key in ONE_A_ROLLOUT if inputs.get(key) is not None), None)
        try:
            if isinstance(returned, BaseException):
                raise returned
            given = list(returned)
            if count is not None and len(given) != count:
                raise ValueError(f"returned {len(given)} rewards for {count} rollouts")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if count is None:  # called by hand, with none of what says how many rewards are due
                raise
            values: list[float | None] = [None] * count
            problems = [describe(error)] * count
        else:
            checked = [checked_score(value) for value in given]
            values, problems = [value for value, _ in checked], [problem for _, problem in checked]
        prompts, texts = (inputs.get(key) or [""] * len(values) for key in ("prompts", "completions"))
        rollouts = [{"prompt": p, "completion": str(text)} for p, text in zip(prompts, texts, strict=True)]
        return self.report(values, problems, rollouts)

    def report(
        self, values: list[float | None], problems: list[str], rollouts: list[dict[str, Any]]
    ) -> list[float | None]:
        """Counts the failures, shows the first few with their rollout, and hands the values on."""
        self.failed = [bool(problem) for problem in problems]
        failures = [found for found in zip(problems, rollouts, strict=True) if found[0]]
        self.problem, self.failing = failures[0] if failures else ("", {})
        for problem, rollout in failures[: max(0, FAILURES_SHOWN - self.shown)]:
            self.shown += 1
            text = rollout["completion"][:200]
            logger.warning("reward '%s' is neutral where it fails: %s, on %r", self.__name__, problem, text)
        return values


class GuardedAsync(Guarded):
    """One that TRL awaits beside the others: a coroutine function, or an object with such a `__call__`."""

    async def __call__(self, *arguments: Any, **inputs: Any) -> list[float | None]:  # type: ignore[override]
        try:
            returned: Any = await self.function(*arguments, **_of_trl(inputs))  # type: ignore[misc]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            returned = error
        return self._judged(returned, inputs)


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
        self.ends: Collection[int] = ()  # set by the trainer: what ends a completion besides the tokenizer's own
        # set by the trainer: this rank's rollouts -> a batch with the collective calls
        self.batch_of: Callable[[Sequence[Rollout]], tuple[RewardBatch, Lockstep]] | None = None

    def __call__(self, prompts: list, **inputs: Any) -> list[float | None]:  # type: ignore[override]
        rollouts = inputs.get(ROLLOUT) or self.rollouts_of(prompts, inputs["completion_ids"], None, inputs["row"])
        rollouts = [one if one.task is self.task else replace(one, task=self.task) for one in rollouts]
        problem = ""
        if hasattr(self.reward, "prepare") and self.batch_of:
            rollouts, problem = self._prepared(*self.batch_of(rollouts))
        if problem:
            results: list[tuple[float | None, str]] = [(None, problem)] * len(rollouts)
        elif self.worker:
            results = self.worker.score(rollouts)
        else:
            results = [score_safely(self.reward, rollout) for rollout in rollouts]
        values, problems = [value for value, _ in results], [problem for _, problem in results]
        self.token_masks, self.parts = [], []
        for place, rollout in enumerate(rollouts):
            mask, parts, problem = self._spoken_for(rollout)
            self.token_masks.append(mask)
            self.parts.append(parts)
            if problem:
                values[place], problems[place] = None, problem
        told = [{"prompt": r.prompt, "completion": r.completion, "row": r.row} for r in rollouts]
        return self.report(values, problems, told)

    def _prepared(self, batch: RewardBatch, lockstep: Lockstep) -> tuple[list[Rollout], str]:
        """The rollouts with their notes, and what went wrong on any rank; the state is then as it was."""
        reward: Any = self.reward
        before, notes, problem = None, [], ""
        try:
            before = deepcopy(reward.state_dict()) if hasattr(reward, "state_dict") else None
            notes = list(reward.prepare(batch))
            if len(notes) != len(batch.rollouts):
                raise ValueError(f"prepare() returned {len(notes)} notes for {len(batch.rollouts)} rollouts")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problem = describe(error)
        problem = lockstep.finish(problem)
        if not problem:
            return [replace(rollout, note=note) for rollout, note in zip(batch.rollouts, notes, strict=True)], ""
        if before is not None:
            try:
                reward.load_state_dict(before)
            except Exception as error:
                problem += f"; and load_state_dict(): {describe(error)}"
        return list(batch.rollouts), f"prepare() failed: {problem}"

    def rollouts_of(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[list[int]],
        masks: Sequence[list[bool] | None] | None,
        rows: Sequence[dict],
        groups: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Prompts and completions as every reward of this task reads them.

        Args:
            masks: of each completion, the tokens that the policy wrote; None where it wrote all.
            groups: of each rollout, the number of its group.
        """
        texts: dict[str, tuple[str, str]] = {}  # a prompt comes once for each rollout of its group
        rollouts = []
        masks, groups = masks or [None] * len(prompts), groups or [0] * len(prompts)
        for prompt, ids, mask, row, group in zip(prompts, completion_ids, masks, rows, groups, strict=True):
            key = str(prompt)
            if key not in texts:
                texts[key] = self._rendered(prompt)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    prompt_text=texts[key][0],
                    blind_text=texts[key][1],
                    completion=completion_text(self.tokenizer, ids, mask, self.ends),
                    completion_ids=tuple(ids),
                    policy_mask=tuple(mask or ()),
                    row=row,
                    task=self.task,
                    group=group,
                )
            )
        return rollouts

    def _rendered(self, prompt: Any) -> tuple[str, str]:
        """As the policy read it, and without its images."""
        text = render_text(self.tokenizer, prompt, self.template_kwargs)
        blind = without_images(prompt)
        return text, render_text(self.tokenizer, blind, self.template_kwargs) if blind != prompt else ""

    def _spoken_for(self, rollout: Rollout) -> tuple[list[bool] | None, list[Part], str]:
        """The tokens and the parts that the reward names, and what went wrong; all tokens and no parts then."""
        length = len(rollout.completion_ids)
        reward: Any = self.reward
        try:
            mask = reward.tokens(rollout) if hasattr(reward, "tokens") else None
            mask = None if mask is None else _flags(mask, length)
            parts = list(reward.parts(rollout)) if hasattr(reward, "parts") else []
            if len(parts) > reward_parts(reward):
                raise ValueError(f"gave {len(parts)} parts, its part_count is {reward_parts(reward)}")
            return mask, [(_finite(value), _flags(part_mask, length)) for value, part_mask in parts], ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return None, [], f"its tokens or parts: {describe(error)}"


def _of_trl(inputs: dict[str, Any]) -> dict[str, Any]:
    """What TRL itself hands to a reward function, which need not take more."""
    return {name: value for name, value in inputs.items() if name != ROLLOUT}


def reward_parts(reward: Any) -> int:
    return int(getattr(reward, "part_count", 0))


def _flags(mask: Any, length: int) -> list[bool]:
    flags = list(mask)
    if len(flags) != length or not all(isinstance(flag, bool | int) for flag in flags):
        raise ValueError(f"expected {length} of True or False, one a token")
    return [bool(flag) for flag in flags]


def _finite(value: Any) -> float | None:
    number, problem = checked_score(value)
    if problem:
        raise ValueError(f"a part's value {problem}")
    return number
