"""Glue: generation outside the training batch, through TRL's own path, so that every backend it has works here too."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlattn.trainer import AttentionGRPOTrainer


def generate_greedy(trainer: AttentionGRPOTrainer, prompt_ids: list[list[int]]) -> list[list[int]]:
    """One greedy completion a prompt, as token ids, from the current policy.

    Collective: every rank makes the same number of calls. The training RNG and the trainer's mode stay as they were.
    """
    with _greedy(trainer):
        completion_ids, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    return completion_ids


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
def _greedy(trainer: AttentionGRPOTrainer) -> Iterator[None]:
    model = trainer.model
    assert model is not None
    training = model.training
    model.eval()
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), _greedy_vllm(trainer) if trainer.use_vllm else _greedy_hf(trainer):
            yield
    finally:
        model.train(training)


@contextmanager
def _greedy_hf(trainer: AttentionGRPOTrainer) -> Iterator[None]:
    sampling, sampling_kwargs = trainer.generation_config, trainer.generation_kwargs
    off = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
    greedy = copy.deepcopy(sampling)
    greedy.update(**off)
    trainer.generation_config, trainer.generation_kwargs = greedy, {**sampling_kwargs, **off}
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = sampling, sampling_kwargs


@contextmanager
def _greedy_vllm(trainer: AttentionGRPOTrainer) -> Iterator[None]:
    engine = trainer.vllm_generation
    temperature, engine.temperature = engine.temperature, 0.0
    try:
        yield
    finally:
        engine.temperature = temperature
