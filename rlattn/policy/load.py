"""The policy: the built-in tiny one, a local folder or a hub id; its tokenizer and adapters."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from rlattn.attention.heads import layer_types
from rlattn.errors import UserError, describe
from rlattn.policy.prompts import render_ids
from rlattn.preflight.architectures import NoSuchLayer, lora_parameters
from rlattn.preflight.policy_files import teachable
from rlattn.preflight.tokenizer_files import beyond_embeddings
from rlattn.preflight.weight_files import adapter_as_policy, base_of
from rlattn.recipe.constraints import check_lora_targets
from rlattn.recipe.schema import TINY_POLICY, Policy
from rlattn.types import Task, WarmStart


@dataclass(frozen=True, kw_only=True)
class PolicySource:
    """What TRL needs to load a policy; no weight has been read yet."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    """Longest prompt plus completion the model was made for, in tokens; None where its configuration does not say."""
    layer_types: tuple[str, ...]
    """The kind of every layer, as transformers names it (`full_attention`, `linear_attention`, …)."""
    init_kwargs: dict[str, Any]
    peft_config: LoraConfig | None


def prepare_policy(policy: Policy, task: Task, progress: Callable[..., None] | None = None) -> PolicySource:
    """Makes the tiny policy where asked, and reads configuration and tokenizer; loads no weights.

    Raises:
        UserError: the path or hub id leads to no model, or its tokenizer cannot do what the recipe asks.
    """
    path = policy.path
    if path == TINY_POLICY:
        path = str(make_tiny_policy(policy, task, progress))
    try:
        adapter = find_adapter_config_file(path, revision=policy.revision)
    except OSError:
        adapter = None  # a model that is not there either, which is told below
    if adapter is not None:
        raise adapter_as_policy(path)
    try:
        config = AutoConfig.from_pretrained(path, revision=policy.revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=policy.revision, trust_remote_code=False, padding_side="left", truncation_side="left"
        )
    except Exception as error:
        raise _load_error(policy, path, error) from None
    empty = check_fit(path, "policy.path", config, policy.revision)
    _check_lora(policy, config.to_dict(), empty)
    if policy.prompt_style == "chat" and tokenizer.chat_template is None:
        raise UserError(
            "policy.prompt_style", f"{policy.path} has no chat template.", "Use `prompt_style: plain` for a base model."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        problem = f"the tokenizer of {path} has neither a padding nor an end token."
        raise UserError("policy.path", problem, "Set its eos_token and save it.")
    check_vocabulary(path, "policy.path", tokenizer, config)
    return PolicySource(
        path=path,
        tokenizer=tokenizer,
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        layer_types=layer_types(config.get_text_config()),
        init_kwargs={
            "dtype": policy.dtype,
            "attn_implementation": policy.attn_implementation,
            **({"revision": policy.revision} if policy.revision else {}),
        },
        peft_config=_lora(policy),
    )


def load_model(path: str, option: str, revision: str | None = None) -> PreTrainedModel:
    """A folder's or hub id's weights, an adapter's over its base, to read and not to train; on the GPU where there is
    one, in the dtype they are stored in. Raises UserError that names `option`.
    """
    try:
        adapter = base_of(path)
        if adapter:  # transformers then gives an account of the adapter's weights alone
            base, revision = adapter
            config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
            check_fit(base, option, config, revision)
        how: dict[str, Any] = {"revision": revision, "dtype": "auto", "ignore_mismatched_sizes": not adapter}
        model, loaded = _loaded(AutoModelForCausalLM, path, **how)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(option, f"{path} holds no loadable weights: {describe(error)[:200]}") from None
    _check_complete(path, option, loaded)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def check_fit(path: str, option: str, config: PreTrainedConfig, revision: str | None = None) -> PreTrainedModel | None:
    """Raises UserError where transformers would train random weights for want of stored ones, or could not load them
    for their shapes. Loads onto no device: of safetensors files the headers are all that is read.

    Returns:
        The model, its weights on no device; None where it cannot be loaded this way.
    """
    named = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)  # which TRL takes too
    try:
        how: dict[str, Any] = {"revision": revision, "device_map": "meta", "ignore_mismatched_sizes": True}
        model, loaded = _loaded(named, path, **how)
    except Exception:
        return None  # what cannot be loaded this way, such as quantised weights, is for the real loading to judge
    _check_complete(path, option, loaded)
    return model


def check_vocabulary(path: str, option: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises UserError where a token that every batch holds, for padding or from the chat template, has no embedding:
    a tokenizer may have got tokens that its model was never resized for.
    """
    ids = tokenizer("Hello")["input_ids"]
    if tokenizer.chat_template is not None:
        with suppress(Exception):  # a template that refuses this refuses the prompts too, which are looked at apart
            ids = render_ids(tokenizer, [{"role": "user", "content": "Hello"}], {})
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    vocabulary = config.get_text_config().vocab_size
    for token in [*ids, *([] if pad is None else [pad])]:
        if token >= vocabulary:
            raise beyond_embeddings(option, path, str(tokenizer.convert_ids_to_tokens(token)), token, vocabulary)


def _loaded(kind: Any, path: str, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' account of the weights that it did not find or could not use."""
    return kind.from_pretrained(path, trust_remote_code=False, output_loading_info=True, **how)


def _check_complete(path: str, option: str, loaded: dict[str, Any]) -> None:
    if unlike := sorted(loaded["mismatched_keys"]):
        name, stored, expected = unlike[0]
        problem = f"{path} stores {name} as {tuple(stored)}, and its config.json means {tuple(expected)}."
        raise UserError(option, problem, "They do not belong together.")
    if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random ones
        problem = f"{path} lacks {len(missing)} of its model's weights, first {missing[0]}."
        raise UserError(option, problem, "Copy or save it anew.")


def make_tiny_policy(policy: Policy, task: Task, progress: Callable[..., None] | None = None) -> Path:
    """The folder of the built-in policy, warm-started on the task's own traces; made once, then read from the cache."""
    from rlattn.policy.tiny import tiny_policy

    warm_start = policy.warm_start or WarmStart()
    return tiny_policy(teachable(task), warm_start=warm_start, system_prompt=policy.system_prompt, progress=progress)


def _check_lora(policy: Policy, config: dict[str, Any], model: PreTrainedModel | None) -> None:
    """PEFT and TRL would refuse the same, except for tied embeddings, but only once the weights are loaded."""
    if policy.lora is None or isinstance(policy.lora.target_modules, str):
        return
    if model is not None and (head := model.get_output_embeddings()) is not None:
        embeddings = model.get_input_embeddings()
        names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
        tied = embeddings.weight is head.weight
        check_lora_targets(policy, output=names[id(head)], shared=names[id(embeddings)] if tied else "")
    try:
        lora_parameters(config, policy.lora.r, list(policy.lora.target_modules))
    except NoSuchLayer as error:
        raise UserError("policy.lora.target_modules", f"{error}.") from None
    except ValueError:
        return  # an architecture that rlattn cannot count: PEFT will judge


def _lora(policy: Policy) -> LoraConfig | None:
    lora = policy.lora
    if lora is None:
        return None
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        revision=policy.revision,
    )


def _load_error(policy: Policy, path: str, error: Exception) -> UserError:
    if Path(path).is_dir():
        return UserError("policy.path", f"{path} holds no loadable model: {describe(error)[:300]}.")
    revision = f" at revision '{policy.revision}'" if policy.revision else ""
    return UserError(
        "policy.path",
        f"'{policy.path}'{revision} is neither a local folder nor a model the hub gives ({describe(error)[:200]}).",
        f"Check its name and the network; a gated model needs `hf auth login`; `path: {TINY_POLICY}` needs nothing.",
    )
