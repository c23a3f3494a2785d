"""Glue: the only TRL subclass. It carries tensors between TRL and the pure modules; no arithmetic of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList
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
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        return [self._without_padding(ids) for ids in completion_ids], logprobs

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
        """Adds a stopping criterion to the policy's generate, which TRL calls without one.

        transformers' own `stop_strings` cannot read every tokenizer; decoding the last few tokens can.
        """
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        generate: Callable = policy.generate
        tail = max(len(text) for text in self.stop_strings) + 1  # a token has at least one character

        def generate_until(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            prompt_length = input_ids.shape[1]

            def stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                texts = self._tokenizer.batch_decode(ids[:, max(prompt_length, ids.shape[1] - tail) :])
                ends = [any(stop in text for stop in self.stop_strings) for text in texts]
                return torch.tensor(ends, device=ids.device)

            return generate(*args, input_ids=input_ids, stopping_criteria=StoppingCriteriaList([stopped]), **kwargs)

        policy.generate = generate_until
        try:
            yield
        finally:
            del policy.generate

    def _without_padding(self, ids: list[int]) -> list[int]:
        """TRL cuts a completion after its end token; one that a stop string ended has padding there instead."""
        pad = self._tokenizer.pad_token_id
        end = len(ids)
        while end > 1 and ids[end - 1] == pad and pad not in self.eos_token_ids:
            end -= 1
        return ids[:end]
