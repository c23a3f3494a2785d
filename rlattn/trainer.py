"""Glue: the only TRL subclass. It carries tensors between TRL and the pure modules; no arithmetic of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from trl import GRPOTrainer

from rlattn.advantages import fill_neutral, group_advantages, token_advantages

COMBINE = {"sum_then_normalize": "sum", "normalize_then_sum": "decoupled"}  # TRL's names, ours


class AttentionGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with per-token advantages; a drop-in, all of GRPOTrainer's arguments as they are.

    A reward of `None` is neutral: it takes the mean of that reward over the rest of its group, where TRL counts it as 0
    whenever another reward speaks. Without `None`, training is TRL's bit for bit.

    Args:
        stop_strings: texts that end a completion, besides the end-of-sequence token (transformers generation).
    """

    def __init__(self, *args: Any, stop_strings: tuple[str, ...] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop_strings = tuple(stop_strings)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards_BK = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, neutral in zip(self.reward_func_names, rewards_BK.isnan().sum(dim=0).tolist(), strict=True):
            self._metrics["train" if self._training else "eval"][f"rewards/{name}/neutral"].append(neutral)
        # TRL normalises this table for its logs, we for the loss: both must see the same one.
        self._rewards_BK = fill_neutral(rewards_BK, self._group_size)
        return self._rewards_BK

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        advantage_B = group_advantages(
            self._rewards_BK,
            self.reward_weights,
            self._group_size,
            combine=COMBINE[self.multi_objective_aggregation],  # type: ignore[arg-type]
            scale=self.scale_rewards,  # type: ignore[arg-type]
        )
        local = out["completion_ids"].shape[0]
        start = self.accelerator.process_index * local
        weights_BT = torch.ones_like(out["completion_mask"], dtype=advantage_B.dtype)
        if self.importance_sampling_level == "sequence":
            weights_BT = weights_BT[:, :1]  # one ratio a rollout: TRL's loss is (B, 1) there, and rounds otherwise
        return {**out, "advantages": token_advantages(advantage_B[start : start + local], weights_BT)}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.stop_strings or self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        with self._stopping():
            return super()._generate_single_turn(*args, **kwargs)

    @property
    def _training(self) -> bool:
        assert self.model is not None
        return self.model.training

    @property
    def _group_size(self) -> int:
        size = self.num_generations if self._training else self.num_generations_eval
        assert size is not None
        return size

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        # transformers needs the tokenizer beside `stop_strings`, and TRL's call to generate does not pass it.
        model = self.accelerator.unwrap_model(self.model_wrapped)
        generate: Callable = model.generate
        self.generation_config.stop_strings = list(self.stop_strings)
        model.generate = partial(generate, tokenizer=self._tokenizer)
        try:
            yield
        finally:
            del model.generate
            self.generation_config.stop_strings = None
