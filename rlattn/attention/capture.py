"""Reads queries and keys off a forward pass of the policy, layer by layer, and hands them to metrics.py.

Nothing is kept but the metrics: no attention map, no query or key outlives its layer. B rollouts, N positions,
L chosen layers, H heads.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlattn.attention.heads import average_over, choose_layers, head_sets, layer_types, usable_layers
from rlattn.attention.metrics import AttentionMetrics, attention_metrics
from rlattn.attention.row_masks import RowMasks, row_masks
from rlattn.errors import describe
from rlattn.types import ATTENTION_LAYERS, AttentionOptions, Signals

logger = logging.getLogger(__name__)
DEFAULTS = AttentionOptions()


@dataclass(kw_only=True)
class Capture:
    """What a forward pass under `capture` leaves behind; `signals()` once it is over."""

    layers: tuple[int, ...]
    response_mask_BN: Tensor
    """Bool: response tokens that are no padding."""
    parts: dict[int, list[AttentionMetrics]] = field(default_factory=dict)

    def metrics(self) -> tuple[Tensor, Tensor, Tensor]:
        """span_BLH, waad_BLHN and fai_BLHN, float32.

        Raises:
            ValueError: a chosen layer made no queries and keys, by number.
        """
        for layer in self.layers:
            if sum(part.span_BH.shape[0] for part in self.parts.get(layer, [])) != len(self.response_mask_BN):
                raise ValueError(
                    f"layer {layer} has no queries and keys to read (linear attention, or a layer that the forward "
                    "did not reach); choose full-attention layers"
                )
        forwards = zip(*(self.parts[layer] for layer in self.layers))
        stacked = [[torch.stack(values, dim=1) for values in zip(*map(self._tensors, layers))] for layers in forwards]
        span, waad, fai = (torch.cat(values) for values in zip(*stacked))
        return span, waad, fai

    def _tensors(self, metrics: AttentionMetrics) -> tuple[Tensor, ...]:
        device = self.response_mask_BN.device  # layers may lie on several
        return metrics.span_BH.to(device), metrics.waad_BHN.to(device), metrics.fai_BHN.to(device)

    def signals(
        self, *, share: float = 0.3, heads: tuple[Tensor, Tensor] | None = None, entropy_BN: Tensor | None = None
    ) -> Signals:
        """The metrics averaged over the local and the global heads: those of `heads` (bool, L x H each), or every
        rollout's own by its spans.
        """
        span_BLH, waad_BLHN, fai_BLHN = self.metrics()
        if heads is None:
            local_BLH, global_BLH = head_sets(span_BLH, share)
        else:
            local_BLH, global_BLH = (chosen_LH.expand_as(span_BLH) for chosen_LH in heads)
        return Signals(
            waad_BN=average_over(waad_BLHN, local_BLH),
            fai_BN=average_over(fai_BLHN, global_BLH),
            mask_BN=self.response_mask_BN,
            entropy_BN=entropy_BN,
            span_BLH=span_BLH,
            local_heads=local_BLH,
            global_heads=global_BLH,
            layers=self.layers,
        )


@contextmanager
def capture(
    model: nn.Module,
    attention_mask_BN: Tensor,
    response_mask_BN: Tensor,
    *,
    options: AttentionOptions = DEFAULTS,
    stop_after_last: bool = False,
) -> Iterator[Capture]:
    """Every forward of `model` inside the context leaves the metrics of its chosen layers in the yielded Capture.

    The rows of the masks may come in several forwards, in order (TRL chunks its batches). Gradients are untouched; a
    layer recomputed by gradient checkpointing after the context has closed is not captured again.

    Args:
        model: a decoder-only transformers model, PEFT-wrapped or not; of a vision-language model, its text tower.
        options: layers, window, horizon, rows and backend; head sets are `Capture.signals`' business.
        stop_after_last: end the forward after the last chosen layer (the caller's forward returns nothing).

    Raises:
        ValueError: layers that the model does not have; a backend that is not installed or not for the model's device.
    """
    measure = metrics_function(options.backend)
    decoder = text_decoder(model)
    layers = decoder_layers(decoder)
    chosen = options.layers or choose_layers(len(layers), attention_layers(decoder))
    if max(chosen) >= len(layers):
        raise ValueError(f"attention.layers: the model has layers 0 to {len(layers) - 1}, got {list(chosen)}")
    modules = {id(m): i for i, layer in enumerate(layers) for m in layer.modules() if hasattr(m, "layer_idx")}
    implementation = decoder.config._attn_implementation
    types = layer_types(decoder.config)
    response_mask_BN = response_mask_BN.bool() & attention_mask_BN.bool()
    result = Capture(layers=chosen, response_mask_BN=response_mask_BN)
    original = ALL_ATTENTION_FUNCTIONS.get(implementation)
    latest: dict[int, ref[Tensor]] = {}  # the query of each layer that was read last

    @cache
    def masks_of(start: int, stop: int, device: torch.device) -> RowMasks:
        part = slice(start, stop)
        return row_masks(attention_mask_BN[part], response_mask_BN[part], options.horizon, options.rows, device)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        layer = modules.get(id(module))
        again = layer in latest and latest[layer]() is query  # DiffLlama's layers attend twice with one query
        if layer in chosen and not again:
            if types[layer] not in ATTENTION_LAYERS or kwargs.get("position_bias") is not None:
                kind = types[layer] if types[layer] not in ATTENTION_LAYERS else "a position bias"
                raise ValueError(f"layer {layer} has {kind}, which cannot be read; choose full-attention layers")
            latest[layer] = ref(query)
            seen = result.parts.setdefault(layer, [])
            start = sum(part.span_BH.shape[0] for part in seen)
            stop = start + query.shape[0]
            window = kwargs.get("sliding_window")
            if window is None and getattr(decoder.config, "sliding_window", None):
                window = window_of(attention_mask, attention_mask_BN[start:stop].bool().to(query.device))
            with torch.no_grad():
                seen.append(
                    measure(
                        query.detach(),
                        key.detach(),
                        scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
                        attention_mask=attention_mask_BN[start:stop],
                        response_mask=response_mask_BN[start:stop],
                        window=options.window,
                        horizon=options.horizon,
                        sliding_window=window,
                        softcap=kwargs.get("softcap"),
                        sinks=None if kwargs.get("s_aux") is None else kwargs["s_aux"].detach(),
                        rows=options.rows,
                        masks=masks_of(start, stop, query.device),
                    )
                )
            if stop_after_last and layer == max(chosen):
                raise _Reached
        return (original or _eager_of(module))(module, query, key, value, attention_mask, *args, **kwargs)

    # Under the same key: a name of our own would lose the mask that transformers makes for this one.
    previous = ALL_ATTENTION_FUNCTIONS._local_mapping.get(implementation)
    ALL_ATTENTION_FUNCTIONS[implementation] = attend
    try:
        yield result
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]
        if previous is not None:
            ALL_ATTENTION_FUNCTIONS[implementation] = previous


@torch.no_grad()
def rhythm_signals(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    *,
    entropy: bool = False,
    options: AttentionOptions = DEFAULTS,
) -> Signals:
    """WAAD, FAI and the head sets of any decoder-only model on a batch (arXiv 2510.13554, section 4).

    Args:
        input_ids, attention_mask, response_mask: (B, N); masks 1 = real / response token.
        entropy: also the entropy of the distribution each token was drawn from; needs the whole forward.
        options: layers, window, horizon, rows and the share of heads; sets of any wider scope are one batch's here.

    Cost: one forward up to the last chosen layer, plus about what attention itself costs in the chosen layers.
    """
    for name, mask in (("attention_mask", attention_mask), ("response_mask", response_mask)):
        if input_ids.ndim != 2 or 0 in input_ids.shape or mask.shape != input_ids.shape:
            shapes = f"{tuple(mask.shape)} for input_ids {tuple(input_ids.shape)}"
            raise ValueError(f"{name}: expected (B, N) as the input_ids, of at least one token, got {shapes}")
    with capture(model, attention_mask, response_mask, options=options, stop_after_last=not entropy) as captured:
        try:
            output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _Reached:
            output = None
    entropy_BN = None
    if entropy:
        if not hasattr(output, "logits"):
            raise ValueError(f"entropy: {type(model).__name__} has no head that gives logits")
        entropy_BN = token_entropy(output.logits, captured.response_mask_BN)
    heads = None if options.scope == "sequence" else batch_heads(captured.metrics()[0], options.share)
    return captured.signals(share=options.share, heads=heads, entropy_BN=entropy_BN)


def token_entropy(logits_BNV: Tensor, response_mask_BN: Tensor) -> Tensor:
    """Nats, of the distribution each response token was drawn from (one position earlier); NaN elsewhere."""
    drawn_from = logits_BNV[:, :-1].float().log_softmax(dim=-1)
    entropy_BN = torch.full(response_mask_BN.shape, torch.nan, device=logits_BNV.device)
    entropy_BN[:, 1:] = -(drawn_from.exp() * drawn_from).sum(dim=-1)
    return entropy_BN.masked_fill(~response_mask_BN.bool(), torch.nan)


def metrics_function(backend: str) -> Callable[..., AttentionMetrics]:
    """`attention_metrics` of a backend. Raises ValueError where it is not installed."""
    if backend == "torch" or (backend == "auto" and not torch.cuda.is_available()):
        return attention_metrics
    kernels, problem = _kernels()
    if backend == "triton":
        if kernels is None:
            raise ValueError(f"attention.backend: triton cannot be imported ({problem}); use torch")
        return kernels.attention_metrics_triton  # type: ignore[no-any-return]

    def measure(query: Tensor, key: Tensor, **options: Any) -> AttentionMetrics:
        if kernels and kernels.runs_here(query, key, options):
            return kernels.attention_metrics_triton(query, key, **options)  # type: ignore[no-any-return]
        return attention_metrics(query, key, **options)

    return measure


@cache
def _kernels() -> tuple[Any, str]:
    """The module, or None and why: Triton may be missing, too old or broken."""
    try:
        return importlib.import_module("rlattn.attention.kernels"), ""
    except Exception as error:
        logger.warning("attention: no Triton kernels: %s", describe(error))
        return None, describe(error)


def batch_heads(span_BLH: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """One pair of head sets for all rollouts: local_LH and global_LH, bool."""
    rows_BLH = span_BLH[~span_BLH.isnan().all(dim=(1, 2))]
    if not len(rows_BLH):
        empty_LH = torch.zeros(span_BLH.shape[1:], dtype=torch.bool, device=span_BLH.device)
        return empty_LH, empty_LH
    local_BLH, global_BLH = head_sets(rows_BLH, share, scope="batch")
    return local_BLH[0], global_BLH[0]


def text_decoder(model: nn.Module) -> Any:
    """The stack of decoder layers that makes text, whatever wraps it."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else base
    if decoder_layers(decoder) is None:  # Llama 4's decoder is a causal language model
        decoder = getattr(decoder, "model", decoder)
    if decoder_layers(decoder) is None:
        raise ValueError(f"{type(base).__name__} has no stack of decoder layers to read attention from")
    return decoder


def decoder_layers(decoder: Any) -> Any:
    """The layers of a decoder, first to last: `layers`, or GPT-2's `h`."""
    return getattr(decoder, "layers", getattr(decoder, "h", None))


def attention_layers(decoder: Any) -> tuple[int, ...]:
    """The layers with queries and keys; a hybrid's linear-attention layers have none."""
    return usable_layers(layer_types(decoder.config))


def window_of(mask: Any, real_BN: Tensor) -> int | None:
    """The sliding window in a forward's own mask, for models (PhiMoE, Qwen2-MoE) whose layers do not pass theirs on.

    Read off the row of each text's last token, which sees least far back.
    """
    texts, positions = (torch.arange(count, device=real_BN.device) for count in real_BN.shape)
    last_B = (real_BN * positions).argmax(dim=-1)
    if isinstance(mask, BlockMask):
        visible_BN = mask.mask_mod(texts[:, None], torch.zeros_like(texts)[:, None], last_B[:, None], positions)
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        row_BN = mask.expand(len(texts), -1, -1, -1)[texts, 0, last_B]
        visible_BN = row_BN if row_BN.dtype == torch.bool else row_BN == 0
    else:
        return None
    hidden_BN = real_BN & ~visible_BN
    back_BN = (last_B[:, None] - positions).masked_fill(~hidden_BN | (positions > last_B[:, None]), len(positions))
    nearest = int(back_BN.min())
    return nearest if nearest < len(positions) else None


class _Reached(Exception):
    """The last chosen layer is done: the rest of the forward is not needed."""


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    # Eager attention is not in the registry: each model file has its own.
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
