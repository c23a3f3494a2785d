"""Parts that train: GRPO with and without credit, under ZeRO-3, under FSDP2. TRL is imported only where it is used."""

import os
import tempfile
import time
from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from rlattn.attention import capture
from rlattn.gpu_smoke.shared import Outcome, Scale, Skipped, need
from rlattn.types import AttentionOptions

SHARE_TARGET = 0.01  # of a training step
STEPS = 4  # the first warms up


def train(scale: Scale) -> Outcome:
    """GRPO steps with and without coupled_rhythm credit, and what share of a step its metrics take."""
    steps = {"plain": _grpo(scale, credit=False)}
    for backend in ("torch", "triton") if scale.device == "cuda" else ("torch",):
        steps[backend] = _grpo(scale, backend=backend)
    shares = {name: step["metrics"] / step["step"] for name, step in steps.items() if name != "plain"}
    best = min(shares, key=lambda name: shares[name])
    rest = steps[best]["step"] - steps[best]["generation"]
    said = [f"{name} {step['step']:.2f} s a step" for name, step in steps.items()]
    said += [f"metrics ({name}) {share:.2%} of it" for name, share in shares.items()]
    said.append(f"{steps[best]['metrics'] / rest:.2%} without generation ({best}); target <= {SHARE_TARGET:.0%}")
    return Outcome(detail=", ".join(said), met=scale.small or shares[best] <= SHARE_TARGET, figures=steps)


def zero3(scale: Scale) -> Outcome:
    need("deepspeed")
    from rlattn.paths import shipped_dir

    step = _grpo(scale, deepspeed=str(shipped_dir("launch") / "deepspeed" / "zero3.json"))
    return Outcome(detail=f"{step['step']:.2f} s a step with credit, one rank", figures=step)


def fsdp2(scale: Scale) -> Outcome:
    if scale.device == "cpu":
        raise Skipped("on a CPU accelerate runs DDP instead")
    wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
    step = _grpo(scale, fsdp=True, fsdp_config=wrapped)
    return Outcome(detail=f"{step['step']:.2f} s a step with credit, one rank", figures=step)


def _grpo(scale: Scale, *, credit: bool = True, backend: str = "torch", **options: Any) -> dict[str, float]:
    """Seconds a step after the first: all of it, its metrics, its generation. Asserts that the steps were sound."""
    need("trl", "datasets", "pydantic", "ruamel.yaml")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig

    from rlattn.credit import CREDIT_RULES
    from rlattn.tasks import Arithmetic
    from rlattn.tiny import tiny_policy
    from rlattn.trainer import AttentionGRPOTrainer
    from rlattn.types import WarmStart

    def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM._from_config(Qwen2Config(**scale.shapes), attn_implementation="sdpa")
    if scale.device == "cuda":
        model.to(torch.bfloat16)
    clock = _Clock(scale.device)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(
            tiny_policy(Arithmetic(), warm_start=WarmStart(steps=0), cache_dir=folder)
        )
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in Arithmetic(train_rows=64).rows("train")]
        trainer = AttentionGRPOTrainer(
            model=model,
            reward_funcs=even_tokens,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=scale.of(512, 16),
                learning_rate=1e-6,
                bf16=scale.device == "cuda",
                use_cpu=scale.device == "cpu",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **options,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            callbacks=[clock],
            credit=CREDIT_RULES["coupled_rhythm"]() if credit else None,
            attention=AttentionOptions(backend=backend, horizon=(2, 100)),  # type: ignore[arg-type]
        )
        original = capture.metrics_function
        capture.metrics_function = lambda backend: clock.timing("metrics", original(backend))
        trainer._generate = clock.timing("generation", trainer._generate)  # type: ignore[method-assign]
        try:
            trainer.train()
        finally:
            capture.metrics_function = original
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == STEPS and all(isfinite(log["grad_norm"]) for log in logs), f"unsound steps: {logs}"
    if credit:
        assert all(log["credit/nonfinite_rows"] == 0 for log in logs), "attention signals were not finite"
        assert max(log["credit/max"] for log in logs) > 1, "no token was amplified"
    return {name: seconds / (STEPS - 1) for name, seconds in clock.totals.items()}


class _Clock(TrainerCallback):
    """Seconds of the steps after the first, and of what `timing` wraps inside them."""

    def __init__(self, device: str):
        self.device, self.counts, self.began = device, False, 0.0
        self.totals = {"step": 0.0, "metrics": 0.0, "generation": 0.0}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            result = function(*args, **kwargs)
            if self.counts:
                self.totals[name] += self.now() - began
            return result

        return timed

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counts, self.began = state.global_step > 0, self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.counts:
            self.totals["step"] += self.now() - self.began
