"""Generates outside the training batch, through TRL's own path, so that every backend it has works here too."""

from __future__ import annotations

import copy
import random
from collections import Counter
from contextlib import nullcontext
from typing import Any

from accelerate.utils import gather_object

from rlattn.grpo.lagged_policy import LaggedPolicy
from rlattn.grpo.multimodal_prompts import Asked
from rlattn.grpo.port import Port
from rlattn.policy.prompts import decode


def generate_greedy(port: Port, prompt_ids: list[list[int]]) -> list[list[int]]:
    """One greedy completion a prompt, as token ids, from the current policy.

    Collective: every rank makes the same number of calls. The training RNG and the trainer's mode stay as they were.
    """
    with port.apart(), port.settings(temperature=0.0):
        return _written(port, prompt_ids)[0]


def generate_turn(
    port: Port, prompt_ids: list[list[int]], *, max_new_tokens: int, greedy: bool
) -> tuple[list[list[int]], list[list[float]] | None]:
    """One turn a prompt, and its log-probabilities under vLLM: as training samples it, or greedy and apart from it.

    Collective: every rank makes the same number of calls.
    """
    temperature = 0.0 if greedy else port.temperature
    with (
        port.apart() if greedy else nullcontext(),
        port.settings(temperature=temperature, max_new_tokens=max_new_tokens),
    ):
        return _written(port, prompt_ids)


def _written(
    port: Port,
    prompt_ids: list[list[int]],
    images: list[list[Any] | None] | None = None,
    image_fields: dict[str, Any] | None = None,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """TRL's own generation. Under vLLM it deals the answers out by rank x number of prompts, so every rank must ask
    equally many: those without enough ask an end token, and drop what comes.
    """
    asked, end = len(prompt_ids), [port.tokenizer.eos_token_id]
    if port.vllm is not None:
        missing = max(gather_object([asked])) - asked
        prompt_ids, images = prompt_ids + [end] * missing, images and images + [None] * missing
    completion_ids, logprobs = port.generate_turn(prompt_ids, images, image_fields or {})
    return completion_ids[:asked], logprobs[:asked] if logprobs else logprobs


def generate_texts(
    port: Port,
    asked: Asked,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    lagged: LaggedPolicy | None = None,
) -> list[str]:
    """A second rollout: one completion a prompt, from the current policy or from `lagged`; in one batched call through
    TRL's own path, so transformers and vLLM alike.

    Collective, also for a rank without prompts. The training RNG and the trainer's mode stay as they were. Cost: one
    generation; under vLLM a lagged policy costs sending its weights there and the current ones back.
    """
    tokenizer = port.tokenizer
    with (
        port.apart(),
        port.settings(temperature=temperature, max_new_tokens=max_new_tokens),
        lagged.in_place(port) if lagged else nullcontext(),
    ):
        prompt_ids = asked.prompt_ids or [[tokenizer.eos_token_id]]
        completion_ids, _ = _written(port, prompt_ids, asked.images, asked.fields)
    return [decode(tokenizer, ids, port.end_ids) for ids in completion_ids][: len(asked.prompt_ids)]


def seed_requests(port: Port) -> None:
    """Under vLLM in this process, seeds every sampled request by (seed, step, row): a run that goes on asks the same.

    TRL gives all rows of a call one SamplingParams, in which a seed would make the rollouts of a group alike; vLLM
    takes one a row as well. With a vLLM server nothing is done: TRL sends it all prompts in one request, which has one
    seed. Cost: vLLM's sampler draws for seeded requests one by one.
    """
    engine: Any = port.vllm
    if engine.mode != "colocate":
        return
    generate = engine.llm.generate
    group = port.rank // engine.tensor_parallel_size  # one engine: its ranks must agree
    calls: Counter[int] = Counter()  # of a step

    def generate_seeded(prompts: list[Any], sampling_params: Any, **options: Any) -> Any:
        if not sampling_params.temperature:  # greedy; evaluation is not repeated when a run goes on
            return generate(prompts, sampling_params=sampling_params, **options)
        calls[port.micro_batches] += 1
        of_rows = [copy.copy(sampling_params) for _ in prompts]
        for row, own in enumerate(of_rows):
            key = f"{port.args.seed} {port.micro_batches} {calls[port.micro_batches]} {group} {row}"
            own.seed = random.Random(key).getrandbits(31)
        return generate(prompts, sampling_params=of_rows, **options)

    engine.llm.generate = generate_seeded
