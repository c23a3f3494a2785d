"""A policy's configuration files: is it a model that this recipe can train? Imports neither torch nor transformers."""

import json
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlattn.errors import UserError
from rlattn.files import shipped_dir
from rlattn.preflight.architectures import MOST_LAYERS, read_model
from rlattn.preflight.tokenizer_files import check_tokenizer_files
from rlattn.preflight.weight_files import ADAPTER_CONFIG, adapter_as_policy, check_no_adapter
from rlattn.recipe.constraints import check_layers, check_lora_targets
from rlattn.recipe.schema import TINY_LAYERS, TINY_POLICY, Recipe
from rlattn.types import Task, WarmStartable


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


def teachable(task: Task) -> WarmStartable:
    """The task, if it can teach the tiny policy its format. Raises UserError where it cannot."""
    if not isinstance(task, WarmStartable):
        raise UserError(
            "policy.path",
            f"{TINY_POLICY} learns a task's format from its trace(), which {type(task).__name__} has not.",
            "Use a task that has one (arithmetic, countdown, ledger, questions), or a pretrained policy.",
        )
    return task


def check_policy(recipe: Recipe, task: Task | None = None) -> dict[str, Any]:
    """The policy's config.json, if it is not made here. Raises UserError where there is none."""
    policy = recipe.policy
    if policy.path == TINY_POLICY:
        check_layers(recipe, ("full_attention",) * TINY_LAYERS)
        if task is not None:
            teachable(task)
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
    check_tokenizer_files(policy, text.get("vocab_size"), recipe.template_kwargs)
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(str(path), f"not readable as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise UserError(str(path), "expected a JSON object.")
    return data


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


OFFLOADED = {"optimizer": "optimizer and gradients", "param": "weights"}  # by DeepSpeed's name
