"""Glue: generation outside the training batch, through TRL's own path, so that every backend it has works here too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlattn.lagged import LaggedPolicy
from rlattn.prompts import decode

if TYPE_CHECKING:
    from rlattn.trainer import AttentionGRPOTrainer


def generate_greedy(trainer: AttentionGRPOTrainer, prompt_ids: list[list[int]]) -> list[list[int]]:
    """One greedy completion a prompt, as token ids, from the current policy.

    Collective: every rank makes the same number of calls. The training RNG and the trainer's mode stay as they were.
    """
    with apart(trainer), settings(trainer, temperature=0.0):
        completion_ids, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    return completion_ids


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
        return trainer._generate_single_turn(prompt_ids, None, {}, 1)


def generate_texts(
    trainer: AttentionGRPOTrainer,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    lagged: LaggedPolicy | None = None,
) -> list[str]:
    """A second rollout: one completion a prompt text (special tokens written out), from the current policy or from
    `lagged`; in one batched call through TRL's own path, so transformers and vLLM alike.

    Collective, also for a rank without prompts. The training RNG and the trainer's mode stay as they were. Cost: one
    generation; under vLLM a lagged policy costs sending its weights there and the current ones back.
    """
    tokenizer = trainer._tokenizer
    prompt_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts or [tokenizer.eos_token]]
    with (
        apart(trainer),
        settings(trainer, temperature=temperature, max_new_tokens=max_new_tokens),
        lagged.in_place(trainer) if lagged else nullcontext(),
    ):
        completion_ids, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    return [decode(tokenizer, ids) for ids in completion_ids][: len(prompts)]


@torch.no_grad()
def greedy_hf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]], *, max_new_tokens: int
) -> list[list[int]]:
    """One greedy completion a prompt from a plain model, as token ids up to and with the end token."""
    padded = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(model.device)
    ids = model.eval().generate(**padded, do_sample=False, max_new_tokens=max_new_tokens)
    completions = ids[:, padded["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [c[: c.index(end) + 1] if end in c else c for c in completions]


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
