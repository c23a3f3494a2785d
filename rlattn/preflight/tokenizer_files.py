"""Whether a policy's tokenizer can do what a recipe asks, as far as a local folder's files tell; imports no torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlattn.errors import UserError, describe
from rlattn.recipe.schema import Policy
from rlattn.types import Messages


def check_tokenizer_files(policy: Policy, vocabulary: object, template_kwargs: dict[str, Any]) -> None:
    """Raises UserError where a local folder's padding token has no embedding, or its chat template refuses the recipe's
    system prompt. What the files do not tell, and a model of the hub's, is for the run to judge.
    """
    folder = Path(policy.path)
    settings = _json(folder / "tokenizer_config.json")
    pad = settings.get("pad_token") or settings.get("eos_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    added = _json(folder / "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(vocabulary, int) and token.get("content") == pad and token.get("id", 0) >= vocabulary:
            raise beyond_embeddings("policy.path", policy.path, str(pad), token["id"], vocabulary)
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(template, str):
        check_system_prompt(policy, lambda messages: _rendered(template, messages, template_kwargs))


def beyond_embeddings(where: str, model: str, token: str, token_id: int, vocabulary: int) -> UserError:
    return UserError(
        where,
        f"the tokenizer of {model} gives '{token}' the id {token_id}, and the model has {vocabulary} embeddings.",
        "Resize and save the model, model.resize_token_embeddings(len(tokenizer)), or save a tokenizer without that "
        "token.",
    )


def check_system_prompt(policy: Policy, render: Callable[[str | Messages], str]) -> None:
    """Raises UserError where the policy's chat template, which `render` applies, refuses the recipe's system prompt or
    leaves it out. One that refuses a user's message alone has other faults.
    """
    if not policy.system_prompt or policy.prompt_style == "plain":
        return
    where, fix = "policy.system_prompt", "Drop it, or write it into the prompts."
    try:
        without = render([{"role": "user", "content": "Hello"}])
    except Exception:
        return
    try:
        system = {"role": "system", "content": policy.system_prompt}
        whole = render([system, {"role": "user", "content": "Hello"}])
    except Exception as error:
        problem = f"the chat template of {policy.path} refuses it: {describe(error)[:200]}."
        raise UserError(where, problem, fix) from None
    if whole == without:
        raise UserError(where, f"the chat template of {policy.path} leaves it out.", fix)


class _Refused(Exception):
    """What a chat template raises."""


def _rendered(template: str, messages: str | Messages, template_kwargs: dict[str, Any]) -> str:
    """Messages in a chat template, as transformers renders it, for which transformers imports torch."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise _Refused(message)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.globals["raise_exception"] = raise_exception
    try:
        return jinja.from_string(template).render(messages=messages, add_generation_prompt=True, **template_kwargs)
    except _Refused:
        raise
    except Exception:  # for want of something that transformers provides; the run renders it with that
        return str(messages)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
