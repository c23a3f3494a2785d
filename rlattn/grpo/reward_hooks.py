"""Glue: what rewards need of the trainer: their collective calls, their moving weights, their state in a checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import is_async_callable

from rlattn.credit import schedule
from rlattn.credit.advantages import duplicate_share, failure_gap, part_advantages, restrict_to_tokens
from rlattn.errors import UserError, describe
from rlattn.grpo.lagged_policy import LaggedPolicy
from rlattn.grpo.multimodal_prompts import ask
from rlattn.grpo.reward_function import Guarded, GuardedAsync, RewardFunction
from rlattn.grpo.second_rollouts import generate_texts
from rlattn.policy.chat_tokens import completion_text
from rlattn.policy.prompts import without_images
from rlattn.processes.collective import Lockstep
from rlattn.report.alarms import hidden_by_failures
from rlattn.rewards.protocol import lags_of
from rlattn.tasks.rows import storable
from rlattn.types import LARGEST_WEIGHT, Prompt, RewardBatch, Rollout

if TYPE_CHECKING:
    from rlattn.grpo.trainer import AttentionGRPOTrainer

STATE_FILE = "rewards.json"  # in a checkpoint
COMPLETION_KEPT = 20_000  # characters of one that a reward failed on
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """How rewards are combined, beyond TRL's weights. Keys of the mappings are the rewards' names."""

    requires: dict[str, str]
    """Gated reward -> the reward that must be met (at least 1) for it to count."""
    ramps: dict[str, tuple[float, float]]
    """Reward -> warmup and decay of its weight, as shares of the run."""
    max_failed_share: float = 0.05
    """A run stops where a larger share of a batch's rollouts failed under one reward, and more than one of them; with 0
    at the first."""
    on_failure: Callable[[dict[str, Any]], None] | None = None
    """Gets `step`, `reward` and `failed` (how many) of a batch with failures, and of the first of them `problem`,
    `prompt`, `completion` and `row`; on rank 0."""


NO_OPTIONS = RewardOptions(requires={}, ramps={})


def guard(function: Any, name: str) -> Any:
    """A reward function that cannot end a run, by the name that TRL logs; models and what is guarded already stay."""
    if isinstance(function, torch.nn.Module | Guarded):
        return function
    return GuardedAsync(function, name) if is_async_callable(function) else Guarded(function, name)


def bind_rewards(trainer: AttentionGRPOTrainer) -> dict[int, LaggedPolicy]:
    """Gives every reward its collective calls; the lagged policies they share, by how often these are refreshed (0: the
    policy of step 0, which the trainer holds at this point whether or not a checkpoint is loaded later).

    Raises:
        UserError: a reward cannot work in this trainer.
    """
    functions = [function for function in trainer.reward_funcs if isinstance(function, RewardFunction)]
    lags = {lag for function in functions for lag in lags_of(function.reward)}
    if lags and trainer.is_fsdp_enabled:  # it spreads the weights later: a copy would hold what no longer trains
        raise UserError("rewards", "a lagged policy needs whole weights on every rank, which FSDP spreads.", "Use DDP.")
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    lagged = {lag: LaggedPolicy(policy, lag) for lag in sorted(lags)}
    for function in functions:
        reward: Any = function.reward
        if hasattr(reward, "bind"):
            try:
                reward.bind(trainer)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"rewards.{function.__name__}", f"its bind() failed: {describe(error)}.") from None
        if (hasattr(reward, "tokens") or hasattr(reward, "parts")) and trainer.importance_sampling_level == "sequence":
            raise UserError(
                "trainer.importance_sampling_level",
                f"sequence spreads every token's gradient over its rollout, and '{function.__name__}' names tokens.",
                "Use token.",
            )
        function.batch_of = partial(_batch, trainer, lagged.get(getattr(reward, "lag", None) or -1), lagged.get(0))
    return lagged


def weights_now(trainer: AttentionGRPOTrainer, base_K: Tensor, options: RewardOptions) -> Tensor:
    """weights_K of this step: the given ones, times their ramps, times what rewards such as a Lagrangian ask for."""
    weights_K = base_K.clone()
    for k, name in enumerate(trainer.reward_func_names):
        warmup, decay = options.ramps.get(name, (0.0, 0.0))
        weights_K[k] *= schedule(trainer.state.global_step, max(1, trainer.state.max_steps), warmup, decay)
        weights_K[k] *= multiplier_of(trainer.reward_funcs[k])
    return weights_K


def multiplier_of(function: Any) -> float:
    """What a reward multiplies its weight by; 1 where what it says is no finite number."""
    try:
        multiplier = float(getattr(getattr(function, "reward", None), "multiplier", 1.0))
        if abs(multiplier) <= LARGEST_WEIGHT:
            return multiplier
        problem = f"is {multiplier:g}"
    except Exception as error:
        problem = describe(error)
    logger.warning("reward '%s': its multiplier counts as 1: %s", function.__name__, problem)
    return 1.0


def log_counts(trainer: AttentionGRPOTrainer, raw_BK: Tensor, paid_BK: Tensor) -> None:
    """Logs `rewards/<name>/neutral`, `weight` and `failed`, and `failed_gap` where there are failures. Collective.

    Args:
        raw_BK: what was scored, of all ranks; NaN where neutral.
        paid_BK: the same, gated, and neutral entries filled (`failure_gap`).

    Raises:
        UserError: on every rank alike, where more than `max_failed_share` of the rollouts failed under one reward, and
            more than one of them.
    """
    functions, options, rows = trainer.reward_funcs, trainer.reward_options, len(raw_BK)
    counted = raw_BK.isnan().sum(dim=0).tolist(), trainer.reward_weights.tolist()
    for name, neutral, weight in zip(trainer.reward_func_names, *counted, strict=True):
        trainer.log_value(f"rewards/{name}/neutral", neutral)
        trainer.log_value(f"rewards/{name}/weight", weight)
    none = [False] * (rows // trainer.accelerator.num_processes)
    local_KB = torch.tensor([getattr(f, "failed", None) or none for f in functions], device=trainer.args.device)
    failed_BK = trainer.accelerator.gather(local_KB.T.contiguous())
    failed_of = Counter[str]()  # two functions may share a name
    for k, (function, name) in enumerate(zip(functions, trainer.reward_func_names, strict=True)):
        failed = int(failed_BK[:, k].sum())
        failed_of[name] += failed
        if not failed:
            continue
        gap = failure_gap(paid_BK, trainer.reward_weights, failed_BK[:, k])
        if gap is not None:
            trainer.log_value(f"rewards/{name}/failed_gap", gap)
        everyone = gather_object([(getattr(function, "problem", ""), _loggable(getattr(function, "failing", {})))])
        problem, failing = next(first for first in everyone if first[0])
        step = trainer.state.global_step + 1  # the one that is being made
        if options.on_failure and trainer.is_world_process_zero():
            options.on_failure({"step": step, "reward": name, "failed": failed, "problem": problem, **failing})
        if failed > max(options.max_failed_share * rows, float(options.max_failed_share > 0)):
            scored_B = raw_BK[:, k][~raw_BK[:, k].isnan()]
            spread = scored_B.std().item() if len(scored_B) > 1 else None
            raise UserError(
                f"rewards.{name}",
                f"failed for {failed} of {rows} rollouts at step {step}, first with {problem}."
                f"{hidden_by_failures(failed, gap, spread)}",
                "Mend it and start the same command again: it goes on from the last checkpoint, or starts over where "
                "there is none yet. Or allow more: "
                "rewards.max_failed_share. (A key changed in the recipe is named in resume.allow_changed.)",
            )
    for name, failed in failed_of.items():
        trainer.log_value(f"rewards/{name}/failed", failed)


def repeated_share(trainer: AttentionGRPOTrainer, completion_ids: Sequence[Sequence[int]]) -> float:
    """Share of all ranks' rollouts that repeat an earlier one of their group. Collective."""
    local_B = torch.tensor([hash(tuple(map(int, ids))) for ids in completion_ids], device=trainer.args.device)
    return duplicate_share(trainer.accelerator.gather(local_B), trainer._group_size)


def task_numbers(
    trainer: AttentionGRPOTrainer, inputs: Sequence[Any], completion_ids: Sequence[Any], masks: Sequence[Any] | None
) -> dict[str, float]:
    """Means over all ranks of what the task measures of the rollouts; empty where it measures nothing. Collective."""
    measure = trainer.measure
    if not measure:
        return {}
    texts = [
        completion_text(trainer._tokenizer, ids, masks[row] if masks is not None else None)
        for row, ids in enumerate(completion_ids)
    ]
    return mean_by_name([measure(text, example["row"]) for text, example in zip(texts, inputs, strict=True)])


def log_raw_means(trainer: AttentionGRPOTrainer, raw_BK: Tensor) -> None:
    """`rewards/<name>/mean` and `/std` of what was scored: TRL has logged the table in which gates and neutral entries
    count.
    """
    logged = trainer._metrics["train" if trainer._training else "eval"]
    names = trainer.reward_func_names
    for k, name in enumerate(names):
        raw_B, place = raw_BK[:, k], -names[k:].count(name)  # two functions may share a name
        if not torch.equal(raw_B, trainer._rewards_BK[:, k]):
            raw_B = raw_B[~raw_B.isnan()]
            logged[f"rewards/{name}/mean"][place] = raw_B.mean().item()
            logged[f"rewards/{name}/std"][place] = raw_B.std().item() if len(raw_B) > 1 else math.nan


def _loggable(rollout: dict[str, Any]) -> dict[str, Any]:
    """What failures.jsonl keeps of a rollout, and `rlattn score` reads back."""
    if not rollout:
        return {}
    prompt, completion = without_images(rollout["prompt"], keep_marks=True), rollout["completion"][:COMPLETION_KEPT]
    kept = {**rollout, "prompt": prompt, "completion": completion}
    return dict(storable({**kept, "row": storable(kept["row"])} if "row" in kept else kept))


def mean_by_name(numbers: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number over all entries of all ranks that have it and where it is finite. Collective."""
    return means(gather_object(list(numbers)))


def means(entries: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number over the entries that have it and where it is finite; NaN where there are none."""
    names = sorted({name for entry in entries for name in entry})
    values = {name: [entry[name] for entry in entries if math.isfinite(entry.get(name, math.nan))] for name in names}
    return {name: fmean(given) if given else math.nan for name, given in values.items()}


def token_advantages(
    trainer: AttentionGRPOTrainer, advantage_BT: Tensor, contribution_BK: Tensor, rows: slice, mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """The advantages with every reward confined to the tokens it names, and with those of its parts added; and parts_BK
    of all ranks, the size of what the parts added: mean |advantage| over the rollout's tokens. Collective.

    Args:
        contribution_BK: of all ranks; `rows` are this rank's.
        mask_BT: 1 for the tokens that are trained.
    """
    parts_BK = torch.zeros_like(contribution_BK)
    for k, function in enumerate(trainer.reward_funcs):
        if not isinstance(function, RewardFunction):
            continue
        if hasattr(function.reward, "tokens"):
            named_BT = _padded(function.token_masks, advantage_BT)
            advantage_BT = restrict_to_tokens(advantage_BT, contribution_BK[rows, k], named_BT)
        if hasattr(function.reward, "parts"):
            reward: Any = function.reward
            values_BP = advantage_BT.new_full((len(advantage_BT), reward.part_count), torch.nan)
            for row, parts in enumerate(function.parts):
                for p, (value, _) in enumerate(parts):
                    values_BP[row, p] = torch.nan if value is None else value
            scored_BP = part_advantages(trainer.accelerator.gather(values_BP), trainer._group_size)[rows]
            of_parts_BT = torch.zeros_like(advantage_BT)
            for p in range(reward.part_count):
                masks = [parts[p][1] if p < len(parts) else [] for parts in function.parts]
                part_BT = _padded(masks, advantage_BT, missing=False)
                of_parts_BT = of_parts_BT + reward.part_weight * scored_BP[:, p, None] * part_BT
            advantage_BT = advantage_BT + of_parts_BT
            mean_B = (of_parts_BT.abs() * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
            parts_BK[:, k] = trainer.accelerator.gather(mean_B)
    return advantage_BT, parts_BK


def save_rewards(trainer: AttentionGRPOTrainer, lagged: Mapping[int, LaggedPolicy], folder: Path) -> None:
    """The state of rewards and lagged policies, into a checkpoint. One rank only: it is the same on all."""
    states = {}
    for name, function in zip(trainer.reward_func_names, trainer.reward_funcs, strict=True):
        if isinstance(function, RewardFunction) and hasattr(function.reward, "state_dict"):
            try:
                states[name] = json.loads(json.dumps(function.reward.state_dict()))
            except Exception as error:
                logger.warning("reward '%s': its state is not in the checkpoint: %s", name, describe(error))
    if states:
        (folder / STATE_FILE).write_text(json.dumps(states), encoding="utf-8")
    for every, policy in lagged.items():
        if every:
            policy.save(folder / f"lagged-{every}.safetensors")


def load_rewards(trainer: AttentionGRPOTrainer, lagged: Mapping[int, LaggedPolicy], folder: Path) -> None:
    """What `save_rewards` wrote. Raises UserError where a reward does not take its state."""
    file = folder / STATE_FILE
    states = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, function in zip(trainer.reward_func_names, trainer.reward_funcs, strict=True):
        if name in states and isinstance(function, RewardFunction) and hasattr(function.reward, "load_state_dict"):
            try:
                function.reward.load_state_dict(states[name])
            except Exception as error:
                raise UserError(
                    f"rewards.{name}",
                    f"cannot go on from its state in {file}: load_state_dict(): {describe(error)}.",
                    "Give it the code and options that it had, or start anew in another output_dir.",
                ) from None
    for every, policy in lagged.items():
        if (folder / f"lagged-{every}.safetensors").is_file():
            policy.load(folder / f"lagged-{every}.safetensors")


def _batch(
    trainer: AttentionGRPOTrainer, lagged: LaggedPolicy | None, start: LaggedPolicy | None, rollouts: Sequence[Rollout]
) -> tuple[RewardBatch, Lockstep]:
    lockstep = Lockstep(trainer.phases)
    first = trainer.accelerator.process_index * len(rollouts)

    def generate(
        prompts: Sequence[Prompt],
        images: Sequence[Sequence[Any] | None] | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        lagged_policy: bool = False,
        first_policy: bool = False,
    ) -> list[str]:
        # What is wrong with a call is known before the other ranks wait for it.
        for wanted, there, name in ((lagged_policy, lagged, "lag"), (first_policy, start, "first_policy")):
            if wanted and there is None:
                raise ValueError(f"generate: that policy is kept for a reward with the attribute `{name}`")
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(f"generate: max_new_tokens {max_new_tokens}, temperature {temperature}: too small")
        policy = lagged if lagged_policy else start if first_policy else None
        asked = ask(trainer.processing_class, prompts, images)
        settings: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return lockstep.call(lambda: generate_texts(trainer, asked, lagged=policy, **settings))

    batch = RewardBatch(
        rollouts=tuple(
            replace(rollout, group=(first + index) // trainer._group_size) for index, rollout in enumerate(rollouts)
        ),
        step=trainer.state.global_step,
        gather=lockstep.gather,
        generate=generate,
        decode=partial(trainer._tokenizer.decode, skip_special_tokens=False),
        log=trainer.log_value,
    )
    return batch, lockstep


def _padded(masks: Sequence[list[bool] | None], like_BT: Tensor, missing: bool = True) -> Tensor:
    """mask_BT, bool: True throughout a row of None; `missing` past the end of a row."""
    mask_BT = torch.ones_like(like_BT, dtype=torch.bool) if missing else torch.zeros_like(like_BT, dtype=torch.bool)
    for row, mask in enumerate(masks):
        if mask:
            mask_BT[row, : len(mask)] = torch.tensor(mask, dtype=torch.bool, device=mask_BT.device)
    return mask_BT
