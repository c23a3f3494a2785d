"""A decoder's sizes from its `config.json` alone: parameters, linear layers, adapters. Standard library only.

Exact for the architectures in ARCHITECTURES, as transformers 5 builds them (tested against it and against peft).
"""

from collections.abc import Iterator
from dataclasses import dataclass

MOST_LAYERS = 10_000  # a damaged config.json should not keep a check busy for hours


class NoSuchLayer(ValueError):
    """LoRA target modules that a model does not have."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What tells one transformers decoder from the next."""

    norms: int = 2  # hidden-size RMSNorms a layer
    qk_norm: str = ""  # "head": over head_dim; "all": over all heads at once
    attention_bias: bool | None = False  # of q, k, v and o; None: config["attention_bias"] decides
    qkv_bias: bool = False
    mlp_bias: bool = False  # True: config["mlp_bias"] decides
    fused: bool = False  # qkv_proj and gate_up_proj
    tied: bool = False  # tie_word_embeddings where config.json leaves it out
    norm_float32: bool = False  # RMSNorm multiplies by its weight in float32
    scores: str = ""  # "softcap", "sinks": attention scores are materialised, as SDPA has neither
    mlp_saved: int = 4  # what autograd saves of an MLP, in multiples of its intermediate size
    window_every: int = 0  # n: all but every n-th layer attend within sliding_window; -1: all do; 0: none
    defaults: tuple[tuple[str, int], ...] = ()  # keys the published config.json files leave out


_GEMMA3 = (("vocab_size", 262208), ("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 256))
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(attention_bias=None, mlp_bias=True),
    "mistral": Architecture(window_every=-1),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qk_norm="head", attention_bias=None, defaults=(("head_dim", 128),)),
    "qwen3_moe": Architecture(qk_norm="head", attention_bias=None),
    "gemma2": Architecture(
        norms=4, attention_bias=None, tied=True, norm_float32=True, scores="softcap", window_every=2
    ),
    "gemma3_text": Architecture(
        norms=4, qk_norm="head", attention_bias=None, tied=True, norm_float32=True, window_every=6, defaults=_GEMMA3
    ),
    "phi3": Architecture(fused=True, window_every=-1),
    "olmo2": Architecture(qk_norm="all", attention_bias=None, norm_float32=True),
    "gpt_oss": Architecture(attention_bias=None, scores="sinks", mlp_saved=8, window_every=2),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A config.json, read: sizes under short names."""

    architecture: Architecture
    config: dict
    tied: bool
    hidden: int
    layers: int
    vocabulary: int
    heads: int
    queries: int  # heads · head_dim
    keys: int  # key-value heads · head_dim
    head_dim: int


def read_model(config: dict) -> Model:
    text = config.get("text_config") or config
    kind = text.get("model_type", "none")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not supported: its parameters cannot be counted from config.json")
    architecture = ARCHITECTURES[kind]
    text = {**dict(architecture.defaults), **text}
    if text.get("num_hidden_layers", 0) > MOST_LAYERS:
        raise ValueError(f"config.json has {text['num_hidden_layers']} layers, which no model has")
    try:
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        head_dim = text.get("head_dim") or hidden // heads
        keys = (text.get("num_key_value_heads") or heads) * head_dim
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", architecture.tied))
        return Model(
            architecture=architecture, config=text, tied=tied, hidden=hidden, layers=text["num_hidden_layers"],
            vocabulary=text["vocab_size"], heads=heads, head_dim=head_dim, queries=heads * head_dim, keys=keys,
        )  # fmt: skip
    except KeyError as missing:
        raise ValueError(f"config.json of a {kind} model lacks {missing}") from None


def experts_of(model: Model, layer: int) -> tuple[int, int, int]:
    """(experts, experts a token, intermediate size) of a layer; (0, 0, size) where its MLP is dense."""
    config = model.config
    experts = config.get("num_experts") or config.get("num_local_experts") or 0  # the Hub's name, transformers 5's name
    dense = layer in (config.get("mlp_only_layers") or []) or (layer + 1) % config.get("decoder_sparse_step", 1)
    if not experts or dense:
        return 0, 0, config["intermediate_size"]
    return experts, config["num_experts_per_tok"], config.get("moe_intermediate_size") or config["intermediate_size"]


def linear_layers(model: Model, layer: int) -> Iterator[tuple[str, int, int, bool]]:
    """(name, inputs, outputs, bias) of every nn.Linear in a layer. Experts and routers are bare parameters."""
    a, h, q, k = model.architecture, model.hidden, model.queries, model.keys
    default = model.config["model_type"] == "gpt_oss"
    bias = model.config.get("attention_bias", default) if a.attention_bias is None else a.attention_bias
    if a.fused:
        yield "qkv_proj", h, q + 2 * k, bias
    else:
        for name, outputs in (("q_proj", q), ("k_proj", k), ("v_proj", k)):
            yield name, h, outputs, bias or a.qkv_bias
    yield "o_proj", q, h, bias
    experts, _, i = experts_of(model, layer)
    if not experts:
        bias = a.mlp_bias and model.config.get("mlp_bias", False)
        for name in ("gate_up_proj",) if a.fused else ("gate_proj", "up_proj"):
            yield name, h, 2 * i if a.fused else i, bias
        yield "down_proj", i, h, bias


def layer_parameters(model: Model, layer: int) -> int:
    h, a = model.hidden, model.architecture
    count = a.norms * h + sum(
        inputs * outputs + outputs * bias for _, inputs, outputs, bias in linear_layers(model, layer)
    )
    count += {"": 0, "head": 2 * model.head_dim, "all": model.queries + model.keys}[a.qk_norm]
    experts, _, i = experts_of(model, layer)
    count += experts * (h + 3 * h * i)  # router, then gate, up and down
    if model.config["model_type"] == "gpt_oss":
        count += experts * (1 + 2 * i + h) + model.heads  # biases of router and experts; attention sinks
    return count


def count_parameters(config: dict) -> int:
    """Parameters of a causal language model from its `config.json`; tied embeddings count once.

    Of a multimodal config (`text_config`) the language model alone is counted, not the vision tower.

    Raises:
        ValueError: the architecture is not in ARCHITECTURES, or a size is missing.
    """
    model = read_model(config)
    embeddings = model.vocabulary * model.hidden * (1 if model.tied else 2)
    return embeddings + model.hidden + sum(layer_parameters(model, layer) for layer in range(model.layers))


def lora_parameters(config: dict, r: int, target_modules: str | list[str] = "all-linear") -> int:
    """Parameters that LoRA of rank `r` adds: r · (inputs + outputs) for every adapted linear layer (arXiv 2106.09685).

    Args:
        target_modules: names of linear layers ("q_proj", …, "lm_head"), or "all-linear" for all but the LM head.

    Raises:
        ValueError: no linear layer has one of these names (peft refuses that, too), or the experts of a Qwen3-MoE model
            are among them: peft adapts those with larger ranks and writes out whole weights.
    """
    model = read_model(config)
    found = [shape for layer in range(model.layers) for shape in adapted_layers(model, layer, target_modules)]
    if target_modules != "all-linear" and "lm_head" in target_modules:
        found.append((model.hidden, model.vocabulary))
    if not found:
        names = ", ".join(dict.fromkeys(name for n in range(model.layers) for name, *_ in linear_layers(model, n)))
        raise NoSuchLayer(f"LoRA targets {target_modules!r} match no linear layer; expected some of {names}")
    return r * sum(inputs + outputs for inputs, outputs in found)


def adapted_layers(model: Model, layer: int, target_modules: str | list[str]) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers that LoRA adapts in one layer."""
    every = target_modules == "all-linear"
    experts = every or {"gate", "gate_proj", "up_proj", "down_proj", "experts"} & set(target_modules)
    if experts and model.config["model_type"] == "qwen3_moe" and experts_of(model, layer)[0]:
        raise ValueError("LoRA on experts is not counted; target q_proj, k_proj, v_proj, o_proj")
    return [(i, o) for name, i, o, _ in linear_layers(model, layer) if every or name in target_modules]


def attended_length(model: Model, layer: int, length: int) -> int:
    """Positions whose keys and values a layer keeps: all, or the sliding window's."""
    config, every = model.config, model.architecture.window_every
    types = config.get("layer_types")
    sliding = types[layer] == "sliding_attention" if types else every == -1 or (every and (layer + 1) % every)
    return min(length, config.get("sliding_window") or length) if sliding else length
