"""How much accelerator memory a GRPO run needs, from a model's `config.json` alone. Standard library only.

Parameter counts are exact (`rlattn.preflight.architectures`); the memory terms are estimates, each with its formula.
Sources: ZeRO (arXiv 1910.02054, section 3) for what a rank holds of weights, gradients and optimizer states; activation
recomputation (arXiv 2205.05198, sections 4 and 5) for activations, recounted for the gated, grouped-query layers of
transformers 5; TRL 1.16's fused LM head for the logits.
"""

from dataclasses import dataclass

from rlattn.preflight.architectures import (
    Model,
    adapted_layers,
    attended_length,
    count_parameters,
    experts_of,
    layer_parameters,
    linear_layers,
    lora_parameters,
    read_model,
)

__all__ = ["MemoryEstimate", "count_parameters", "estimate_memory", "lora_parameters"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
# Optimizer states: how many a parameter, and bytes each (None: the trained parameter's own dtype).
OPTIMIZER_STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "paged_adamw_32bit": (2, 4), "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1), "paged_adamw_8bit": (2, 1), "lion_32bit": (1, 4), "paged_lion_32bit": (1, 4),
    "lion_8bit": (1, 1), "paged_lion_8bit": (1, 1), "sgd": (0, None), "adagrad": (1, None), "rmsprop": (1, None),
}  # fmt: skip
# TRL 1.16: kernels/chunked_logprob.py TOKEN_CHUNK_SIZE, trainer/utils.py _CHUNKED_LOGPROB_CHUNK_SIZE.
HEAD_TILE_TOKENS, HEAD_TILE_VOCABULARY = 4096, 32768


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes a rank. `total` is the larger of the two phases' peaks, not the sum of all terms: the key-value cache is
    gone when the activations come. Not counted: CUDA context, fragmentation, communication buckets, prefill; leave a
    tenth of the device free for them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    kv_cache: int
    reference_model: int
    lagged_policies: int
    gathered: int
    total: int


def estimate_memory(
    config: dict,
    *,
    prompt_length: int,
    generation_batch_per_rank: int,
    ranks: int = 1,
    strategy: str = "ddp",
    offload: tuple[str, ...] = (),
    dtype: str = "float32",
    bf16: bool = True,
    lora_r: int = 0,
    lora_targets: str | list[str] = "all-linear",
    per_device_train_batch_size: int = 8,
    max_completion_length: int = 512,
    gradient_checkpointing: bool = True,
    beta: float = 0.0,
    optim: str = "adamw_torch_fused",
    ds3_gather_for_generation: bool = True,
    use_vllm: bool = False,
    vllm_mode: str = "colocate",
    vllm_gpu_memory_utilization: float = 0.3,
    vllm_enable_sleep_mode: bool = False,
    device_memory: int = 0,
    lagged_copies: int = 0,
) -> MemoryEstimate:
    """Estimate the peak memory of GRPO training, in bytes a rank. Defaults are TRL's.

    With P parameters, T trained ones (P, or LoRA's), N ranks, and x / N only for what the strategy partitions:

    - weights: P · w + adapters. w follows `dtype` under DDP: "float32" with `bf16` means float32 master weights and
      autocast, "bfloat16" means training in pure bfloat16, Adam's states included. DeepSpeed with `bf16` always holds
      bfloat16 weights (/ N at stage 3); FSDP with `bf16` upcasts what it trains to float32 (/ N).
    - gradients: T · w, / N from stage 2 on and under FSDP; twice that under DDP on several ranks (its buckets).
    - optimizer: T · states · their bytes (Adam: 2); DeepSpeed adds the float32 master weights, so 12 · T / N.
    - offload: DeepSpeed keeps optimizer states and gradients ("optimizer", arXiv 2101.06840) or partitioned weights
      ("param", arXiv 2104.07857) in the machine's memory, which is not counted here.
    - activations: what autograd saves a layer (`_layer_activations`), for all layers; with `gradient_checkpointing` the
      residual stream at each layer and one layer's full set. Autocast over float32 adds a bfloat16 copy of the weights.
    - logits: TRL's fused LM head never materialises them: one tile of 4096 tokens · 32768 entries, and in backward the
      float32 gradients of the hidden states and, unless LoRA freezes it, of the head.
    - kv_cache: generation_batch_per_rank · 2 · kv_heads · head_dim · min(length, window) summed over the layers with
      transformers; utilization · device_memory with colocated vLLM (its weights included); 0 with a vLLM server.
    - reference_model: P · its dtype if beta > 0 without LoRA, / N under stage 3 and FSDP.
    - lagged_policies: T · w for each of the `lagged_copies` that rewards ask for.
    - gathered: partitioned weights held whole: the embedding and one layer; all of them while transformers generates
      under ZeRO-3, unless `ds3_gather_for_generation` is off.

    Args:
        config: the model's `config.json`.
        offload: of "optimizer" (ZeRO-1 to 3) and "param" (ZeRO-3) what lies in the machine's memory.
        dtype: what the model is loaded in (`model_init_kwargs.dtype`); `bf16` is TRL's flag for mixed precision.
        generation_batch_per_rank: sequences a rank generates at once (train batch size · steps_per_generation).
        device_memory: bytes of one accelerator; only colocated vLLM needs it.
        lagged_copies: policies of earlier steps that are kept for second rollouts.

    Raises:
        ValueError: an unsupported architecture, strategy, dtype or optimizer.
    """
    for value, valid in ((strategy, STRATEGIES), (dtype, DTYPE_BYTES), (optim, OPTIMIZER_STATES)):
        if value not in valid:
            raise ValueError(f"the memory of {value!r} cannot be estimated; known: {', '.join(valid)}")
    model, zero, sharded = read_model(config), strategy.startswith("zero"), strategy in ("zero3", "fsdp")
    parameters = count_parameters(config)
    adapters = lora_parameters(config, lora_r, lora_targets) if lora_r else 0
    trained = adapters or parameters
    loaded = DTYPE_BYTES[dtype]
    compute = 2 if bf16 else loaded
    resident = 2 if zero and bf16 else 4 if strategy == "fsdp" and bf16 and not lora_r else loaded
    adapter_bytes = resident if zero else 4  # peft upcasts its adapters to float32; DeepSpeed casts the whole module
    trained_bytes = adapter_bytes if lora_r else resident
    stream = loaded if strategy == "ddp" else compute  # the residual stream keeps the dtype of the weights

    states, state_bytes = OPTIMIZER_STATES[optim]
    master = 4 if zero else 0
    optimizer = trained * (master + states * (state_bytes or master or trained_bytes))
    gradients = trained * trained_bytes * (2 if strategy == "ddp" and ranks > 1 else 1)
    weights = parameters * resident + adapters * adapter_bytes
    lagged = lagged_copies * trained * trained_bytes
    reference = parameters * (compute if zero else loaded) if beta and not lora_r else 0

    def adapted(layer: int) -> list[int] | None:
        return [i + lora_r for i, _ in adapted_layers(model, layer, lora_targets)] if lora_r else None

    length = prompt_length + max_completion_length
    tokens = per_device_train_batch_size * length
    layer_bytes = [
        tokens * _layer_activations(model, n, length, compute, stream, adapted(n), compute if bf16 else 4)
        for n in range(model.layers)
    ]
    recomputed = model.layers * tokens * model.hidden * stream + max(layer_bytes)
    activations = recomputed if gradient_checkpointing else sum(layer_bytes)
    if stream > compute and not (gradient_checkpointing and lora_r):  # frozen weights are cast anew by every layer
        activations += compute * sum(i * o for n in range(model.layers) for _, i, o, _ in linear_layers(model, n))

    head = model.vocabulary * model.hidden
    completion_tokens = per_device_train_batch_size * max_completion_length
    tile = min(completion_tokens, HEAD_TILE_TOKENS) * HEAD_TILE_VOCABULARY * compute
    logits = tile + 4 * completion_tokens * model.hidden + (0 if lora_r else 4 * head)

    whole = (head + max(layer_parameters(model, n) for n in range(model.layers))) * compute if sharded else 0
    gathers_all = strategy == "zero3" and ds3_gather_for_generation and not use_vllm
    gathered = parameters * compute if gathers_all else whole
    if use_vllm:
        kv_cache = int(vllm_gpu_memory_utilization * device_memory) if vllm_mode == "colocate" else 0
    else:
        lengths = sum(attended_length(model, n, length) for n in range(model.layers))
        kv_cache = generation_batch_per_rank * 2 * model.keys * lengths * stream

    if "optimizer" in offload:
        optimizer = gradients = 0
    if "param" in offload:
        weights = 0
    share = ranks if sharded else 1
    weights, reference = -(-weights // share), -(-reference // share)
    gradients = -(-gradients // (ranks if sharded or strategy == "zero2" else 1))
    optimizer = -(-optimizer // (ranks if sharded or zero else 1))
    generation = kv_cache + gathered
    training = activations + logits + whole + (kv_cache if use_vllm and not vllm_enable_sleep_mode else 0)
    return MemoryEstimate(
        weights=weights, gradients=gradients, optimizer=optimizer, activations=activations, logits=logits,
        kv_cache=kv_cache, reference_model=reference, lagged_policies=lagged, gathered=gathered,
        total=weights + gradients + optimizer + reference + lagged + max(generation, training),
    )  # fmt: skip


def _layer_activations(
    model: Model, layer: int, length: int, compute: int, stream: int, adapters: list[int] | None, adapter_bytes: int
) -> int:
    """Bytes a token that autograd saves in one layer, with c = compute and s = stream bytes an element.

    Each norm saves (4 + s) · its width; the inputs of the projections c · hidden, once for q, k, v and once for gate
    and up (autocast casts them anew for each projection); attention q, repeated k and v, and its output: 4 · c · heads
    · head_dim, and the mask as SDPA's bias: c · length (materialised scores: 2 · c or 8 · heads · length); a gated MLP
    4 · c · its width. With LoRA frozen norms save 4 · width and frozen layers no input; each adapter saves its own.
    """
    a, h, q = model.architecture, model.hidden, model.queries
    norm = 4 + (0 if adapters is not None else 4 if a.norm_float32 else stream)
    saved = norm * (a.norms * h + (q + model.keys if a.qk_norm else 0)) + 4 * compute * q
    saved += {"": 4 * model.heads + compute * length, "softcap": 8 * model.heads * length}.get(
        a.scores, 2 * compute * model.heads * length
    )
    experts, per_token, i = experts_of(model, layer)
    if experts:
        saved += per_token * stream * (a.mlp_saved * i + 2 * h)  # autocast leaves experts in the stream's dtype
    else:
        saved += (a.mlp_saved - (adapters is not None)) * compute * i
    if adapters is not None:
        return saved + adapter_bytes * sum(adapters)
    projections = sum(name not in ("o_proj", "down_proj") for name, *_ in linear_layers(model, layer))
    return saved + compute * h * (projections if stream > compute else 2)
