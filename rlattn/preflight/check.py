"""`rlattn check`: would this recipe run, and does it fit? Configuration files only; imports neither torch nor TRL."""

from pathlib import Path
from typing import Any

from rlattn.errors import UserError, describe
from rlattn.preflight.architectures import NoSuchLayer
from rlattn.preflight.memory import MemoryEstimate, count_parameters, estimate_memory, lora_parameters
from rlattn.preflight.policy_files import OFFLOADED, offloaded, strategy_of
from rlattn.preflight.preflight import Cleared, preflight
from rlattn.recipe.constraints import (
    generation_batch,
    number,
)
from rlattn.recipe.grpo_fields import load_fields
from rlattn.recipe.schema import TINY_POLICY, Recipe
from rlattn.rewards.protocol import lags_of
from rlattn.types import Messages

CHARACTERS_PER_TOKEN = 3  # a cautious guess for English and mathematics
GB = 1e9


def check(recipe: Recipe, *, ranks: int, gpu_memory: float | None) -> list[str]:
    """Every check that needs no weights. Returns what was found, line by line.

    Args:
        ranks: processes the recipe would be started with.
        gpu_memory: GB of one accelerator; the estimate must fit into it.

    Raises:
        UserError: the first thing that would keep the recipe from running.
    """
    found = preflight(recipe, ranks, "files")
    warnings, rewards = found.warnings, found.rewards
    weights = ", ".join(f"{name} x {spec.weight:g}" for name, spec in recipe.rewards.named.items())
    batch, group = generation_batch(recipe, ranks), number(recipe, "num_generations", 8)
    lines = [
        f"recipe   {recipe.name}, into {recipe.run_dir}",
        f"task     {type(found.task).__name__}{found.unread}",
        f"rewards  {weights} ({recipe.rewards.combine})" if rewards else "",
        f"credit   {type(found.credit).__name__ if found.credit else 'equal for every token'}",
        f"batch    {batch} rollouts on {ranks} rank{'s' * (ranks > 1)}: {batch // group} groups of {group}",
    ]
    lags = set().union(*(lags_of(reward) for reward in rewards.values()))
    lines += _policy_lines(recipe, found, ranks, gpu_memory, len(lags))
    if ranks == 1 and strategy_of(recipe) != "ddp":
        warnings.append(f"{strategy_of(recipe)} spreads the weights over ranks: give --ranks N for what a run needs")
    return [*lines, *(f"warning: {warning}" for warning in warnings)]


def _policy_lines(
    recipe: Recipe, found: Cleared, ranks: int, gpu_memory: float | None, lagged_copies: int
) -> list[str]:
    policy = recipe.policy
    if policy.path == TINY_POLICY:
        return [f"policy   {TINY_POLICY}: 1 to 3 M parameters, made and warm-started on the spot; fits anywhere"]
    config = found.config
    completion = number(recipe, "max_completion_length", 512)
    prompt, how = prompt_tokens(found.prompts, policy.path)
    context = (config.get("text_config") or config).get("max_position_embeddings")
    doubt = ""
    if context and prompt + completion > context:
        leaves_out = recipe.task.overlong == "drop" or recipe.task.options.get("streaming")
        if leaves_out and completion < context:
            prompt, how = context - completion, "at most"
        elif how == "of":
            raise UserError(
                "trainer.max_completion_length",
                f"{completion} and the longest prompt ({prompt} tokens) exceed the model's context of {context}.",
                f"At most {max(context - prompt, 0)}; or task.overlong=drop leaves such prompts out.",
            )
        else:
            doubt = " (it may not fit: train refuses it then, or leaves it out under task.overlong: drop)"
    try:
        parameters = count_parameters(config)
        lora = policy.lora
        trained = lora_parameters(config, lora.r, _as_list(lora.target_modules)) if lora else parameters
        estimate = memory_a_rank(recipe, config, prompt, ranks, gpu_memory, lagged_copies)
    except NoSuchLayer as error:
        raise UserError("policy.lora.target_modules", f"{error}.") from None
    except ValueError as error:
        return [f"policy   {policy.path}", f"memory   not estimated: {error}"]
    except (TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError) as error:
        raise UserError("policy.path", f"{policy.path} has a damaged config.json: {describe(error)}.") from None
    away = "".join(f", {OFFLOADED[part]} in main memory" for part in offloaded(recipe))
    lines = [
        f"policy   {policy.path}: {parameters / 1e9:.2f} B parameters, {trained / 1e6:,.0f} M trained",
        f"lengths  prompt {how} {prompt}, completion {completion}, context {context or 'unknown'} tokens{doubt}",
        f"memory   a rank, {strategy_of(recipe)} on {ranks}{away}, in GB:",
    ]
    lines += [f"           {name:16} {value / GB:8.1f}" for name, value in _parts(estimate) if value]
    if estimate.total < sum(value for _, value in _parts(estimate)[:-1]):
        lines[-1] += "  (the larger of generation and training, which come in turn: not the sum)"
    if gpu_memory is not None and estimate.total > gpu_memory * GB:
        raise UserError(
            "policy",
            f"needs about {estimate.total / GB:.0f} GB a rank and has {gpu_memory:g}.",
            "More --ranks with ZeRO-3 or offload (trainer.deepspeed), policy.lora, a smaller "
            "per_device_train_batch_size or max_completion_length. Largest part: "
            f"{max(_parts(estimate)[:-1], key=lambda part: part[1])[0]}.",
        )
    return lines


def memory_a_rank(
    recipe: Recipe, config: dict, prompt: int, ranks: int, gpu_memory: float | None, lagged_copies: int
) -> MemoryEstimate:
    """`estimate_memory` of a recipe, for the policy's config.json and prompts of so many tokens."""
    lora, fields = recipe.policy.lora, load_fields()
    passed = [
        "per_device_train_batch_size",
        "gradient_checkpointing",
        "beta",
        "optim",
        "ds3_gather_for_generation",
        "use_vllm",
        "vllm_mode",
        "vllm_gpu_memory_utilization",
        "vllm_enable_sleep_mode",
        "max_completion_length",
    ]
    settings: dict[str, Any] = {key: recipe.trainer.get(key, fields[key].default) for key in passed}
    return estimate_memory(
        config,
        prompt_length=prompt,
        generation_batch_per_rank=generation_batch(recipe, ranks) // ranks,
        ranks=ranks,
        strategy=strategy_of(recipe),
        offload=offloaded(recipe),
        dtype=recipe.policy.dtype,
        bf16=bool(recipe.trainer.get("bf16", not recipe.trainer.get("fp16"))),
        lora_r=lora.r if lora else 0,
        lora_targets=_as_list(lora.target_modules) if lora else "all-linear",
        device_memory=int((gpu_memory or 0) * GB),
        lagged_copies=lagged_copies,
        **settings,
    )


def _parts(estimate: MemoryEstimate) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), getattr(estimate, name)) for name in MemoryEstimate.__dataclass_fields__]


def prompt_tokens(prompts: list[str | Messages], path: str) -> tuple[int, str]:
    """The longest of the prompts in tokens, and whether that is exact or guessed from its characters."""
    texts = [p if isinstance(p, str) else "\n".join(str(message["content"]) for message in p) for p in prompts]
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return max((len(tokenizer.encode(text).ids) for text in texts), default=0), "of"
    return max(
        (len(text) for text in texts), default=0
    ) // CHARACTERS_PER_TOKEN, "about" if texts else "unread, counted as"


def _as_list(targets: str | tuple[str, ...] | list[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)
