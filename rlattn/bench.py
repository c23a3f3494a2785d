"""`rlattn bench`: speed as ratios, both sides measured in turn in one run. Never a test: machines are noisy."""

import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from rlattn.tasks import Arithmetic
from rlattn.tiny import tiny_policy
from rlattn.trainer import AttentionGRPOTrainer
from rlattn.types import WarmStart


def bench_step(rounds: int, steps: int, show: Callable[[str], None]) -> float:
    """Seconds a step of AttentionGRPOTrainer over those of plain GRPOTrainer with the same settings, median of rounds.

    Both train the tiny policy from the same seed, so both generate the same tokens. They take turns, which one first
    alternating, and the first round warms up and is not counted.
    """
    policy = tiny_policy(Arithmetic(), warm_start=WarmStart(steps=0))
    show(f"{'round':>5} {'TRL s/step':>11} {'rlattn s/step':>14} {'ratio':>7}")
    ratios = []
    for round_number in range(rounds + 1):
        order: list[type[GRPOTrainer]] = [GRPOTrainer, AttentionGRPOTrainer]
        if round_number % 2:
            order.reverse()
        seconds = {trainer: _seconds_a_step(trainer, str(policy), steps) for trainer in order}
        plain, ours = seconds[GRPOTrainer], seconds[AttentionGRPOTrainer]
        if round_number:
            ratios.append(ours / plain)
            show(f"{round_number:5} {plain:11.3f} {ours:14.3f} {ours / plain:7.3f}")
    show(f"rlattn / TRL: median {median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds")
    return median(ratios)


def _seconds_a_step(trainer_class: type[GRPOTrainer], policy: str, steps: int) -> float:
    def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    rows = list(Arithmetic(train_rows=64).rows("train"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=policy,
            reward_funcs=even_tokens,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=64,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(policy),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.train().metrics["train_runtime"] / steps
