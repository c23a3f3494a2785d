"""Glue: generation outside the training batch, through TRL's own path, so that every backend it has works here too."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from rlattn.grpo.lagged_policy import LaggedPolicy
from rlattn.grpo.multimodal_prompts import Asked
from rlattn.policy.prompts import decode

if TYPE_CHECKING:
    from rlattn.grpo.trainer import AttentionGRPOTrainer


def generate_greedy(trainer: AttentionGRPOTrainer, prompt_ids: list[list[int]]) -> list[list[int]]:
    """One greedy completion a prompt, as token ids, from the current policy.

    Collective: every rank makes the same number of calls. The training RNG and the trainer's mode stay as they were.
    """
    with apart(trainer), settings(trainer, temperature=0.0):
        return _written(trainer, prompt_ids)[0]


def generate_turn(
    trainer: AttentionGRPOTrainer, prompt_ids: list[list[int]], *, max_new_tokens: int, greedy: bool
) -> tuple[list[list[int]], list[list[float]] | None]:
    """One turn a prompt, and its log-probabilities under vLLM: as training samples it, or greedy and apart from it.

    Collective: every rank makes the same number of calls.
    """
    temperature = 0.0 if greedy else trainer.temperature
    with (
        apart(trainer) if greedy else nullcontext(),
        settings(trainer, temperature=temperature, max_new_tokens=max_new_tokens),
    ):
        return _written(trainer, prompt_ids)


def _written(
    trainer: AttentionGRPOTrainer,
    prompt_ids: list[list[int]],
    images: list[list[Any] | None] | None = None,
    image_fields: dict[str, Any] | None = None,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """TRL's own generation. Under vLLM it deals the answers out by rank x number of prompts, so every rank must ask
    equally many: those without enough ask an end token, and drop what comes.
    """
    asked, end = len(prompt_ids), [trainer._tokenizer.eos_token_id]
    if trainer.use_vllm:
        missing = max(gather_object([asked])) - asked
        prompt_ids, images = prompt_ids + [end] * missing, images and images + [None] * missing
    completion_ids, logprobs = trainer._generate_single_turn(prompt_ids, images, image_fields or {}, 1)
    return completion_ids[:asked], logprobs[:asked] if logprobs else logprobs


def generate_texts(
    trainer: AttentionGRPOTrainer,
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
    tokenizer = trainer._tokenizer
    with (
        apart(trainer),
        settings(trainer, temperature=temperature, max_new_tokens=max_new_tokens),
        lagged.in_place(trainer) if lagged else nullcontext(),
    ):
        prompt_ids = asked.prompt_ids or [[tokenizer.eos_token_id]]
        completion_ids, _ = _written(trainer, prompt_ids, asked.images, asked.fields)
    return [decode(tokenizer, ids) for ids in completion_ids][: len(asked.prompt_ids)]


def seed_requests(trainer: AttentionGRPOTrainer) -> None:
    """Under vLLM in this process, seeds every sampled request by (seed, step, row): a run that goes on asks the same.

    TRL gives all rows of a call one SamplingParams, in which a seed would make the rollouts of a group alike; vLLM
    takes one a row as well. With a vLLM server nothing is done: TRL sends it all prompts in one request, which has one
    seed. Cost: vLLM's sampler draws for seeded requests one by one.
    """
    engine: Any = trainer.vllm_generation
    if engine.mode != "colocate":
        return
    generate = engine.llm.generate
    group = trainer.accelerator.process_index // engine.tensor_parallel_size  # one engine: its ranks must agree
    calls: Counter[int] = Counter()  # of a step

    def generate_seeded(prompts: list[Any], sampling_params: Any, **options: Any) -> Any:
        if not sampling_params.temperature:  # greedy; evaluation is not repeated when a run goes on
            return generate(prompts, sampling_params=sampling_params, **options)
        calls[trainer._step] += 1
        of_rows = [copy.copy(sampling_params) for _ in prompts]
        for row, own in enumerate(of_rows):
            key = f"{trainer.args.seed} {trainer._step} {calls[trainer._step]} {group} {row}"
            own.seed = random.Random(key).getrandbits(31)
        return generate(prompts, sampling_params=of_rows, **options)

    engine.llm.generate = generate_seeded


@contextmanager
def apart(trainer: AttentionGRPOTrainer) -> Iterator[None]:
    """Evaluation mode and a random stream of its own: training goes on as if nothing had been generated."""
    model = trainer.model
    assert model is not None
    training = model.training
    model.eval()
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(training)


@contextmanager
def settings(trainer: Any, *, temperature: float, max_new_tokens: int | None = None) -> Iterator[None]:
    """Temperature (0 for greedy) and length of what is generated inside the context."""
    if trainer.use_vllm:
        engine = trainer.vllm_generation
        kept = engine.temperature, engine.max_completion_length
        engine.temperature, engine.max_completion_length = temperature, max_new_tokens or kept[1]
        try:
            yield
        finally:
            engine.temperature, engine.max_completion_length = kept
        return
    sampling, sampling_kwargs = trainer.generation_config, trainer.generation_kwargs
    changed: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or 1.0}
    if not temperature:
        changed |= {"top_p": 1.0, "top_k": 50, "min_p": None}
    if max_new_tokens:
        changed["max_new_tokens"] = max_new_tokens
    config = copy.deepcopy(sampling)
    config.update(**changed)
    trainer.generation_config, trainer.generation_kwargs = config, {**sampling_kwargs, **changed}
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = sampling, sampling_kwargs
