"""What must hold between the keys of a recipe, before anything is loaded. Imports neither torch nor TRL."""

from collections.abc import Mapping
from importlib.util import find_spec
from math import lcm

from rlattn.errors import UserError, did_you_mean
from rlattn.recipe.grpo_fields import load_fields
from rlattn.recipe.schema import TINY_CONTEXT, TINY_POLICY, Policy, Recipe
from rlattn.tasks import TASKS
from rlattn.types import ATTENTION_LAYERS, CreditRule, DialogueTask, Reward, RunContext, Task

# what an optimizer's name begins with -> the module it needs, and what pip calls that
OPTIMIZERS = {
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"),
    "adamw_torch_npu": ("torch_npu", "torch-npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    **dict.fromkeys(
        ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb"), ("bitsandbytes", "bitsandbytes")
    ),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
KERNELS = {  # attn_implementation -> the same
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
INSTALL = {"wandb": "wandb", "trackio": "'rlattn[trackers]'", "tensorboard": "'rlattn[trackers]'"}


def setting(recipe: Recipe, key: str) -> object:
    """A GRPOConfig value: the recipe's, or TRL's default."""
    return recipe.trainer.get(key, load_fields()[key].default)


def number(recipe: Recipe, key: str, default: int) -> int:
    value = setting(recipe, key)
    return value if isinstance(value, int) else default


def generation_batch(recipe: Recipe, ranks: int) -> int:
    """Rollouts that are generated together, over all ranks (GRPOConfig's rule)."""
    size = setting(recipe, "generation_batch_size")
    if isinstance(size, int):
        return size
    per_device = number(recipe, "per_device_train_batch_size", 8)
    steps = number(recipe, "steps_per_generation", number(recipe, "gradient_accumulation_steps", 1))
    return per_device * ranks * steps


def window_steps(recipe: Recipe, ranks: int) -> float:
    """Optimizer steps from one generation to the next."""
    accumulated = number(recipe, "gradient_accumulation_steps", 1)
    size = setting(recipe, "generation_batch_size")
    if isinstance(size, int):
        micro_batches = size / (number(recipe, "per_device_train_batch_size", 8) * ranks)
    else:
        micro_batches = number(recipe, "steps_per_generation", accumulated)
    return micro_batches * number(recipe, "num_iterations", 1) / accumulated


def check_recipe(recipe: Recipe, ranks: int) -> list[str]:
    """Cross-field rules. Returns warnings, one line each.

    Raises:
        UserError: the run could not start, or would not do what its recipe says.
    """
    _check_batch(recipe, ranks)
    _check_steps(recipe)
    _check_combinations(recipe)
    _check_adapter_under_vllm(recipe)
    warnings = []
    loss = setting(recipe, "loss_type")
    if setting(recipe, "importance_sampling_level") == "sequence" and loss in ("bnpo", "dr_grpo", "dapo", "cispo"):
        warnings.append(
            f"trainer.importance_sampling_level: sequence with loss_type {loss} weights a rollout by its length; "
            "GSPO (arXiv 2507.18071) goes with loss_type: grpo."
        )
    if all(spec.weight == 0 for spec in recipe.rewards.named.values()):
        warnings.append("rewards: every weight is 0, so nothing is learned.")
    return warnings


def check_layers(recipe: Recipe, layer_types: tuple[str, ...]) -> None:
    """Credit reads attention layers of the policy; a hybrid's others have no queries and keys."""
    if recipe.credit is None:
        return
    usable = [i for i, kind in enumerate(layer_types) if kind in ATTENTION_LAYERS]
    if not usable:
        raise UserError("credit", "the policy has no full-attention layer to read.", "Leave credit out for it.")
    for layer in recipe.attention.layers or ():
        if layer not in usable:
            raise UserError("attention.layers", f"layer {layer} cannot be read.", f"This policy's are {usable}.")


def check_lora_targets(policy: Policy, *, output: str = "lm_head", shared: str = "") -> None:
    """Raises UserError where LoRA aims at the output layer, or at the embeddings whose weights that layer shares.

    Args:
        output: the output layer's name, without what it lies in.
        shared: the same of tied embeddings; empty where they are not tied.
    """
    targets = policy.lora.target_modules if policy.lora else ()
    for target in () if isinstance(targets, str) else targets:
        name = target.rpartition(".")[2]
        if name == output:
            problem = f"an adapter on the output layer '{name}' would not be trained: TRL reads its weights alone."
            raise UserError("policy.lora.target_modules", problem, "Leave it out.")
        if name == shared:
            problem = (
                f"'{name}' shares its weights with the output layer: an adapter on it, merged for vLLM or by `rlattn "
                "export --merge`, would change that layer, too."
            )
            raise UserError("policy.lora.target_modules", problem, "Leave it out.")


def check_built(
    recipe: Recipe, task: Task, rewards: Mapping[str, Reward], credit: CreditRule | None, ranks: int
) -> list[str]:
    """What must hold between a recipe's task, rewards and rule, and what each checks of itself. Returns warnings.

    Raises:
        UserError: the run could not start, or would not do what its recipe says.
    """
    _check_dialogue(recipe, task, ranks)
    for name, reward in rewards.items():
        _check_reward(recipe, task, rewards, name, reward)
    for name, part in {"task": task, **rewards}.items():
        context = RunContext(
            name=name, recipe=recipe, task=task, rewards=rewards, ranks=ranks, window_steps=window_steps(recipe, ranks)
        )
        if callable(check := getattr(part, "check", None)):
            check(context)
    low, completion = recipe.attention.horizon[0], number(recipe, "max_completion_length", 512)
    if not getattr(credit, "reads_fai", False) or low < completion:
        return []
    return [
        f"attention.horizon: no token has a FAI, which looks {low} tokens back and more, in responses of at most "
        f"{completion} (trainer.max_completion_length). Lower its first number."
    ]


def _check_dialogue(recipe: Recipe, task: Task, ranks: int) -> None:
    if not isinstance(task, DialogueTask):
        return
    if recipe.policy.prompt_style == "plain":
        raise UserError("policy.prompt_style", "a dialogue's turns are chat messages.", "Use chat.")
    if task.style == "tools" and recipe.policy.path == TINY_POLICY:
        raise UserError("task.style", f"{TINY_POLICY}'s chat template cannot carry tool calls.", "Use text.")
    if recipe.task.efforts:
        problem = "says how long one answer's thought may be, and a dialogue has many turns."
        raise UserError("task.efforts", problem, "Drop it, or take a task without dialogues.")
    spread = recipe.trainer.get("vllm_mode") == "server" or number(recipe, "vllm_tensor_parallel_size", 1) > 1
    if task.style == "tools" and recipe.trainer.get("use_vllm") and spread and ranks > 1:
        problem = "on several ranks TRL's tool loop would hand vLLM's answers to the wrong ranks."
        raise UserError("trainer.use_vllm", problem, "Use vllm_mode: colocate with one GPU an engine, or style: text.")
    if task.style == "tools" and "turn_tokens" in recipe.task.options:
        problem = "bounds turns of free text; with tools a turn may take all of trainer.max_completion_length."
        raise UserError("task.turn_tokens", problem, "Drop it, or use style: text.")


def _check_reward(recipe: Recipe, task: Task, rewards: Mapping[str, Reward], name: str, reward: Reward) -> None:
    """What a reward says that it needs, held against what there is."""
    required = recipe.rewards.named[name].requires
    most = getattr(rewards[required], "pays_at_most", None) if required else None
    if most is not None and most < 1:
        problem = f"a gate opens at 1, and '{required}' pays {most:g} at best: '{name}' would never count."
        raise UserError(f"rewards.{name}.requires", problem, "Drop it: that reward weighs in by itself.")
    names_tokens = hasattr(reward, "tokens") or hasattr(reward, "parts")
    if names_tokens and setting(recipe, "importance_sampling_level") == "sequence":
        raise UserError(
            "trainer.importance_sampling_level",
            f"sequence spreads every token's gradient over its rollout, and '{name}' names tokens.",
            "Use token.",
        )
    if "environment" in getattr(reward, "needs", ()) and not isinstance(task, DialogueTask):
        problem = f"speaks of dialogues, and {type(task).__name__} has none."
        raise UserError(f"rewards.{name}", problem, "Use task.kind: questions, or drop it.")
    if "images" in getattr(reward, "needs", ()):
        problem = "needs images, and the policy of a recipe reads text only."
        raise UserError(f"rewards.{name}", problem, "Give it to AttentionGRPOTrainer, in Python (rlattn/rewards/).")
    for method in getattr(reward, "needs_of_task", ()):
        if not callable(getattr(task, method, None)):
            problem = f"needs a task with {method}(), which {type(task).__name__} has not."
            have = [kind for kind, built_in in TASKS.items() if hasattr(built_in, method)]
            which = f" ({', '.join(have)})" if have else ""
            raise UserError(f"rewards.{name}", problem, f"Use a task that has it{which}, or another reward.")


def prompts_a_batch(recipe: Recipe, ranks: int) -> int:
    """Training rows that one generation takes, over all ranks."""
    return generation_batch(recipe, ranks) // number(recipe, "num_generations", 8)


def check_train_rows(recipe: Recipe, rows: int, ranks: int) -> None:
    """That there are rows for one generation batch: TRL leaves out what does not fill one. Raises UserError."""
    needed = prompts_a_batch(recipe, ranks)
    if rows < needed:
        on = f" on {ranks} ranks" if ranks > 1 else ""
        problem = f"its training rows are {rows}, and one generation batch{on} takes {needed}: no step could be made."
        fix = "Give more rows, or lower trainer.per_device_train_batch_size x steps_per_generation x ranks."
        raise UserError("task", problem, fix)


def _check_adapter_under_vllm(recipe: Recipe) -> None:
    options = recipe.trainer.get("fsdp_config")
    versions = [options.get(key) for key in ("version", "fsdp_version")] if isinstance(options, Mapping) else []
    if recipe.policy.lora and recipe.trainer.get("use_vllm") and recipe.trainer.get("fsdp") and 1 in versions:
        problem = "FSDP 1 cannot send vLLM an adapter: nothing can be merged into its flat shards."
        raise UserError("trainer.fsdp_config", problem, "Set version: 2.")


def check_installed(recipe: Recipe) -> None:
    """Packages that this recipe needs beyond the core ones."""
    for tracker in recipe.tracking.report_to:
        if find_spec(tracker) is None:
            raise UserError(
                "tracking.report_to", f"{tracker} is not installed.", f"Run: pip install {INSTALL[tracker]}"
            )
    if recipe.trainer.get("use_vllm") and find_spec("vllm") is None:
        raise UserError("trainer.use_vllm", "vllm is not installed.", "Run: pip install 'rlattn[vllm]'")
    if recipe.trainer.get("deepspeed") and find_spec("deepspeed") is None:
        raise UserError("trainer.deepspeed", "deepspeed is not installed.", "Run: pip install 'rlattn[deepspeed]'")
    if recipe.credit and recipe.attention.backend == "triton" and find_spec("triton") is None:
        raise UserError("attention.backend", "triton is not installed.", "Run: pip install triton, or use torch.")
    module, package = KERNELS.get(recipe.policy.attn_implementation, ("", ""))
    if module and find_spec(module) is None:
        fix = f"Run: pip install {package}, or use sdpa."
        raise UserError("policy.attn_implementation", f"{package} is not installed.", fix)
    if recipe.trainer.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        raise UserError("trainer.use_liger_kernel", "liger-kernel is not installed.", "Run: pip install liger-kernel")
    optimizer = str(setting(recipe, "optim"))
    for begins, (module, package) in OPTIMIZERS.items():
        if optimizer.startswith(begins) and find_spec(module) is None:
            fix = f"Run: pip install {package}, or use adamw_torch."
            raise UserError("trainer.optim", f"{optimizer} needs {package}, which is not installed.", fix)


def _check_batch(recipe: Recipe, ranks: int) -> None:
    group = number(recipe, "num_generations", 8)
    if "generation_batch_size" in recipe.trainer and "steps_per_generation" in recipe.trainer:
        raise UserError(
            "trainer.generation_batch_size", "and steps_per_generation both say how much to generate.", "Keep one."
        )
    per_step = number(recipe, "per_device_train_batch_size", 8) * ranks
    batch = generation_batch(recipe, ranks)
    if batch % per_step:
        raise UserError(
            "trainer.generation_batch_size",
            f"{batch} is not a multiple of per_device_train_batch_size x ranks = {per_step}.",
            f"Nearest: {max(1, round(batch / per_step)) * per_step}.",
        )
    if batch % group:
        whole = lcm(group, ranks)  # every rank has as many rollouts as the others
        below = batch - batch % whole
        raise UserError(
            "trainer.num_generations",
            f"a generation batch of {batch} rollouts ({ranks} rank{'s' * (ranks > 1)}) does not hold whole groups of "
            f"{group}, and a group's advantages need all of it.",
            f"Make per_device_train_batch_size x steps_per_generation x ranks a multiple of {whole}"
            f" (nearest: {f'{below} or ' if below else ''}{below + whole}).",
        )


def _check_steps(recipe: Recipe) -> None:
    if recipe.trainer.get("save_strategy") == "best":
        raise UserError(
            "trainer.save_strategy", "'best' is not offered: evaluation here is rlattn's own.", "Use steps or epoch."
        )
    if recipe.trainer.get("eval_strategy") == "epoch":
        raise UserError("trainer.eval_strategy", "epoch is not offered.", "Give trainer.eval_steps: every how many.")
    if recipe.trainer.get("eval_strategy") == "steps" and "eval_steps" not in recipe.trainer:
        raise UserError("trainer.eval_steps", "is required with eval_strategy: steps.", "Add it to the recipe.")
    steps = number(recipe, "max_steps", -1)
    for key in ("save_steps", "eval_steps", "logging_steps"):
        every = recipe.trainer.get(key)
        if isinstance(every, float):
            raise UserError(
                f"trainer.{key}", f"expected a whole number of steps, got {every}.", "Give a number of steps."
            )
        if key == "logging_steps" and 0 < steps < (every or 0):
            raise UserError(f"trainer.{key}", f"{every} is more than max_steps {steps}: nothing would be logged.")
    if recipe.task.options.get("streaming") and steps <= 0:
        raise UserError(
            "trainer.max_steps", "is required when task.streaming is true: a stream has no length.", "Set it."
        )


def _check_combinations(recipe: Recipe) -> None:
    if recipe.credit and setting(recipe, "importance_sampling_level") == "sequence":
        raise UserError(
            "trainer.importance_sampling_level",
            "sequence spreads every token's gradient over its rollout, so credit would not stay where it is put.",
            "Use token, or leave credit out.",
        )
    check_lora_targets(recipe.policy)
    if str(setting(recipe, "optim")).startswith(("galore", "apollo")) and not setting(recipe, "optim_target_modules"):
        problem = f"is required with optim: {setting(recipe, 'optim')}."
        raise UserError("trainer.optim_target_modules", problem, "Name the layers, or all-linear.")
    colocated = recipe.trainer.get("use_vllm") and setting(recipe, "vllm_mode") == "colocate"
    if recipe.policy.revision and colocated:
        raise UserError(
            "policy.revision",
            "does not reach vLLM, which TRL starts from the model's main revision.",
            f"Run: hf download {recipe.policy.path} --revision {recipe.policy.revision} --local-dir FOLDER, and give "
            "policy.path: FOLDER instead.",
        )
    completion = number(recipe, "max_completion_length", 512)
    if recipe.policy.path == TINY_POLICY and completion >= TINY_CONTEXT:
        raise UserError(
            "trainer.max_completion_length",
            f"{completion} exceeds the {TINY_CONTEXT} tokens that {TINY_POLICY} holds, prompt included.",
            "Lower it.",
        )
    for key in recipe.resume.allow_changed:
        if not any(known == key or known.startswith(f"{key}.") for known in (*recipe.keys, "policy.lora", "trainer")):
            names = {*recipe.keys, *(f"trainer.{name}" for name in load_fields())}
            if key not in names:
                raise UserError("resume.allow_changed", f"'{key}' is no key of a recipe.", did_you_mean(key, names))
    if recipe.credit and recipe.attention.backend == "triton" and recipe.trainer.get("use_cpu"):
        raise UserError("attention.backend", "triton needs a CUDA GPU, and trainer.use_cpu is true.", "Use auto.")
    if recipe.trainer.get("bf16") and recipe.trainer.get("fp16"):
        raise UserError("trainer.bf16", "and fp16 are both true.", "Keep one.")
    if recipe.policy.stop_strings and recipe.trainer.get("mask_truncated_completions"):
        raise UserError(
            "policy.stop_strings",
            "and trainer.mask_truncated_completions exclude each other: what a stop string ended has no end token, "
            "so TRL would mask it as truncated.",
            "Drop one of them.",
        )
    for key in ("use_transformers_continuous_batching", "use_transformers_paged"):
        if recipe.policy.stop_strings and recipe.trainer.get(key):
            raise UserError("policy.stop_strings", f"are not looked for by trainer.{key}.", "Drop one of them.")
    if recipe.policy.stop_strings and recipe.trainer.get("use_vllm"):
        raise UserError(
            "policy.stop_strings", "are for transformers generation.", "Under vLLM: trainer.generation_kwargs.stop."
        )
    if recipe.policy.path == TINY_POLICY and recipe.policy.prompt_style == "plain":
        raise UserError("policy.prompt_style", f"{TINY_POLICY} is warm-started on chat prompts.", "Use chat.")
    if recipe.policy.path == TINY_POLICY and recipe.policy.revision:
        raise UserError("policy.revision", f"{TINY_POLICY} is made here and has no revisions.", "Remove the key.")
