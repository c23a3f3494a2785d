"""Parts that need torch and transformers only: capture in bfloat16, other attention kernels, Triton, the benchmark."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlattn.attention import AttentionMetrics, attention_metrics
from rlattn.attention import capture as capture_module
from rlattn.attention.capture import capture
from rlattn.attention.heads import choose_layers
from rlattn.bench.attention import PEAK_TFLOPS, Sizes, bench_attention, reduce_map
from rlattn.bench.gpu.shared import Outcome, Scale, Skipped, need
from rlattn.types import AttentionOptions

# -- capture ----------------------------------------------------------------------------------------------------------


def capture_eager(scale: Scale) -> Outcome:
    """bfloat16 capture against the maps that the same forward keeps, which eager attention rounds to bfloat16."""
    layers = choose_layers(scale.shapes["num_hidden_layers"])
    ids_BN, attention_BN, response_BN = _batch(scale)
    eager = _policy(scale, "eager")
    with torch.no_grad(), capture(eager, attention_BN, response_BN) as found:
        maps = eager(input_ids=ids_BN, attention_mask=attention_BN, use_cache=False, output_attentions=True).attentions
    rows = [
        [reduce_map(maps[layer][b], response_BN[b].bool(), AttentionOptions()) for layer in layers]
        for b in range(len(ids_BN))
    ]
    error = _error(found.metrics(), _whole(rows))
    assert error < 0.03, f"off by {error:.1e} of the largest value"
    return Outcome(detail=f"off by {error:.1e} of the largest value; {_against_maps(scale, 'sdpa').detail}")


def capture_flash(scale: Scale) -> Outcome:
    if scale.device == "cpu":
        raise Skipped("flash-attention needs a GPU")
    need("flash_attn")
    return _against_maps(scale, "flash_attention_2")


def capture_flex(scale: Scale) -> Outcome:
    return _against_maps(scale, "flex_attention")


def _against_maps(scale: Scale, implementation: str) -> Outcome:
    """What capture leaves against float64 maps of the queries and keys that it was handed; the forward stays the same.

    Of one forward: between two, rounding in bfloat16 grows from layer to layer of a random policy.
    """
    ids_BN, attention_BN, response_BN = _batch(scale)
    model = _policy(scale, implementation)
    inputs = {"input_ids": ids_BN, "attention_mask": attention_BN, "use_cache": False}
    seen: list[tuple[Tensor, Tensor]] = []
    original = capture_module.metrics_function

    def recording(backend: str) -> Callable[..., AttentionMetrics]:
        def measure(query: Tensor, key: Tensor, **options: Any) -> AttentionMetrics:
            seen.append((query, key))
            return original(backend)(query, key, **options)

        return measure

    capture_module.metrics_function = recording
    try:
        with torch.no_grad(), capture(model, attention_BN, response_BN) as found:
            captured = model(**inputs).logits
    finally:
        capture_module.metrics_function = original
    with torch.no_grad():
        plain = model(**inputs).logits
    assert torch.equal(captured[response_BN.bool()], plain[response_BN.bool()]), "capture changed the forward"
    rows = [[_dense(query[b], key[b], attention_BN[b], response_BN[b]) for query, key in seen] for b in range(2)]
    error = _error(found.metrics(), _whole(rows))
    assert error < 1e-4, f"{implementation}: off by {error:.1e} of the largest value"
    return Outcome(detail=f"{implementation} off by {error:.1e} from float64 maps of its q and k")


def _whole(rows: list[list[tuple[Tensor, Tensor, Tensor]]]) -> tuple[Tensor, ...]:
    """Span, WAAD and FAI of all texts from those of each text's layers."""
    return tuple(torch.stack([torch.stack([layer[i] for layer in text]) for text in rows]) for i in range(3))


def _dense(query_HND: Tensor, key_KND: Tensor, real_N: Tensor, response_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = query_HND.shape[0] // key_KND.shape[0]
    scores_HNN = query_HND.double() @ key_KND.double().repeat_interleave(group, 0).mT * query_HND.shape[-1] ** -0.5
    hidden_NN = torch.ones_like(scores_HNN[0], dtype=torch.bool).triu(1) | (real_N == 0)
    map_HNN = scores_HNN.masked_fill(hidden_NN, -torch.inf).softmax(-1).nan_to_num(0)
    return reduce_map(map_HNN, response_N.bool(), AttentionOptions())


def _policy(scale: Scale, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(**scale.shapes)
    with torch.device(scale.device):
        model: Any = Qwen2ForCausalLM._from_config(config, attn_implementation=implementation, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data.normal_(std=1.5 * config.hidden_size**-0.5)  # attention with peaks, unlike a fresh model's
    return model.eval()


def _batch(scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """Two texts, padded left and right."""
    tokens = scale.of(1024, 64)
    ids_BN = torch.randint(3, 1000, (2, tokens), generator=torch.Generator().manual_seed(0))
    attention_BN = torch.ones_like(ids_BN)
    attention_BN[0, : tokens // 8] = 0
    attention_BN[1, -tokens // 8 :] = 0
    response_BN = attention_BN.clone()
    response_BN[:, : tokens // 4] = 0
    return ids_BN.to(scale.device), attention_BN.to(scale.device), response_BN.to(scale.device)


def _error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference of span, WAAD and FAI, each over its largest value."""
    errors = []
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan()), "NaN in other places"
        errors.append(((got - wanted).abs().nan_to_num(0).max() / wanted.abs().nan_to_num(0).max()).item())
    return max(errors)


# -- the Triton kernels -----------------------------------------------------------------------------------------------


def triton_accuracy(scale: Scale) -> Outcome:
    need("triton")
    from rlattn.attention.kernels import attention_metrics_triton, runs_here

    cases: dict[str, dict[str, Any]] = {
        "bfloat16": {"dtype": torch.bfloat16},
        "float16": {"dtype": torch.float16},
        "float32": {},
        "head size 128": {"dtype": torch.bfloat16, "head_size": 128},
        "head size 256": {"dtype": torch.bfloat16, "head_size": 256},
        "head size 256, float32": {"head_size": 256},
        "sliding window": {"sliding_window": 100, "dtype": torch.bfloat16},
        "softcap": {"softcap": 20.0, "dtype": torch.bfloat16},
        "sinks": {"sinks": torch.linspace(-2, 2, 14), "dtype": torch.bfloat16},
        "predictor": {"rows": "predictor", "dtype": torch.bfloat16},
    }
    errors = {}
    for name, options in list(cases.items())[: scale.of(len(cases), 1)]:
        query, key, arguments = _query_key(scale, texts=2, tokens=scale.of(1000, 40), **options)
        modern = scale.device == "cuda" and torch.version.cuda and torch.cuda.get_device_capability() >= (8, 0)
        assert not modern or runs_here(query, key, arguments), f"{name}: `auto` does not take the kernels"
        got = attention_metrics_triton(query, key, **arguments)
        errors[name] = _metrics_error(got, attention_metrics(query, key, **arguments))
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < 1e-4, f"{worst}: off by {errors[worst]:.1e}"
    return Outcome(detail=f"{len(errors)} cases, off by at most {errors[worst]:.1e} ({worst})", figures=errors)


def triton_speed(scale: Scale) -> Outcome:
    """Five layers of the policy on 8 texts of 8192 tokens: Triton, torch, and attention's own forward."""
    if scale.device == "cpu":
        raise Skipped("the interpreter's speed says nothing")
    need("triton")
    from rlattn.attention.kernels import attention_metrics_triton

    texts, tokens, layers = 8, 8192, 5
    query, key, arguments = _query_key(scale, texts=texts, tokens=tokens, dtype=torch.bfloat16, padded=False)
    heads, head_size = query.shape[1], query.shape[3]
    seconds = {
        "triton": _median_seconds(lambda: attention_metrics_triton(query, key, **arguments)) * layers,
        "torch": _median_seconds(lambda: attention_metrics(query, key, **arguments)) * layers,
        "sdpa": _median_seconds(
            lambda: nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        ) * layers,
    }  # fmt: skip
    tflops = texts * heads * head_size * tokens**2 * layers / seconds["triton"] / 1e12
    peak = next((value for card, value in PEAK_TFLOPS.items() if card in torch.cuda.get_device_name()), None)
    of_peak = f" ({tflops / peak:.0%} of peak)" if peak else ""
    times = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
    return Outcome(detail=f"{times}; triton {tflops:.0f} TFLOP/s{of_peak}", figures={**seconds, "tflops": tflops})


def _query_key(
    scale: Scale, *, texts: int, tokens: int, dtype: torch.dtype = torch.float32, head_size: int = 64,
    padded: bool = True, **options: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """14 query heads on 2 key heads, and the arguments of attention_metrics; the first eighth is the prompt."""
    random = torch.Generator(scale.device).manual_seed(0)
    query, key = (
        torch.randn(texts, heads, tokens, head_size, generator=random, device=scale.device).to(dtype)
        for heads in (14, 2)
    )
    attention_BN = torch.ones(texts, tokens, device=scale.device)
    if padded:
        attention_BN[0, : tokens // 10] = 0
    response_BN = attention_BN.clone()
    response_BN[:, : tokens // 8] = 0
    masks = {"attention_mask": attention_BN, "response_mask": response_BN}
    return query, key, {"scaling": head_size**-0.5, **masks, **options}


def _metrics_error(got: AttentionMetrics, expected: AttentionMetrics) -> float:
    errors = []
    for name in ("span_BH", "waad_BHN", "fai_BHN"):
        a, b = getattr(got, name), getattr(expected, name)
        assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
        errors.append(((a - b).abs() / b.abs().clamp(min=1)).nan_to_num(0).max().item())
    return max(errors)


def _median_seconds(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


# -- the benchmark ----------------------------------------------------------------------------------------------------


def bench(scale: Scale) -> Outcome:
    """`rlattn bench attention` with every backend that runs here."""
    backends: list[Any] = ["torch"]
    if scale.device == "cuda" and find_spec("triton"):
        backends.append("triton")
    found = {}
    for backend in backends:
        sizes = Sizes(tokens=scale.of(4096, 64), layers=scale.of(15, 3), device=scale.device, backend=backend)
        curve = () if scale.small else (2048, 8192, 16384)
        found[backend] = bench_attention(sizes, rounds=scale.of(3, 1), curve=curve)
    said = []
    for backend, table in found.items():
        figures = {row["what"]: row["figure"] for row in table["rows"]}
        wanted = ("time: capture beyond plain", "time: eager / capture", "memory: eager / capture")
        said.append(f"{backend}: " + ", ".join(f"{what} {figures[what]}" for what in wanted if what in figures))
    return Outcome(detail="; ".join(said), figures=found)
