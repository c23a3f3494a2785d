"""What a reward's collective `prepare` may do with the rollouts of a generation batch: gather, and generate again."""

from collections.abc import Sequence
from typing import Any

from rlattn.grpo.lagged_policy import LaggedPolicy
from rlattn.grpo.multimodal_prompts import ask
from rlattn.grpo.port import Port
from rlattn.grpo.second_rollouts import generate_texts
from rlattn.processes.collective import Lockstep
from rlattn.types import Prompt, RewardBatch, Rollout


def reward_batch(
    port: Port, lagged: LaggedPolicy | None, first: LaggedPolicy | None, rollouts: Sequence[Rollout]
) -> tuple[RewardBatch, Lockstep]:
    """This rank's rollouts with their collective calls, and what keeps the ranks in step while they are made.

    Args:
        lagged: the policy that the reward's `lag` asks for.
        first: the policy of step 0, where its `first_policy` asks for it.
    """
    lockstep = Lockstep(port.phases)

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
        for wanted, there, name in ((lagged_policy, lagged, "lag"), (first_policy, first, "first_policy")):
            if wanted and there is None:
                raise ValueError(f"generate: that policy is kept for a reward with the attribute `{name}`")
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(f"generate: max_new_tokens {max_new_tokens}, temperature {temperature}: too small")
        policy = lagged if lagged_policy else first if first_policy else None
        asked = ask(port.processor, prompts, images)
        settings: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return lockstep.call(lambda: generate_texts(port, asked, lagged=policy, **settings))

    batch = RewardBatch(
        rollouts=tuple(rollouts),
        step=port.step,
        gather=lockstep.gather,
        generate=generate,
        decode=lambda ids: str(port.tokenizer.decode(list(ids), skip_special_tokens=False)),
        log=port.log,
    )
    return batch, lockstep
