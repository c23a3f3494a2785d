"""Takes texts and a model to the signals of every text (arXiv 2510.13554, section 4).

Legend: T response tokens, L chosen layers, H heads, N positions (prompt and response), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlattn.attention.capture import capture, token_entropy
from rlattn.attention.heads import average_over, receiver_heads
from rlattn.errors import UserError, describe
from rlattn.inspection.inputs import Text, check_architecture, load_config, load_tokenizer
from rlattn.policy.generate import write_hf
from rlattn.policy.load import load_model
from rlattn.policy.prompts import chat_or_plain, piece_ids, render_ids, rendered_mark
from rlattn.preflight.weight_files import check_weight_files
from rlattn.progress import progress
from rlattn.rank import say
from rlattn.recipe.schema import Policy
from rlattn.types import AttentionOptions


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A text as the model reads it."""

    text: Text
    prompt_ids: list[int]
    response_ids: list[int]
    """Empty where the model is to write it."""


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """What one text's attention says; the signals run over its response only."""

    waad_T: Tensor
    fai_T: Tensor
    entropy_T: Tensor
    receiver_fai_T: Tensor
    """FAI averaged over the receiver heads instead of the global ones."""
    span_LH: Tensor
    kurtosis_LH: Tensor
    local_LH: Tensor
    global_LH: Tensor
    receivers_LH: Tensor
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Every text's rhythm, and what it was read with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt_style: str
    texts: list[Encoded]
    rhythms: list[Rhythm]


def read_rhythms(
    model_path: str, texts: Sequence[Text], *, chat: bool | None, options: AttentionOptions, max_new_tokens: int
) -> Reading:
    """Reads every text's rhythm, one forward each.

    Args:
        chat: whether a text prompt becomes a chat message; None: where the tokenizer has a chat template.
        max_new_tokens: of a response that the model writes itself, greedily.

    Raises:
        UserError: the model or a text is not what can be read; before weights are loaded where that can be known.
    """
    config, tokenizer = load_config(model_path), load_tokenizer(model_path)
    check_architecture(model_path, config, options)
    check_weight_files(model_path, "--model")
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    style = _prompt_style(model_path, tokenizer, texts, chat)
    if style.prompt_style == "chat":
        _warn_of_rendered(tokenizer, texts)
    encoded = [_encode(tokenizer, text, style) for text in texts]
    for one in encoded:
        _check_ids(one, model_path, context, text_config.vocab_size)
    model = load_model(model_path, "--model")
    encoded = [one if one.response_ids else _write(model, tokenizer, one, max_new_tokens, context) for one in encoded]
    rhythms = []
    with progress("texts", len(encoded)) as update:
        for done, one in enumerate(encoded, 1):
            rhythms.append(_read(model, one, options, model_path))
            update(done, f"{len(one.response_ids)} tokens")
    return Reading(model=model, tokenizer=tokenizer, prompt_style=style.prompt_style, texts=encoded, rhythms=rhythms)


def _prompt_style(
    model_path: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], chat: bool | None
) -> Policy:
    has_template = tokenizer.chat_template is not None
    messages = next((text.where for text in texts if not isinstance(text.prompt, str)), None)
    if not has_template and chat:
        raise UserError("--chat", f"{model_path} has no chat template.", "Use --plain.")
    if not has_template and messages:
        raise UserError(messages, f"holds chat messages, and {model_path} has no chat template.", "Use text prompts.")
    return Policy(path=model_path, prompt_style="chat" if (has_template if chat is None else chat) else "plain")


def _warn_of_rendered(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> None:
    """A prompt as a run logs it (samples.jsonl) has been through the chat template."""
    for text in texts:
        if mark := rendered_mark(tokenizer, text.prompt):
            say(f"warning: {text.where}: the prompt already begins with {mark}; with --plain it is taken as it is.")
            return


def _encode(tokenizer: PreTrainedTokenizerBase, text: Text, style: Policy) -> Encoded:
    try:
        prompt_ids = render_ids(tokenizer, chat_or_plain(text.prompt, style), {})
    except Exception as error:  # a chat template is a program of the model's
        raise UserError(text.where, f"the chat template refuses it: {describe(error)[:200]}", "Try --plain.") from None
    response_ids = piece_ids(tokenizer, text.response) if text.response else []
    if not prompt_ids:
        raise UserError(text.where, "its prompt gives no tokens with this tokenizer.")
    if text.response and not response_ids:
        raise UserError(text.where, "its response gives no tokens with this tokenizer.")
    return Encoded(text=text, prompt_ids=list(prompt_ids), response_ids=list(response_ids))


def _check_ids(one: Encoded, model_path: str, context: int | None, vocabulary: int) -> None:
    count = len(one.prompt_ids) + max(1, len(one.response_ids))
    if context is not None and count > context:
        parts = f"{len(one.prompt_ids)} prompt and {len(one.response_ids)} response tokens"
        raise UserError(one.text.where, f"{parts} are more than the model's context of {context}.", "Shorten them.")
    largest = max(one.prompt_ids + one.response_ids)
    if largest >= vocabulary:
        problem = f"{model_path} has a tokenizer that gives id {largest}, and a model that knows {vocabulary} ids."
        raise UserError("--model", problem, "They do not belong together.")


@torch.no_grad()
def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, one: Encoded, max_new_tokens: int, context: int | None
) -> Encoded:
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(one.prompt_ids))
    (response_ids,) = write_hf(model, tokenizer, [one.prompt_ids], max_new_tokens=room)
    return replace(one, response_ids=response_ids)


@torch.no_grad()
def _read(model: PreTrainedModel, one: Encoded, options: AttentionOptions, model_path: str) -> Rhythm:
    ids_1N = torch.tensor([one.prompt_ids + one.response_ids], device=model.device)
    real_1N = torch.ones_like(ids_1N)
    response_1N = real_1N.clone()
    response_1N[:, : len(one.prompt_ids)] = 0
    try:
        with capture(model, real_1N, response_1N, options=options) as captured:
            logits_1NV = model(input_ids=ids_1N, attention_mask=real_1N, use_cache=False).logits
        _, _, fai_1LHN = captured.metrics()
    except ValueError as error:
        raise UserError("--model", f"{model_path}: {describe(error)}.") from None
    signals = captured.signals(share=options.share)
    assert signals.span_BLH is not None and signals.local_heads is not None and signals.global_heads is not None
    receivers_1LH, kurtosis_1LH = receiver_heads(fai_1LHN, options.share)
    entropy_1N = token_entropy(logits_1NV, response_1N)
    finite_1N = signals.waad_BN.isfinite() & entropy_1N.isfinite()
    if not finite_1N[response_1N.bool()].all() or not signals.span_BLH.isfinite().all():
        raise _not_finite(model, model_path, one.text.where)
    start = len(one.prompt_ids)
    return Rhythm(
        waad_T=signals.waad_BN[0, start:].cpu(),
        fai_T=signals.fai_BN[0, start:].cpu(),
        entropy_T=entropy_1N[0, start:].cpu(),
        receiver_fai_T=average_over(fai_1LHN, receivers_1LH)[0, start:].cpu(),
        span_LH=signals.span_BLH[0].cpu(),
        kurtosis_LH=kurtosis_1LH[0].cpu(),
        local_LH=signals.local_heads[0].cpu(),
        global_LH=signals.global_heads[0].cpu(),
        receivers_LH=receivers_1LH[0].cpu(),
        layers=signals.layers,
    )


def _not_finite(model: PreTrainedModel, model_path: str, where: str) -> UserError:
    damaged = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    cause = f"its weights hold NaN or inf, first in {damaged}" if damaged else f"it overflows in {model.dtype}"
    return UserError("--model", f"{model_path} gives no finite numbers ({where}): {cause}.")
