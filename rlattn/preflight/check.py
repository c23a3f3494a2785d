"""`rlattn check`: would this recipe run, and does it fit? Configuration files only; imports neither torch nor TRL."""

import json
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlattn.errors import HubUnreachable, UserError, describe
from rlattn.files import shipped_dir
from rlattn.preflight.architectures import MOST_LAYERS, NoSuchLayer, read_model
from rlattn.preflight.hub import go_offline_if_unreachable
from rlattn.preflight.memory import MemoryEstimate, count_parameters, estimate_memory, lora_parameters
from rlattn.preflight.tokenizer_files import check_tokenizer_files
from rlattn.preflight.weight_files import ADAPTER_CONFIG, adapter_as_policy, check_no_adapter
from rlattn.recipe.build import build_credit, build_rewards, build_task
from rlattn.recipe.constraints import (
    check_built,
    check_installed,
    check_layers,
    check_lora_targets,
    check_recipe,
    check_train_rows,
    generation_batch,
    number,
    prompts_a_batch,
)
from rlattn.recipe.grpo_fields import load_fields
from rlattn.recipe.schema import TINY_LAYERS, TINY_POLICY, Recipe
from rlattn.rewards.protocol import lags_of
from rlattn.tasks import DatasetTask
from rlattn.tasks.dataset.task import Look
from rlattn.tasks.rows import check_gold, check_row, rows_of, shared_prompts
from rlattn.types import Messages, Task, WarmStartable

PROMPTS_MEASURED = 200
CHARACTERS_PER_TOKEN = 3  # a cautious guess for English and mathematics
GB = 1e9
READ_WHOLE = 50e6  # bytes of a data file
OFFLOADED = {"optimizer": "optimizer and gradients", "param": "weights"}  # by DeepSpeed's name


class DataFound(NamedTuple):
    """What looking at a task's rows gave."""

    prompts: list[str | Messages]
    """The longest ones."""
    unread: str
    """What could not be looked at."""
    warnings: list[str]


def check(recipe: Recipe, *, ranks: int, gpu_memory: float | None) -> list[str]:
    """Every check that needs no weights. Returns what was found, line by line.

    Args:
        ranks: processes the recipe would be started with.
        gpu_memory: GB of one accelerator; the estimate must fit into it.

    Raises:
        UserError: the first thing that would keep the recipe from running.
    """
    warnings = check_recipe(recipe, ranks)
    try:
        check_installed(recipe)
    except UserError as missing:  # a login node need not have what the run needs
        warnings.append(f"on this machine, {missing}")
    task, rewards, credit = build_task(recipe), build_rewards(recipe), build_credit(recipe)
    check_built(recipe, task, rewards, ranks)
    if recipe.hub_ids:
        go_offline_if_unreachable()
    prompts, unread, about_rows = look_at_data(recipe, task, ranks)
    warnings += about_rows
    weights = ", ".join(f"{name} x {spec.weight:g}" for name, spec in recipe.rewards.named.items())
    batch, group = generation_batch(recipe, ranks), number(recipe, "num_generations", 8)
    lines = [
        f"recipe   {recipe.name}, into {recipe.run_dir}",
        f"task     {type(task).__name__}{unread}",
        f"rewards  {weights} ({recipe.rewards.combine})" if rewards else "",
        f"credit   {type(credit).__name__ if credit else 'equal for every token'}",
        f"batch    {batch} rollouts on {ranks} rank{'s' * (ranks > 1)}: {batch // group} groups of {group}",
    ]
    check_policy(recipe, task)
    lags = set().union(*(lags_of(reward) for reward in rewards.values()))
    if lags and strategy_of(recipe) in ("zero3", "fsdp"):
        raise UserError(
            "rewards", f"a lagged policy needs whole weights on every rank, which {strategy_of(recipe)} spreads.",
            "Use DDP or ZeRO-2; self_monitor also works with source own or external and held_out_every 0.",
        )  # fmt: skip
    lines += _policy_lines(recipe, prompts, ranks, gpu_memory, len(lags))
    if ranks == 1 and strategy_of(recipe) != "ddp":
        warnings.append(f"{strategy_of(recipe)} spreads the weights over ranks: give --ranks N for what a run needs")
    return [*lines, *(f"warning: {warning}" for warning in warnings)]


def model_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json: from its folder, the shipped copies, the local hub cache, or the hub."""
    folder = Path(path)
    if folder.is_file():
        raise UserError("policy.path", f"{path} is a file.", "Expected a folder, a hub id or tiny-reasoner.")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError("policy.path", f"{folder} has no config.json.", "Name a folder saved by save_pretrained.")
        return _read_json(folder / "config.json")
    shipped = shipped_dir("data") / "model_configs" / f"{path.replace('/', '--')}.json"
    if shipped.is_file() and revision is None:
        return _read_json(shipped)
    import huggingface_hub

    try:
        return _read_json(Path(huggingface_hub.hf_hub_download(path, "config.json", revision=revision)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        with suppress(OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
            huggingface_hub.hf_hub_download(path, ADAPTER_CONFIG, revision=revision)
            raise adapter_as_policy(path) from None
        known = [TINY_POLICY, *(file.stem.replace("--", "/") for file in shipped.parent.glob("*.json"))]
        near = get_close_matches(path, known, n=1, cutoff=0.8)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise UserError(
            "policy.path",
            f"'{path}' is no local folder, and the hub does not give its configuration ({type(error).__name__}).",
            f"{hint}Check the name and the network, or give a local folder.",
        ) from None


def check_policy(recipe: Recipe, task: Task | None = None) -> dict[str, Any]:
    """The policy's config.json, if it is not made here. Raises UserError where there is none."""
    policy = recipe.policy
    if policy.path == TINY_POLICY:
        check_layers(recipe, ("full_attention",) * TINY_LAYERS)
        if task is not None and not isinstance(task, WarmStartable):
            raise UserError(
                "policy.path",
                f"{TINY_POLICY} learns a task's format from its trace(), which {type(task).__name__} has not.",
                "Use a task that has one (arithmetic, countdown, ledger, questions), or a pretrained policy.",
            )
        return {}
    if Path(policy.path).is_dir() and policy.revision:
        raise UserError("policy.revision", "is for hub ids; this policy is a local folder.", "Remove the key.")
    check_no_adapter(policy.path)
    config = model_config(policy.path, policy.revision)
    if not isinstance(config.get("model_type"), str):
        raise UserError("policy.path", f"{policy.path} has a config.json without a model_type.", "Is it a model?")
    text = config.get("text_config") or config
    with suppress(ValueError):  # an architecture that rlattn cannot count
        check_lora_targets(policy, shared="embed_tokens" if read_model(config).tied else "")
    check_tokenizer_files(policy, text.get("vocab_size"), dict(recipe.trainer.get("chat_template_kwargs") or {}))
    layers = text.get("num_hidden_layers")
    if isinstance(layers, int) and 0 < layers <= MOST_LAYERS:
        check_layers(recipe, tuple(text.get("layer_types") or ("full_attention",) * layers))
    kind = text.get("model_type")  # a text tower may leave it out
    if recipe.credit and isinstance(kind, str) and not reads_attention(kind):
        problem = f"{policy.path} ({kind}) has no attention whose queries and keys can be read."
        raise UserError("credit", problem, "Leave credit out for it, or take another policy.")
    return config


def reads_attention(model_type: str) -> bool:
    """Whether transformers' model file calls the attention functions that `capture` reads; True where that is unknown.

    Imports nothing: transformers takes seconds, and its file's text says it.
    """
    package = find_spec("transformers")
    places = package.submodule_search_locations if package else None
    folder = Path(places[0], "models", model_type.replace("-", "_")) if places else None
    files = sorted(folder.glob("modeling_*.py")) if folder else []
    return not files or any("ALL_ATTENTION_FUNCTIONS" in file.read_text(encoding="utf-8") for file in files)


def strategy_of(recipe: Recipe) -> str:
    """How weights and states are spread over ranks: ddp, zero1 to zero3, fsdp."""
    if recipe.trainer.get("deepspeed"):
        stage = _zero_options(recipe).get("stage", 0)
        if stage not in (0, 1, 2, 3):
            raise UserError("trainer.deepspeed", "has no zero_optimization.stage of 0 to 3.", "See launch/deepspeed/.")
        return f"zero{stage}" if stage else "ddp"
    return "fsdp" if recipe.trainer.get("fsdp") else "ddp"


def offloaded(recipe: Recipe) -> tuple[str, ...]:
    """What DeepSpeed keeps in the machine's memory: "optimizer", "param"."""
    zero = _zero_options(recipe) if recipe.trainer.get("deepspeed") else {}
    options = {part: zero.get(f"offload_{part}") for part in OFFLOADED}
    return tuple(part for part, to in options.items() if isinstance(to, dict) and to.get("device", "none") != "none")


def _zero_options(recipe: Recipe) -> dict[str, Any]:
    deepspeed = recipe.trainer["deepspeed"]
    config = deepspeed if isinstance(deepspeed, dict) else _read_json(Path(str(deepspeed)))
    zero = config.get("zero_optimization", {})
    return zero if isinstance(zero, dict) else {"stage": None}


def _policy_lines(
    recipe: Recipe, prompts: list[str | Messages], ranks: int, gpu_memory: float | None, lagged_copies: int
) -> list[str]:
    policy = recipe.policy
    if policy.path == TINY_POLICY:
        return [f"policy   {TINY_POLICY}: 1 to 3 M parameters, made and warm-started on the spot; fits anywhere"]
    config = check_policy(recipe)
    completion = number(recipe, "max_completion_length", 512)
    prompt, how = prompt_tokens(prompts, policy.path)
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


def look_at_data(recipe: Recipe, task: Task, ranks: int) -> DataFound:
    """The task's rows, looked at; a hub out of reach is for `train` to refuse.

    Every row of small local files is read and checked, the head of large ones and of what lies on the hub.

    Raises:
        UserError: a row cannot be used, or there are too few.
    """
    try:
        seen = _look(recipe, task, ranks)
    except HubUnreachable as error:
        return DataFound([], f", its columns not checked: {error.problem}", [])
    train = seen.train[: recipe.task.rl_rows]
    if seen.whole or len(train) < len(seen.train):
        check_train_rows(recipe, len(train), ranks)
    warnings = shared_prompts(task, train, seen.held_out)
    if seen.left_out:
        warnings.append(f"task: {seen.left_out} bad rows of the stream will be left out.")
    prompts = sorted((row["prompt"] for row in [*train, *seen.held_out]), key=_characters, reverse=True)
    return DataFound(prompts[:PROMPTS_MEASURED], "" if seen.whole else ", only its head checked", warnings)


def _look(recipe: Recipe, task: Task, ranks: int) -> Look:
    needed = max(PROMPTS_MEASURED, prompts_a_batch(recipe, ranks), recipe.task.rl_rows or 0)
    if isinstance(task, DatasetTask):
        size = task.local_size
        return task.look(None if size is not None and size < READ_WHOLE else needed + task.eval_rows)
    check_gold(task)
    train, held_out = (
        list(rows if isinstance(rows, list | tuple) else islice(rows, needed))
        for rows in (rows_of(task, "train"), rows_of(task, "eval"))
    )
    for name, split in (("training", train), ("held-out", held_out)):
        for place, row in enumerate(split, 1):
            check_row(row, f"{name} row {place}")
    return Look(train, held_out, 0, len(train) != needed)


def _characters(prompt: str | Messages) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(str(message.get("content"))) for message in prompt)


def prompt_tokens(prompts: list[str | Messages], path: str) -> tuple[int, str]:
    """The longest of the prompts in tokens, and whether that is exact or guessed from its characters."""
    texts = [p if isinstance(p, str) else "\n".join(str(message["content"]) for message in p) for p in prompts]
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return max((len(tokenizer.encode(text).ids) for text in texts), default=0), "of"
    return max((len(text) for text in texts), default=0) // CHARACTERS_PER_TOKEN, "about" if texts else "unread,"


def _as_list(targets: str | tuple[str, ...] | list[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(str(path), f"not readable as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise UserError(str(path), "expected a JSON object.")
    return data
