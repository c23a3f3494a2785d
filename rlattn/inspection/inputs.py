"""What `rlattn inspect` reads: texts and a model, checked as far as can be before any weight is loaded.

`texts_of` and `check_model_path` import nothing heavy; the others need transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from rlattn.errors import UserError, describe, did_you_mean
from rlattn.files import expanded, is_there
from rlattn.preflight.weight_files import base_of
from rlattn.recipe.schema import TINY_POLICY
from rlattn.tasks.dataset.readers import data_files, is_hub_id, read_rows
from rlattn.tasks.rows import ANSWERED, END_IN_QUESTION, is_answered, is_prompt
from rlattn.types import AttentionOptions, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
LOADABLE = ("config.json", "adapter_config.json", "environment.json")  # a folder with one of them can be named
ALIKE = 0.75  # from here on a bare name is a typo of a folder's rather than a hub id
RESPONSE_COLUMNS = ("response", "completion")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt and what followed it."""

    where: str
    """Where it comes from, for messages: `--prompt`, or a file and row."""
    prompt: str | Messages
    response: str | None
    """None: the model is to write it."""


def texts_of(prompt: str | None, response: str | None, data: Path | None) -> list[Text]:
    """The texts of `--prompt` and `--response`, or of `--data`; at least one.

    Raises:
        UserError: none is given, both ways are, or one of them is empty or unreadable.
    """
    if data is not None:
        if prompt is not None or response is not None:
            raise UserError("--data", "and --prompt or --response both name the text.", "Keep one.")
        return _texts_in(data)
    if prompt is None and response is not None:
        raise UserError("--response", "needs the prompt that it answers.", "Add --prompt.")
    if prompt is None:
        raise UserError(
            "--prompt",
            "is missing: there is no text to inspect.",
            "Give --prompt TEXT (and --response TEXT, else the model writes one), or --data FILE with `prompt` and "
            "`response` on every line.",
        )
    for option, given in (("--prompt", prompt), ("--response", response or "")):
        try:
            given.encode()
        except UnicodeEncodeError:
            fix = "Write it in a UTF-8 file, and give that with --data."
            raise UserError(option, "is not UTF-8 text.", fix) from None
    if not prompt.strip():
        raise UserError("--prompt", "is empty.", "Give some text.")
    if response is not None and not response.strip():
        raise UserError("--response", "is empty.", "Give some text, or leave it out: the model then writes one.")
    return [Text(where="--prompt", prompt=prompt, response=response)]


def _texts_in(data: Path) -> list[Text]:
    if expanded(data).is_dir():
        raise UserError("--data", f"{data} is a folder.", "Name a file with `prompt` and `response` on every line.")
    (file,) = data_files(str(data), "train")
    texts = [_text(row, f"{data}, row {number}") for number, row in read_rows(file)]
    if not texts:
        raise UserError("--data", f"{data} is empty.", "Expected one object with `prompt` and `response` a line.")
    return texts


def _text(row: Mapping[str, Any], where: str) -> Text:
    if "prompt" not in row:
        raise UserError(where, "has no column 'prompt'.", did_you_mean("prompt", row))
    column = next((name for name in RESPONSE_COLUMNS if name in row), None)
    if column is None:
        others = [name for name in row if name != "prompt"]
        raise UserError(where, "has no column 'response' (or 'completion').", did_you_mean("response", others))
    if not is_prompt(row["prompt"]):
        raise UserError(where, "its prompt is neither text nor chat messages.", "Fill or remove the row.")
    if is_answered(row["prompt"]):
        raise UserError(where, f"its prompt {ANSWERED}", END_IN_QUESTION)
    if not isinstance(row[column], str) or not row[column].strip():
        raise UserError(where, f"its {column} is empty or no text.", "Fill or remove the row.")
    return Text(where=where, prompt=row["prompt"], response=row[column])


def check_model_path(model: str, option: str = "--model") -> None:
    """Raises UserError where `model` is neither a model's folder nor anything that could be a hub id."""
    if not model.strip():
        raise UserError(option, "its name is empty.", "Expected a model's folder or a hub id.")
    if model == TINY_POLICY:
        raise UserError(option, f"{TINY_POLICY} is made in a run.", "Name its folder, such as runs/quickstart/model.")
    folder = expanded(model)
    if not is_there(folder):
        in_folder = is_there(folder.parent) and folder.parent.is_dir()
        siblings = [entry.name for entry in folder.parent.iterdir()] if in_folder else []
        local = folder.parent != Path() and bool(siblings)  # a typo in a path rather than a hub id
        if local or not is_hub_id(model):
            raise UserError(option, f"no folder '{model}'.", did_you_mean(folder.name, siblings) if local else "")
        near = get_close_matches(model, filter(_is_loadable, siblings), n=1, cutoff=ALIKE) if "/" not in model else []
        if near:
            fix = f"Did you mean '{near[0]}'? A model of the hub's is named with its owner, OWNER/{model}."
            raise UserError(option, f"no folder '{model}'.", fix)
        return
    if not folder.is_dir():
        raise UserError(option, f"{model} is a file.", "Expected a model's folder or a hub id.")
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        inner = folder / "model"
        fix = f"Did you mean {inner}?" if inner.is_dir() else "Name a folder saved by save_pretrained."
        raise UserError(option, f"{model} has no config.json.", fix)
    if not any(found for pattern in TOKENIZER_FILES for found in folder.glob(pattern)):
        raise UserError(option, f"{model} has no tokenizer.", f"Save it there: tokenizer.save_pretrained('{model}').")


def _is_loadable(folder: str) -> bool:
    return any((Path(folder) / file).is_file() for file in LOADABLE)


def make_folder(output: Path) -> None:
    """Makes the output folder before anything slow. Raises UserError where it cannot be one that takes files."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError("--output", f"{output} takes no files: {describe(error)}.", "Name another.") from None


def load_config(model: str, option: str = "--model", revision: str | None = None) -> PreTrainedConfig:
    """The model's configuration; of an adapter, its base model's. Raises UserError where there is none."""
    from transformers import AutoConfig

    try:
        adapter = base_of(model)
        if adapter and not (expanded(model) / "config.json").is_file():
            model, revision = adapter
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(model, error, option) from None


def load_tokenizer(model: str, option: str = "--model", revision: str | None = None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:
        if expanded(model).is_dir():
            raise UserError(option, f"{model} has no readable tokenizer: {describe(error)[:200]}") from None
        raise _unreadable(model, error, option) from None


def check_decoder_only(model: str, config: PreTrainedConfig, option: str = "--model") -> None:
    """Raises UserError unless this is a language model that writes text from left to right."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if config.is_encoder_decoder:
        raise _refused(model, config, "is an encoder-decoder", option)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise _refused(model, config, "is an encoder: its tokens see later ones", option)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refused(model, config, "is no language model that writes text from left to right", option)


def check_architecture(
    model: str, config: PreTrainedConfig, options: AttentionOptions, option: str = "--model"
) -> None:
    """Raises UserError unless this is a decoder-only model with attention to read in the layers asked for.

    Builds the model without weights: its structure tells what its configuration may not. Cost: a second or less.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from rlattn.attention.capture import attention_layers, decoder_layers, text_decoder

    check_decoder_only(model, config, option)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(option, f"{model} has a damaged config.json: {describe(error)[:200]}") from None
    try:
        decoder = text_decoder(empty)
        usable = attention_layers(decoder)
        # A model file without attention (Mamba), or with its own, does not know transformers' attention functions.
        readable = hasattr(sys.modules[type(decoder).__module__], "ALL_ATTENTION_FUNCTIONS")
    except ValueError:
        readable = False
    if not readable:
        raise _refused(model, config, "has no full-attention layer whose queries and keys can be read", option)
    if options.layers is None:
        return
    count = len(decoder_layers(decoder))
    if max(options.layers) >= count:
        raise UserError("--layers", f"{model} has layers 0 to {count - 1}, got {max(options.layers)}.")
    linear = [layer for layer in options.layers if layer not in usable]
    if linear:
        raise UserError("--layers", f"layer {linear[0]} of {model} has no full attention.", _usable(usable))


def attention_options(layers: str | None, window: int, horizon: tuple[int, int]) -> AttentionOptions:
    """From the command line's options. Raises UserError."""
    chosen = None
    if layers is not None:
        try:
            chosen = tuple(sorted({int(part) for part in layers.split(",")}))
        except ValueError:
            raise UserError("--layers", f"expected numbers such as 12,15,18, got '{layers}'.") from None
    try:
        return AttentionOptions(layers=chosen, window=window, horizon=horizon)
    except ValueError as error:
        key, _, problem = str(error).partition(": ")
        raise UserError(f"--{key}", f"{problem}.") from None


def _refused(model: str, config: PreTrainedConfig, what: str, option: str) -> UserError:
    return UserError(option, f"{model} ({config.model_type}) {what}.", "Expected a decoder-only language model.")


def _usable(layers: Sequence[int]) -> str:
    return f"Those that have: {', '.join(map(str, layers[:20]))}{', …' if len(layers) > 20 else ''}."


def _unreadable(model: str, error: Exception, option: str) -> UserError:
    if expanded(model).is_dir():
        return UserError(option, f"{model} has no readable config.json: {describe(error)[:200]}")
    return UserError(
        option,
        f"'{model}' is neither a local folder nor a model the hub gives ({describe(error)[:200]}).",
        "Check its name and the network; a gated model needs `hf auth login`.",
    )
