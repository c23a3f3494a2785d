"""`rlattn bench step`: speed as ratios, both sides measured in turn in one run. Never a test: machines are noisy."""

import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from rlattn.credit import CREDIT_RULES
from rlattn.grpo.trainer import AttentionGRPOTrainer
from rlattn.policy.tiny import tiny_policy
from rlattn.tasks import Arithmetic
from rlattn.types import WarmStart

SIDES: dict[str, Callable[..., GRPOTrainer]] = {
    "TRL": GRPOTrainer,
    "rlattn": AttentionGRPOTrainer,
    "with credit": partial(AttentionGRPOTrainer, credit=CREDIT_RULES["coupled_rhythm"]()),
}


def bench_step(rounds: int, steps: int, show: Callable[[str], None]) -> dict[str, float]:
    """Seconds a step of plain GRPOTrainer, of ours with the same settings, and of ours with coupled_rhythm.

    All write the same tokens with the tiny policy. They take turns in an order that rotates, and the first round is not
    counted.

    Returns:
        The median ratio of every pair that matters: `rlattn / TRL` and `with credit / rlattn`.
    """
    policy = tiny_policy(Arithmetic(), warm_start=WarmStart(steps=0))
    show(f"{'round':>5}" + "".join(f"{name + ' s/step':>20}" for name in SIDES))
    pairs = [("rlattn", "TRL"), ("with credit", "rlattn")]
    ratios: dict[str, list[float]] = {f"{one} / {other}": [] for one, other in pairs}
    for round_number in range(rounds + 1):
        turn = round_number % len(SIDES)
        order = [*SIDES][turn:] + [*SIDES][:turn]
        seconds = {name: _seconds_a_step(SIDES[name], str(policy), steps) for name in order}
        if round_number:
            show(f"{round_number:5}" + "".join(f"{seconds[name]:20.3f}" for name in SIDES))
            for one, other in pairs:
                ratios[f"{one} / {other}"].append(seconds[one] / seconds[other])
    for pair, values in ratios.items():
        show(f"{pair}: median {median(values):.3f}, from {min(values):.3f} to {max(values):.3f} in {rounds} rounds")
    return {pair: median(values) for pair, values in ratios.items()}


def _seconds_a_step(make: Callable[..., GRPOTrainer], policy: str, steps: int) -> float:
    def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    rows = list(Arithmetic(train_rows=64).rows("train"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(
            model=policy,
            reward_funcs=even_tokens,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                learning_rate=0.0,  # the policies must not part: all sides write the same tokens
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
