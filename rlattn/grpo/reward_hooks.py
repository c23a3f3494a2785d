"""What rewards need around TRL's calls: rollouts decoded once, weights that move, failures counted, state kept.

Legend: B rollouts of all ranks, T completion tokens, K rewards, P parts of a reward.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import is_async_callable

from rlattn.credit import apply_credit, schedule
from rlattn.credit.advantages import (
    Combine,
    RewardTable,
    Scale,
    contributions,
    duplicate_share,
    failure_gap,
    group_advantages,
    part_advantages,
    restrict_to_tokens,
    reward_table,
    silent_groups,
    table_metrics,
)
from rlattn.errors import UserError, describe
from rlattn.formats.strict_json import finite, to_json
from rlattn.grpo.lagged_policy import LaggedPolicy
from rlattn.grpo.masks import mask_tensor
from rlattn.grpo.port import Port
from rlattn.grpo.reward_batch import reward_batch
from rlattn.grpo.reward_function import ROLLOUT, Guarded, GuardedAsync, RewardFunction
from rlattn.policy.chat_tokens import completion_text
from rlattn.policy.prompts import without_images
from rlattn.report.alarms import hidden_by_failures
from rlattn.rewards.protocol import lags_of
from rlattn.statistics import means
from rlattn.tasks.guarded_metrics import Safe
from rlattn.tasks.rows import storable
from rlattn.types import LARGEST_WEIGHT

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


class RewardHooks:
    """Owns what rewards need besides TRL: options, lagged policies, and the rollouts of the batch at hand.

    Attributes:
        lagged: the policies that second rollouts come from, by how often they are refreshed (0: the policy of step 0).
    """

    def __init__(self, port: Port, options: RewardOptions = NO_OPTIONS, measure: Safe[dict[str, float]] | None = None):
        self._port, self._options, self._measure = port, options, measure
        self._base_weights_K: Tensor | None = None
        self.lagged: dict[int, LaggedPolicy] = {}

    def bind(self, trainer: Any) -> None:
        """Gives every reward its collective calls. The policy of step 0 is the one that is there now, whether or not a
        checkpoint is loaded later.

        Raises:
            UserError: a reward cannot work in this trainer.
        """
        port = self._port
        functions = [function for function in port.reward_funcs if isinstance(function, RewardFunction)]
        lags = {lag for function in functions for lag in lags_of(function.reward)}
        if lags and port.is_fsdp:  # it spreads the weights later: a copy would hold what no longer trains
            problem = "a lagged policy needs whole weights on every rank, which FSDP spreads."
            raise UserError("rewards", problem, "Use DDP.")
        self.lagged = {lag: LaggedPolicy(port.policy, lag) for lag in sorted(lags)}
        for function in functions:
            reward: Any = function.reward
            if hasattr(reward, "bind"):
                try:
                    reward.bind(trainer)
                except UserError:
                    raise
                except Exception as error:
                    raise UserError(f"rewards.{function.__name__}", f"its bind() failed: {describe(error)}.") from None
            if (hasattr(reward, "tokens") or hasattr(reward, "parts")) and port.sequence_ratio:
                raise UserError(
                    "trainer.importance_sampling_level",
                    f"sequence spreads each token's gradient over its rollout, and '{function.__name__}' names tokens.",
                    "Use token.",
                )
            lagged = self.lagged.get(getattr(reward, "lag", None) or -1)
            function.ends = port.end_ids
            function.batch_of = partial(reward_batch, port, lagged, self.lagged.get(0))

    def with_rollouts(
        self, inputs: Sequence[Any], prompts: Sequence[Any], completion_ids: Any, own_masks: Any
    ) -> list[Any]:
        """TRL's inputs with a Rollout beside each, decoded once for all rewards that read one."""
        for lagged in self.lagged.values():
            lagged.refresh(self._port.step)
        function = next((one for one in self._port.reward_funcs if isinstance(one, RewardFunction)), None)
        if function is None:
            return list(inputs)
        masks = [None if own_masks is None else [bool(own) for own in mask] for mask in own_masks or inputs]
        first, size = self._port.rank * len(inputs), self._port.group_size
        groups = [(first + index) // size for index in range(len(inputs))]
        rows = [example["row"] for example in inputs]
        rollouts = function.rollouts_of(prompts, completion_ids, masks, rows, groups)
        return [{**example, ROLLOUT: rollout} for example, rollout in zip(inputs, rollouts, strict=True)]

    def table(self, raw_BK: Tensor, inputs: Sequence[Any], completion_ids: Any, own_masks: Any) -> RewardTable:
        """The rewards of all ranks as they count, with this step's weights; logs what they did. Collective.

        Raises:
            UserError: on every rank alike, where more than `max_failed_share` of the rollouts failed under one reward,
                and more than one of them.
        """
        port, names = self._port, self._port.reward_names
        port.log("completions/duplicates", self._repeated_share(completion_ids))
        gates = {names.index(gated): names.index(required) for gated, required in self._options.requires.items()}
        table = reward_table(raw_BK, gates, self._weights_now(), port.group_size)
        self._log_counts(table)
        for name, value in self._task_numbers(inputs, completion_ids, own_masks).items():
            port.log(f"task/{name}", value)
        return table

    def _weights_now(self) -> Tensor:
        """weights_K of this step: the given ones times their ramps, times what rewards such as a Lagrangian ask for."""
        port = self._port
        if self._base_weights_K is None:
            self._base_weights_K = port.reward_weights_K
        weights_K = self._base_weights_K.clone()
        for k, name in enumerate(port.reward_names):
            warmup, decay = self._options.ramps.get(name, (0.0, 0.0))
            weights_K[k] *= schedule(port.step, port.max_steps, warmup, decay)
            weights_K[k] *= multiplier_of(port.reward_funcs[k])
        return weights_K

    def _log_counts(self, table: RewardTable) -> None:
        """Logs `rewards/<name>/neutral`, `weight`, `failed`, and `failed_gap` where there are failures. Collective."""
        port, options, names = self._port, self._options, self._port.reward_names
        raw_BK, rows = table.raw_BK, len(table.raw_BK)
        for name, neutral, weight in zip(names, raw_BK.isnan().sum(dim=0).tolist(), table.weights_K.tolist()):
            port.log(f"rewards/{name}/neutral", neutral)
            port.log(f"rewards/{name}/weight", weight)
        none = [False] * (rows // port.ranks)
        local_KB = torch.tensor([getattr(f, "failed", None) or none for f in port.reward_funcs], device=port.device)
        failed_BK = port.gather(local_KB.T.contiguous())
        failed_of = Counter[str]()  # two functions may share a name
        for k, (function, name) in enumerate(zip(port.reward_funcs, names, strict=True)):
            failed = int(failed_BK[:, k].sum())
            failed_of[name] += failed
            if not failed:
                continue
            gap = failure_gap(table.used_BK, table.weights_K, failed_BK[:, k])
            if gap is not None:
                port.log(f"rewards/{name}/failed_gap", gap)
            everyone = gather_object([(getattr(function, "problem", ""), _loggable(getattr(function, "failing", {})))])
            problem, failing = next(first for first in everyone if first[0])
            step = port.step + 1  # the one that is being made
            if options.on_failure and port.is_main:
                options.on_failure({"step": step, "reward": name, "failed": failed, "problem": problem, **failing})
            if failed > max(options.max_failed_share * rows, float(options.max_failed_share > 0)):
                scored_B = raw_BK[:, k][~raw_BK[:, k].isnan()]
                spread = scored_B.std().item() if len(scored_B) > 1 else None
                raise UserError(
                    f"rewards.{name}",
                    f"failed for {failed} of {rows} rollouts at step {step}, first with {problem}."
                    f"{hidden_by_failures(failed, gap, spread)}",
                    "Mend it and start the same command again: it goes on from the last checkpoint, or starts over "
                    "where there is none yet. Or allow more: rewards.max_failed_share. (A key changed in the recipe is "
                    "named in resume.allow_changed.)",
                )
        for name, failed in failed_of.items():
            port.log(f"rewards/{name}/failed", failed)

    def _repeated_share(self, completion_ids: Sequence[Sequence[int]]) -> float:
        """Share of all ranks' rollouts that repeat an earlier one of their group. Collective."""
        local_B = torch.tensor([hash(tuple(map(int, ids))) for ids in completion_ids], device=self._port.device)
        return duplicate_share(self._port.gather(local_B), self._port.group_size)

    def _task_numbers(self, inputs: Sequence[Any], completion_ids: Any, own_masks: Any) -> dict[str, float]:
        """Means over all ranks of what the task measures of the rollouts; empty where it measures nothing.

        `metrics_failed` says on how many it failed, if on any. Collective.
        """
        measure, port = self._measure, self._port
        if not measure:
            return {}
        texts = [
            example[ROLLOUT].completion
            if ROLLOUT in example
            else completion_text(port.tokenizer, ids, own_masks[row] if own_masks is not None else None, port.end_ids)
            for row, (example, ids) in enumerate(zip(inputs, completion_ids, strict=True))
        ]
        entries = gather_object([measure(text, example["row"]) for text, example in zip(texts, inputs, strict=True)])
        failed = entries.count(None)
        return means([entry or {} for entry in entries]) | ({"metrics_failed": float(failed)} if failed else {})

    def _log_raw_means(self, table: RewardTable) -> None:
        """`rewards/<name>/mean` and `/std` of what was scored: TRL has logged the table in which gates and neutral
        entries count.
        """
        names = self._port.reward_names
        for k, name in enumerate(names):
            raw_B, place = table.raw_BK[:, k], -names[k:].count(name)  # two functions may share a name
            if not torch.equal(raw_B, table.used_BK[:, k]):
                raw_B = raw_B[~raw_B.isnan()]
                self._port.log_instead(f"rewards/{name}/mean", raw_B.mean().item(), place)
                self._port.log_instead(f"rewards/{name}/std", raw_B.std().item() if len(raw_B) > 1 else math.nan, place)

    def advantages(
        self, table: RewardTable, completion_mask_BT: Tensor, own_masks: Any, *, combine: Combine, scale: Scale
    ) -> Tensor:
        """advantage_BT of this rank's rollouts; (B, 1) where TRL's loss has one ratio a rollout: (B, T) would round.

        Logs what each reward did. Collective.
        """
        port, given = self._port, (table.used_BK, table.weights_K, table.group_size)
        advantage_B = group_advantages(*given, combine=combine, scale=scale)
        contribution_BK = contributions(*given, combine=combine, scale=scale)
        local, length = completion_mask_BT.shape
        rows = slice(port.rank * local, (port.rank + 1) * local)
        ones_BT = advantage_B.new_ones(local, 1 if port.sequence_ratio else length)
        mask_BT = completion_mask_BT * mask_tensor(own_masks, completion_mask_BT, missing=False)
        advantage_BT = apply_credit(advantage_B[rows], ones_BT)
        advantage_BT, parts_BK = self._token_advantages(advantage_BT, contribution_BK, rows, mask_BT)
        size_BK = contribution_BK.abs() + parts_BK
        found = table_metrics(table.used_BK, size_BK, table.group_size, port.reward_names)
        found["groups_without_signal"] = silent_groups(*given, parts_BK)
        for name, value in found.items():
            port.log(name, value)
        self._log_raw_means(table)
        return advantage_BT

    def _token_advantages(
        self, advantage_BT: Tensor, contribution_BK: Tensor, rows: slice, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The advantages with every reward confined to the tokens it names, and with those of its parts added; and
        parts_BK of all ranks, the size of what the parts added: mean |advantage| over the rollout's tokens. Collective.

        Args:
            contribution_BK: of all ranks; `rows` are this rank's.
            mask_BT: 1 for the tokens that are trained.
        """
        port = self._port
        parts_BK = torch.zeros_like(contribution_BK)
        for k, function in enumerate(port.reward_funcs):
            if not isinstance(function, RewardFunction):
                continue
            if hasattr(function.reward, "tokens"):
                named_BT = mask_tensor(function.token_masks, advantage_BT)
                advantage_BT = restrict_to_tokens(advantage_BT, contribution_BK[rows, k], named_BT)
            if hasattr(function.reward, "parts"):
                reward: Any = function.reward
                values_BP = advantage_BT.new_full((len(advantage_BT), reward.part_count), torch.nan)
                for row, parts in enumerate(function.parts):
                    for p, (value, _) in enumerate(parts):
                        values_BP[row, p] = torch.nan if value is None else value
                scored_BP = part_advantages(port.gather(values_BP), port.group_size)[rows]
                of_parts_BT = torch.zeros_like(advantage_BT)
                for p in range(reward.part_count):
                    masks = [parts[p][1] if p < len(parts) else [] for parts in function.parts]
                    part_BT = mask_tensor(masks, advantage_BT, missing=False)
                    of_parts_BT = of_parts_BT + reward.part_weight * scored_BP[:, p, None] * part_BT
                advantage_BT = advantage_BT + of_parts_BT
                mean_B = (of_parts_BT.abs() * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
                parts_BK[:, k] = port.gather(mean_B)
        return advantage_BT, parts_BK

    def save(self, folder: Path) -> None:
        """The state of rewards and lagged policies, into a checkpoint. One rank only: it is the same on all."""
        states = {}
        for name, function in self._with_state("state_dict"):
            try:
                state = json.loads(json.dumps(function.reward.state_dict()))
            except Exception as error:
                logger.warning("reward '%s': its state is not in the checkpoint: %s", name, describe(error))
                continue
            states[name] = finite(state)
            if states[name] != state:
                problem = "its state holds a number that is not finite; a run that goes on gets None for it"
                logger.warning("reward '%s': %s", name, problem)
        if states:
            (folder / STATE_FILE).write_text(to_json(states), encoding="utf-8")
        for every, policy in self.lagged.items():
            if every:
                policy.save(folder / f"lagged-{every}.safetensors")

    def load(self, folder: Path) -> None:
        """What `save` wrote. Raises UserError where a reward does not take its state."""
        file = folder / STATE_FILE
        states = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name, function in self._with_state("load_state_dict"):
            if name not in states:
                continue
            try:
                function.reward.load_state_dict(states[name])
            except Exception as error:
                raise UserError(
                    f"rewards.{name}",
                    f"cannot go on from its state in {file}: load_state_dict(): {describe(error)}.",
                    "Give it the code and options that it had, or start anew in another output_dir.",
                ) from None
        for every, policy in self.lagged.items():
            if (folder / f"lagged-{every}.safetensors").is_file():
                policy.load(folder / f"lagged-{every}.safetensors")

    def _with_state(self, method: str) -> list[tuple[str, Any]]:
        functions = zip(self._port.reward_names, self._port.reward_funcs, strict=True)
        return [(n, f) for n, f in functions if isinstance(f, RewardFunction) and hasattr(f.reward, method)]


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


def _loggable(rollout: dict[str, Any]) -> dict[str, Any]:
    """What failures.jsonl keeps of a rollout, and `rlattn score` reads back."""
    if not rollout:
        return {}
    prompt, completion = without_images(rollout["prompt"], keep_marks=True), rollout["completion"][:COMPLETION_KEPT]
    kept = {**rollout, "prompt": prompt, "completion": completion}
    return dict(storable({**kept, "row": storable(kept["row"])} if "row" in kept else kept))
