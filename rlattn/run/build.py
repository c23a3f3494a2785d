"""From a recipe to a trainer: everything checked and built before a weight loads."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PrinterCallback, ProgressCallback
from trl import GRPOConfig

from rlattn.errors import UserError, describe, did_you_mean
from rlattn.formats.effort import AtEveryEffort, EffortDraw
from rlattn.grpo.dialogues import check_dialogues
from rlattn.grpo.reward_function import RewardFunction
from rlattn.grpo.reward_hooks import RewardOptions
from rlattn.grpo.token_log import TokenLog
from rlattn.grpo.trainer import COMBINE, AttentionGRPOTrainer
from rlattn.grpo.trl_rows import PromptRule, count_rows, eval_examples, train_data
from rlattn.policy.load import PolicySource, prepare_policy
from rlattn.policy.prompts import render_text, rendered_mark
from rlattn.preflight.preflight import Cleared, preflight
from rlattn.preflight.tokenizer_files import check_system_prompt
from rlattn.processes.phases import Phases
from rlattn.processes.process_group import start_deepspeed
from rlattn.progress import progress
from rlattn.rank import is_main, say, world_size
from rlattn.recipe.constraints import (
    check_layers,
    check_train_rows,
    number,
    prompts_a_batch,
)
from rlattn.recipe.schema import TINY_POLICY, Recipe
from rlattn.types import CreditRule, DialogueTask, Example, Task, WarmStartable


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything a run is made of, checked, with no weight loaded yet."""

    recipe: Recipe
    task: Task
    policy: PolicySource
    examples: list[Example]
    reward_funcs: list[Any]
    data: Any
    credit: CreditRule | None


def prepare(recipe: Recipe, found: Cleared | None = None) -> Setup:
    """Validates everything that can be before weights load; makes the tiny policy where the recipe wants it.

    Args:
        found: what `preflight` gave, where it has run in this process.
    """
    ranks = world_size()
    found = found or preflight(recipe, ranks, "run")
    for warning in found.warnings:
        say(f"warning: {warning}")
    task, rewards = found.task, found.rewards
    check_generation(recipe)
    check_backend(recipe)
    if ranks == 1:
        # TRL's own refusals, before a policy is made. On several ranks this would start the process group, and
        # transformers then saves models on rank 0 only: whichever rank makes the tiny policy must be able to.
        grpo_config(recipe, recipe.run_dir / "checkpoints", {})
    examples = eval_examples(task, recipe.policy, recipe.task.efforts)
    data = train_data(task, recipe.policy, recipe.task.rl_rows)
    with warm_start_progress() as show:
        policy = prepare_policy(recipe.policy, taught_task(recipe, task), show if is_main() else None)
    marks = (rendered_mark(policy.tokenizer, example["row"]["prompt"]) for example in examples)
    mark = next(filter(None, marks), None)
    if mark and recipe.policy.prompt_style == "chat":
        say(f"warning: a prompt begins with {mark}, as if rendered; policy.prompt_style=plain takes it as it is")
    kwargs = recipe.template_kwargs
    check_system_prompt(recipe.policy, lambda chat: render_text(policy.tokenizer, chat, kwargs))
    rule = PromptRule(
        tokenizer=policy.tokenizer,
        template_kwargs=kwargs,
        context=policy.context,
        completion=number(recipe, "max_completion_length", 512),
        drop=recipe.task.overlong == "drop",
        effort=recipe.task.efforts[0] if recipe.task.efforts else None,
    )
    examples, data = rule.fitting_examples(examples), rule.fitting_data(data)
    check_train_rows(recipe, count_rows(data, prompts_a_batch(recipe, ranks)), ranks)
    check_layers(recipe, policy.layer_types)
    if isinstance(task, DialogueTask):
        check_dialogues(task, policy.tokenizer, kwargs)
    return Setup(
        recipe=recipe,
        task=task,
        policy=policy,
        examples=examples,
        reward_funcs=[
            RewardFunction(name, reward, task, policy.tokenizer, kwargs, recipe.rewards.named[name].timeout)
            for name, reward in rewards.items()
        ],
        data=data,
        credit=found.credit,
    )


def make_trainer(
    setup: Setup,
    output_dir: Path,
    callbacks: list[Any],
    token_log: TokenLog | None = None,
    phases: Phases | None = None,
    on_failure: Callable[[dict[str, Any]], None] | None = None,
    **overrides: Any,
) -> AttentionGRPOTrainer:
    recipe, policy = setup.recipe, setup.policy
    trainer = AttentionGRPOTrainer(
        model=policy.path,
        reward_funcs=setup.reward_funcs,
        args=grpo_config(recipe, output_dir, policy.init_kwargs, **overrides),
        train_dataset=setup.data,
        processing_class=policy.tokenizer,
        peft_config=policy.peft_config,
        callbacks=callbacks,
        stop_strings=recipe.policy.stop_strings,
        reward_options=replace(reward_options(recipe), on_failure=on_failure),
        keep_best=recipe.resume.keep_best,
        measure=getattr(setup.task, "metrics", None),
        at_epoch=EffortDraw(efforts=efforts, seed=recipe.seed) if (efforts := recipe.task.efforts) else None,
        dialogue=setup.task if isinstance(setup.task, DialogueTask) else None,
        credit=setup.credit,
        attention=recipe.attention,
        credit_options=recipe.credit.applied if recipe.credit else None,
        token_log=token_log,
        phases=phases,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def taught_task(recipe: Recipe, task: Task) -> Task:
    """The task as a warm start teaches it: its prompts say an effort where the run's do."""
    efforts = recipe.task.efforts
    return AtEveryEffort(task=task, efforts=efforts) if efforts and isinstance(task, WarmStartable) else task


@contextlib.contextmanager
def warm_start_progress() -> Iterator[Callable[[int, int, float], None]]:
    """What is told of every step of a warm start; nothing where it comes from the cache."""
    with contextlib.ExitStack() as stack:
        update: Callable[[int, str], None] | None = None

        def show(step: int, steps: int, loss: float) -> None:
            nonlocal update
            update = update or stack.enter_context(progress("warm start", steps, start=step - 1))
            update(step, f"loss {loss:.3f}")

        yield show


def reward_options(recipe: Recipe) -> RewardOptions:
    specs = recipe.rewards.named.items()
    return RewardOptions(
        requires={name: spec.requires for name, spec in specs if spec.requires},
        ramps={name: (spec.warmup, spec.decay) for name, spec in specs if spec.warmup or spec.decay},
        max_failed_share=recipe.rewards.max_failed_share,
    )


def grpo_config(recipe: Recipe, output_dir: Path, model_init_kwargs: dict[str, Any], **overrides: Any) -> GRPOConfig:
    """The recipe's `trainer` keys, and what other sections say in TRL's own terms."""
    keys = {k: v for k, v in recipe.trainer.items() if k not in ("eval_steps", "eval_strategy")}
    gpu = torch.cuda.is_available() and not keys.get("use_cpu")
    if not gpu and not torch.backends.mps.is_available():
        keys |= {"use_cpu": True, "dataloader_pin_memory": False}
    if keys.get("deepspeed"):
        keys["use_cpu"] = False  # DeepSpeed's own DS_ACCELERATOR says
        keys["accelerator_config"] = {**(keys.get("accelerator_config") or {}), **start_deepspeed()}
    if recipe.policy.path == TINY_POLICY:  # all its parameters are used; DDP would look for others at every step
        keys.setdefault("ddp_find_unused_parameters", False)
    keys.setdefault("bf16", gpu and torch.cuda.is_bf16_supported() and not keys.get("fp16"))
    rewards = recipe.rewards
    values = {
        **keys,
        "seed": recipe.seed,
        "output_dir": str(output_dir),
        "run_name": recipe.name,
        "report_to": list(recipe.tracking.report_to) or "none",
        "project": recipe.tracking.project,
        "reward_weights": [spec.weight for spec in rewards.named.values()],
        "multi_objective_aggregation": COMBINE[rewards.combine],
        "save_total_limit": recipe.resume.keep_last,
        "model_init_kwargs": model_init_kwargs,
        "disable_tqdm": True,
    }
    try:
        return GRPOConfig(**(values | overrides))
    except (ValueError, TypeError, AttributeError, LookupError, ImportError, FileNotFoundError) as error:
        # not RuntimeError: the process group is formed in here too
        raise UserError("trainer", f"TRL refuses it: {describe(error)}.") from None


def tracker_environment(recipe: Recipe) -> dict[str, str]:
    """Where each tracker writes, unless the user's environment already says."""
    run = str(recipe.run_dir)
    wanted = {
        "WANDB_PROJECT": recipe.tracking.project,
        "WANDB_DIR": run,
        "WANDB_TAGS": ",".join(recipe.tracking.tags),
        "TENSORBOARD_LOGGING_DIR": f"{run}/tensorboard",
    }
    return {key: value for key, value in wanted.items() if value and key not in os.environ}


def check_generation(recipe: Recipe) -> None:
    """transformers ignores generation settings that it does not know; a typo should not go unnoticed."""
    known = vars(GenerationConfig())
    for key in recipe.trainer.get("generation_kwargs") or {}:
        if key not in known and not recipe.trainer.get("use_vllm"):
            raise UserError(f"trainer.generation_kwargs.{key}", "unknown setting.", did_you_mean(key, known))


def check_backend(recipe: Recipe) -> None:
    """The fused kernels are for CUDA."""
    if recipe.credit and recipe.attention.backend == "triton" and not torch.cuda.is_available():
        raise UserError("attention.backend", "triton needs a CUDA GPU.", "Use torch.")
