"""The built-in policy `tiny-reasoner`: a small Qwen3 and a word tokenizer, made on the spot and taught a task's format.

Numbers 0 to 999, operators, tags and words are one token each. The folder loads with `from_pretrained`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import cos, pi
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers
from filelock import FileLock
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlattn.errors import UserError
from rlattn.formats.transcript import read_transcript
from rlattn.policy.chat_tokens import encode_dialogue
from rlattn.policy.prompts import render_ids
from rlattn.recipe.schema import TINY_CONTEXT, TINY_LAYERS
from rlattn.tasks.guarded_metrics import safe_text
from rlattn.types import DialogueTask, WarmStart

if TYPE_CHECKING:
    from rlattn.types import Row, WarmStartable

Progress = Callable[[int, int, float], None]  # done, of how many (steps, or tokens under a budget), loss

PAD, EOS, UNK = "<|pad|>", "<|end|>", "<|unknown|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
WORD = r"</?\w+>|\d+|[^\W\d]+|[^\w\s]"  # a tag, a number, a word, a sign
SAMPLE = 256  # training rows whose texts give the vocabulary and the cache key


def tiny_policy(
    task: "WarmStartable",
    *,
    warm_start: WarmStart,
    system_prompt: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of a tiny policy taught `task`: model, tokenizer, generation config. Made once, then found again.

    The folder's name is a hash of all that shapes the policy, so other options give another folder. Processes may call
    at once: one trains, the others wait. The caller's random state is left as it was.

    Args:
        cache_dir: where the folders are kept; `$RLATTN_CACHE` or `~/.cache/rlattn` if None.
    """
    rows = list(task.rows("train"))
    texts = _sample_texts(task, rows, warm_start.noise, warm_start.seed)
    tokenizer = _tokenizer([*texts, system_prompt or ""])
    config = _config(tokenizer)
    key = {
        "code": Path(__file__).read_text(encoding="utf-8"),
        "config": config.to_dict(),
        "vocabulary": tokenizer.get_vocab(),
        "warm_start": asdict(warm_start),
        "system_prompt": system_prompt,
        "texts": texts,
        "rows": len(rows),
        "versions": [torch.__version__, transformers.__version__, tokenizers.__version__],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    cache = Path(cache_dir or os.environ.get("RLATTN_CACHE") or Path.home() / ".cache" / "rlattn").expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("RLATTN_CACHE", f"{cache} cannot be a folder: {error.strerror}.", "Name another.") from None
    folder = cache / f"tiny-reasoner-{digest}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(warm_start.seed)
                model = _model(config, tokenizer)
            train_supervised(
                model,
                tokenizer,
                task,
                noise=warm_start.noise,
                batch_size=warm_start.batch_size,
                learning_rate=warm_start.learning_rate,
                seed=warm_start.seed,
                system_prompt=system_prompt,
                steps=warm_start.steps,
                progress=progress,
            )
            model.generation_config = GenerationConfig(
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
            )
            # written beside and renamed: a folder that exists is whole
            beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
            try:
                model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
                assert (beside / "config.json").is_file(), "transformers saves on rank 0 only once ranks are connected"
                beside.chmod(0o755)
                beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return folder


def train_supervised(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    task: "WarmStartable",
    *,
    noise: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    system_prompt: str | None = None,
    steps: int | None = None,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Trains `model` in place on fresh traces of the training split, with loss on the response only.

    Muon on the layers' matrices (it learns these tasks in a fraction of AdamW's steps) and AdamW on the rest; a short
    linear warm-up, then a cosine to a tenth of `learning_rate`.

    Args:
        steps: optimizer steps; give this or `token_budget`.
        token_budget: prompt and response tokens to process, padding apart; the last batch may exceed it.

    Returns:
        The prompt and response tokens that were processed.
    """
    if (steps is None) == (token_budget is None):
        raise ValueError("expected either steps or token_budget")
    budget = token_budget or 0
    batches = _batches(tokenizer, task, noise=noise, batch_size=batch_size, seed=seed, system_prompt=system_prompt)
    optimizers = _optimizers(model, learning_rate)
    was_training, step, tokens = model.training, 0, 0
    model.train()
    while (done := step / steps if steps else tokens / budget if budget else 1.0) < 1.0:
        input_ids, labels, count = next(batches)
        input_ids, labels = input_ids.to(model.device), labels.to(model.device)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1 + cos(pi * done)))
        # pads are on the right, where a causal model never looks back from: no attention mask is needed
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        predicted = labels[:, 1:] != -100
        loss = cross_entropy(logits[predicted].float(), labels[:, 1:][predicted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with _Float32():
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + count
        if progress:
            progress(*((step, steps) if steps else (min(tokens, budget), budget)), loss.item())
    model.train(was_training)
    return tokens


class _Float32(TorchFunctionMode):
    """Keeps torch's Muon from orthogonalising in bfloat16: a CPU without instructions for it takes many times as long
    as in float32, and a warm start would spend three quarters of its time there.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {})) if func is not torch.Tensor.bfloat16 else args[0].float()


def _optimizers(model: transformers.PreTrainedModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for weight in model.parameters():
        (matrices if weight.ndim == 2 and id(weight) not in ends else rest).append(weight)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _batches(
    tokenizer: transformers.PreTrainedTokenizerBase,
    task: "WarmStartable",
    *,
    noise: float,
    batch_size: int,
    seed: int,
    system_prompt: str | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless (input_ids, labels, tokens): random rows, a fresh trace each, labels -100 but on the response, of a
    dialogue but on the policy's turns.
    """
    rng = Random(seed)
    rows = list(task.rows("train"))
    prompts: dict[int, list[int]] = {}
    written = safe_text(task, "trace")
    while True:
        sequences = []
        for index in rng.choices(range(len(rows)), k=batch_size):
            row = rows[index]
            if index not in prompts:
                prompts[index] = _prompt_ids(tokenizer, row, system_prompt)
            trace = written(row, rng, noise)
            if trace is None:
                continue
            turns = read_transcript(trace) if isinstance(task, DialogueTask) else [(trace, None)]
            sequences.append((prompts[index], *encode_dialogue(tokenizer, turns)))
        if not sequences:
            problem = f"its trace() fails on every row of a batch of the warm start, first with {written.problem}."
            raise UserError("task", problem, "Mend it.")
        longest = max(len(prompt) + len(response) for prompt, response, _ in sequences)
        input_ids = torch.full((len(sequences), longest), tokenizer.pad_token_id)
        labels = torch.full((len(sequences), longest), -100)
        for i, (prompt, response, own) in enumerate(sequences):
            end = len(prompt) + len(response)
            input_ids[i, :end] = torch.tensor(prompt + response)
            labels[i, len(prompt) : end] = torch.where(torch.tensor(own), torch.tensor(response), -100)
        yield input_ids, labels, sum(len(prompt) + len(response) for prompt, response, _ in sequences)


def _prompt_ids(tokenizer: transformers.PreTrainedTokenizerBase, row: "Row", system_prompt: str | None) -> list[int]:
    """The ids that the trainer will make of the same row."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return list(render_ids(tokenizer, [*system, {"role": "user", "content": row["prompt"]}], {}))


def _sample_texts(task: "WarmStartable", rows: "list[Row]", noise: float, seed: int) -> list[str]:
    """Prompts and responses of a fixed sample of training rows."""
    rng = Random(seed)
    sample = rng.sample(rows, min(SAMPLE, len(rows)))
    misunderstood = [task.reply("", rows[0]) or ""] if isinstance(task, DialogueTask) else []
    gold, written = safe_text(task, "gold"), safe_text(task, "trace")
    texts = [text for row in sample for text in (row["prompt"], gold(row), written(row, rng, noise))]
    return misunderstood + [text for text in texts if text is not None]


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A word tokenizer over the numbers 0 to 999 and every word of `texts`."""
    split = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.WhitespaceSplit(),
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD), behavior="isolated"),
        ]
    )
    words = {word for text in set(texts) for word, _ in split.pre_tokenize_str(text)}
    numbers = [str(number) for number in range(1000)]
    special = [PAD, EOS, UNK, *(f"<|{role}|>" for role in ROLES)]
    vocabulary = {
        token: i for i, token in enumerate([*special, *numbers, *sorted(words - set(numbers) - set(special))])
    }
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=special[3:],
        padding_side="left",
        model_max_length=TINY_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(config: Qwen3Config, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh model in which a number's embedding starts as the sum of its digits', one vector a digit and place.

    Else the digits of 1000 unrelated tokens would have to be learned one by one.
    """
    model = Qwen3ForCausalLM(config).float()
    embeddings = model.get_input_embeddings().weight
    digits = torch.randn(3, 10, config.hidden_size) * config.initializer_range
    numbers = torch.arange(1000)
    with torch.no_grad():
        for place, vectors in enumerate(digits):
            embeddings[tokenizer.convert_tokens_to_ids("0") :][:1000] += vectors[numbers // 10**place % 10]
    return model


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
