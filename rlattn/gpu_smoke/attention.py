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
from rlattn.attention.capture import capture
from rlattn.attention.heads import choose_layers
from rlattn.bench_attention import PEAK_TFLOPS, Sizes, bench_attention, reduce_map
from rlattn.gpu_smoke.shared import Outcome, Scale, Skipped, need
from rlattn.types import AttentionOptions

# -- capture ----------------------------------------------------------------------------------------------------------


def capture_eager(scale: Scale) -> Outcome:
    """bfloat16 capture against the same model's eager maps, and with sdpa against them."""
    layers = choose_layers(scale.shapes["num_hidden_layers"])
    ids_BN, attention_BN, response_BN = _batch(scale)
    eager = _policy(scale, "eager")
    with torch.no_grad():
        maps = eager(input_ids=ids_BN, attention_mask=attention_BN, use_cache=False, output_attentions=True).attentions
    rows = [
        [reduce_map(maps[layer][b], response_BN[b].bool(), AttentionOptions()) for layer in layers]
        for b in range(len(ids_BN))
    ]
    expected = tuple(torch.stack([torch.stack([part[i] for part in row]) for row in rows]) for i in range(3))
    same = _error(_captured(scale, "eager"), expected)
    across = _error(_captured(scale, "sdpa"), expected)
    # eager rounds scores and maps to bfloat16 (2^-9 of each), capture does not
    assert same < 0.03, f"eager capture is off by {same:.1e} of the largest value"
    assert across < 0.05, f"sdpa capture is off by {across:.1e} of the largest value"
    return Outcome(detail=f"off by {same:.1e} (eager), {across:.1e} (sdpa) of the largest value")


def capture_flash(scale: Scale) -> Outcome:
    if scale.device == "cpu":
        raise Skipped("flash-attention needs a GPU")
    need("flash_attn")
    return _against_sdpa(scale, "flash_attention_2")


def capture_flex(scale: Scale) -> Outcome:
    return _against_sdpa(scale, "flex_attention")


def _against_sdpa(scale: Scale, implementation: str) -> Outcome:
    error = _error(_captured(scale, implementation), _captured(scale, "sdpa"))
    assert error < 0.05, f"off from sdpa by {error:.1e} of the largest value"
    return Outcome(detail=f"off from sdpa by {error:.1e} of the largest value")


def _policy(scale: Scale, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(**scale.shapes)
    model: Any = Qwen2ForCausalLM._from_config(config, attn_implementation=implementation)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data.normal_(std=1.5 * config.hidden_size**-0.5)  # attention with peaks, unlike a fresh model's
    return model.to(scale.device, torch.bfloat16).eval()


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


def _captured(scale: Scale, implementation: str) -> tuple[Tensor, ...]:
    ids_BN, attention_BN, response_BN = _batch(scale)
    model = _policy(scale, implementation)
    with torch.no_grad(), capture(model, attention_BN, response_BN) as found:
        model(input_ids=ids_BN, attention_mask=attention_BN, use_cache=False)
    return found.metrics()


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
    from rlattn.attention.kernels import attention_metrics_triton

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


def _median_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    work()
    seconds = []
    for _ in range(repeats):
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
        found[backend] = bench_attention(sizes, rounds=scale.of(5, 1), curve=curve)
    said, met = [], True
    for backend, table in found.items():
        missed = [row["what"] for row in table["rows"] if row["met"] is False]
        met = met and not missed
        said.append(f"{backend}: " + (f"missed {', '.join(missed)}" if missed else "every target met"))
    return Outcome(detail="; ".join(said), met=met or scale.small, figures=found)
