"""`rlattn bench attention`: what WAAD and FAI cost beside a plain forward, and beside keeping the attention maps.

Four ways through one randomly initialised 15-layer model, in one run: `plain`, a forward; `capture`, a forward that
leaves its metrics; `signals`, rhythm_signals, which stops after the last layer it reads; `eager`, a forward that keeps
all attention maps, reduced to the same metrics. The first three take turns, three times a round in alternating order:
medians of the ratios of neighbours. Eager maps are one a round: a ratio of medians. Never a test: machines are noisy.
Imports no TRL.

Legend: B = 1 text, N tokens, H heads.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlattn.attention.capture import capture, metrics_function, rhythm_signals
from rlattn.attention.heads import choose_layers
from rlattn.types import AttentionOptions

WAYS = ("plain", "capture", "signals", "eager")
CURVE = (512, 1024, 2048, 4096, 8192, 16384)
M_MMAP_THRESHOLD = -3  # malloc.h
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312}  # dense bfloat16, from NVIDIA's data sheets


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. Weights are float32 on a CPU, bfloat16 on CUDA."""

    tokens: int = 4096
    layers: int = 15
    hidden: int = 512
    heads: int = 16
    key_heads: int = 8
    device: str = "cpu"
    backend: Literal["auto", "torch", "triton"] = "auto"

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def options(self) -> AttentionOptions:
        return AttentionOptions(backend=self.backend)

    @property
    def map_bytes(self) -> int:
        """What the eager maps take, and the scores of the layer at hand."""
        return (self.layers + 2) * self.heads * self.tokens**2 * self.dtype.itemsize


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    target: str = ""
    met: bool | None = None
    """None where there is no target."""
    detail: str = ""


def bench_attention(
    sizes: Sizes, *, rounds: int, curve: tuple[int, ...] = (), show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measures, prints one table and returns what it holds, with every single time and peak.

    Args:
        curve: text lengths at which the metrics of one layer are held against its attention.
        show: gets a line of progress now and then.
    """
    ways = WAYS if sizes.map_bytes < _free_bytes(sizes.device) else WAYS[:3]
    peaks = {}
    for way in ways:
        show(f"peak memory of {way}")
        peaks[way] = _peak_of(way, sizes)
    seconds = _seconds(ways, sizes, rounds, show)
    rows = [*_time_rows(seconds), *_peak_rows(peaks)]
    if "eager" in ways:
        rows.append(Row("error: capture against eager", f"{_error(sizes):.0e}"))
    else:
        rows.append(Row("eager", "not measured", detail=f"needs {sizes.map_bytes / 1e9:.0f} GB of memory"))
    if sizes.device != "cpu":
        rows = [replace(row, target="", met=None) for row in rows]  # the targets are a CPU's
    curves = []
    for tokens in curve:
        show(f"one layer at {tokens} tokens")
        curves.append(_curve_point(sizes, tokens, rounds))
        rows.append(_curve_row(curves[-1]))
    Console().print(_table(rows, sizes))
    return {
        "sizes": asdict(sizes),
        "machine": _machine(sizes),
        "seconds": seconds,
        "peak_bytes": peaks,
        "curve": curves,
        "rows": [asdict(row) for row in rows],
    }


# -- the four ways ----------------------------------------------------------------------------------------------------


def _model(sizes: Sizes, implementation: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024,  # small: logits are no part of the question
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_size,
    )
    model: Any = Qwen3ForCausalLM._from_config(config, attn_implementation=implementation)
    return model.to(sizes.device, sizes.dtype).eval()


def _text(sizes: Sizes, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and response_mask of one text; its first eighth is the prompt."""
    ids_BN = torch.randint(1024, (1, tokens), generator=torch.Generator().manual_seed(0)).to(sizes.device)
    response_BN = torch.ones_like(ids_BN)
    response_BN[:, : tokens // 8] = 0
    return ids_BN, torch.ones_like(ids_BN), response_BN


@torch.no_grad()
def _forward(way: str, sizes: Sizes, model: Qwen3ForCausalLM, tokens: int) -> tuple[Tensor, ...]:
    """span, waad and fai of the chosen layers where the way gives them."""
    ids_BN, attention_BN, response_BN = _text(sizes, tokens)
    inputs = {"input_ids": ids_BN, "attention_mask": attention_BN, "use_cache": False}
    if way == "plain":
        model(**inputs)
    elif way == "capture":
        with capture(model, attention_BN, response_BN, options=sizes.options) as captured:
            model(**inputs)
        return captured.metrics()
    elif way == "signals":
        rhythm_signals(model, ids_BN, attention_BN, response_BN, options=sizes.options)
    elif way == "eager":
        maps = model(**inputs, output_attentions=True).attentions
        parts = [
            reduce_map(maps[layer][0], response_BN[0].bool(), sizes.options) for layer in choose_layers(sizes.layers)
        ]
        return tuple(torch.stack(part)[None] for part in zip(*parts, strict=True))
    return ()


def reduce_map(map_HNN: Tensor, response_N: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The definitions on a whole map, a head at a time."""
    position_N = torch.arange(len(response_N), device=map_HNN.device)
    distance_NN = (position_N[:, None] - position_N).clamp(min=0)
    clipped_NN = distance_NN.clamp(max=options.window)
    low, high = options.horizon
    inside_NN = (distance_NN >= low) & (distance_NN <= high) & response_N[:, None]
    heads = []
    for map_NN in map_HNN.float():
        span = (map_NN * distance_NN).sum(-1)[response_N].mean()
        waad_N = (map_NN * clipped_NN).sum(-1).masked_fill(~response_N, torch.nan)
        fai_N = (map_NN * inside_NN).sum(-2) / inside_NN.sum(-2)
        heads.append((span, waad_N, fai_N.masked_fill(~response_N, torch.nan)))
    span_H, waad_HN, fai_HN = (torch.stack(values) for values in zip(*heads, strict=True))
    return span_H, waad_HN, fai_HN


# -- measuring --------------------------------------------------------------------------------------------------------


def _seconds(ways: tuple[str, ...], sizes: Sizes, rounds: int, show: Callable[[str], None]) -> dict[str, list[float]]:
    models = {"sdpa": _model(sizes, "sdpa")}
    if "eager" in ways:
        models["eager"] = _model(sizes, "eager")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    quick = ways[:3]  # three times a round: what disturbs a machine lasts about as long as one of them
    order = (*quick, *reversed(quick), *quick, *ways[3:])
    # The first round warms up: kernels are compiled for their sizes on CUDA, while on a CPU a short text will do.
    for number in range(rounds + 1):
        tokens = sizes.tokens if number or sizes.device == "cuda" else min(sizes.tokens, 256)
        for way in order if number % 2 else reversed(order):
            model = models["eager" if way == "eager" else "sdpa"]
            taken = _timed(partial(_forward, way, sizes, model, tokens), sizes.device)
            if number:
                seconds[way].append(taken)
                show(f"round {number} of {rounds}: {way} {taken:.3f} s")
    return seconds


def _timed(work: Callable[[], Any], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_of(way: str, sizes: Sizes) -> int | None:
    """Bytes at the peak of one forward: allocated on CUDA; on a CPU resident, in a process of its own."""
    if sizes.device == "cuda":
        model = _model(sizes, "eager" if way == "eager" else "sdpa")
        torch.cuda.reset_peak_memory_stats()
        _forward(way, sizes, model, sizes.tokens)
        return torch.cuda.max_memory_allocated()
    fresh = get_context("forkserver")  # its children have imported everything and computed nothing
    fresh.set_forkserver_preload(["rlattn.bench.attention"])
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(_resident_peak, way, sizes).result()


def _resident_peak(way: str, sizes: Sizes) -> int | None:
    """Of this process after one forward; None where the system does not say (other than Linux).

    It is what the forward holds, as on CUDA: every tensor of a megabyte comes from the system and goes back. Left to
    itself, glibc keeps what was freed, in holes that the next tensor may not fit: a tenth more or less, by chance.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**20)
    _forward(way, sizes, _model(sizes, "eager" if way == "eager" else "sdpa"), sizes.tokens)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _free_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        info = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return torch.inf
    return next(int(line.split()[1]) * 1024 for line in info.splitlines() if line.startswith("MemAvailable"))


def _error(sizes: Sizes) -> float:
    """Largest difference between captured metrics and reduced maps, relative above 1, on a short text."""
    tokens = min(sizes.tokens, 512)
    eager = _model(sizes, "eager")
    errors = []
    for got, expected in zip(*(_forward(way, sizes, eager, tokens) for way in ("capture", "eager")), strict=True):
        errors.append(((got - expected).abs() / expected.abs().clamp(min=1)).nan_to_num(0).max().item())
    return max(errors)


def _curve_point(sizes: Sizes, tokens: int, rounds: int) -> dict[str, float]:
    """One layer's metrics against its attention, as transformers computes it with sdpa."""
    random = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, sizes.head_size) for heads in (sizes.heads, sizes.key_heads, sizes.key_heads)]
    query, key, value = (torch.randn(shape, generator=random).to(sizes.device, sizes.dtype) for shape in shapes)
    _, attention_BN, response_BN = _text(sizes, tokens)
    scaling = sizes.head_size**-0.5
    group = sizes.heads // sizes.key_heads
    layer: Any = SimpleNamespace(num_key_value_groups=group, is_causal=True, training=False)  # all it is asked for
    measure = metrics_function(sizes.backend)
    work: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: sdpa_attention_forward(layer, query, key, value, None, scaling=scaling),
        "metrics": lambda: measure(query, key, scaling=scaling, attention_mask=attention_BN, response_mask=response_BN),
    }
    seconds: dict[str, list[float]] = {"sdpa": [], "metrics": []}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name in work if number % 2 else reversed(work):
                seconds[name].append(_timed(work[name], sizes.device))
    timed = {name: values[1:] for name, values in seconds.items()}  # the first warms up
    point = {name: median(values) for name, values in timed.items()}
    point["ratio"] = median(a / b for a, b in zip(timed["metrics"], timed["sdpa"], strict=True))
    point["tokens"] = tokens
    if sizes.device == "cuda":
        # one product of query and key for every visible pair
        point["tflops"] = sizes.hidden * tokens**2 / point["metrics"] / 1e12
        name = torch.cuda.get_device_name()
        peak = next((tflops for card, tflops in PEAK_TFLOPS.items() if card in name), None)
        if peak:
            point["share_of_peak"] = point["tflops"] / peak
    return point


# -- the table --------------------------------------------------------------------------------------------------------


def _time_rows(seconds: dict[str, list[float]]) -> list[Row]:
    def ratios(a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]

    def of(a: str, b: str) -> str:
        return f"{median(seconds[a]):.3g} s / {median(seconds[b]):.3g} s"

    def pairs(values: list[float]) -> str:
        plain = median(seconds["plain"])
        return f"median of {len(values)} pairs, {min(values):.2f} to {max(values):.2f}; plain {plain:.3g} s"

    signals, capture = ratios("signals", "plain"), ratios("capture", "plain")
    stopped, extra = median(signals), median(capture) - 1
    rows = [
        Row("time: signals / plain", f"{stopped:.2f}", "<= 0.90", stopped <= 0.9, pairs(signals)),
        Row("time: capture beyond plain", f"{extra:+.0%}", "<= 20 %", extra <= 0.2, pairs(capture)),
    ]
    if "eager" in seconds:
        eager = median(seconds["eager"]) / median(seconds["capture"])
        rows.append(Row("time: eager / capture", f"{eager:.1f}x", ">= 8x", eager >= 8, of("eager", "capture")))
    return rows


def _peak_rows(peaks: dict[str, int | None]) -> list[Row]:
    plain, captured, eager = peaks["plain"], peaks["capture"], peaks.get("eager")
    if not plain or not captured:
        return [Row("memory", "not measured", detail="this system does not say")]
    extra, of = captured / plain - 1, f"{captured / 1e9:.2f} GB / {plain / 1e9:.2f} GB"
    rows = [Row("memory: capture beyond plain", f"{extra:+.0%}", "<= 10 %", extra <= 0.1, of)]
    if eager:
        times, of = eager / captured, f"{eager / 1e9:.2f} GB / {captured / 1e9:.2f} GB"
        rows.append(Row("memory: eager / capture", f"{times:.1f}x", ">= 12x", times >= 12, of))
    return rows


def _curve_row(point: dict[str, float]) -> Row:
    detail = f"{point['metrics'] * 1e3:.3g} ms / {point['sdpa'] * 1e3:.3g} ms"
    if "tflops" in point:
        detail += f", {point['tflops']:.0f} TFLOP/s"
    if "share_of_peak" in point:
        detail += f", {point['share_of_peak']:.0%} of peak"
    return Row(f"a layer's metrics / sdpa, {int(point['tokens'])} tokens", f"{point['ratio']:.2f}", detail=detail)


def _table(rows: list[Row], sizes: Sizes) -> Table:
    title = (
        f"{sizes.tokens} tokens, {sizes.layers} layers, hidden {sizes.hidden}, {sizes.heads}/{sizes.key_heads} heads"
    )
    others = "" if replace(sizes, backend="auto") == Sizes() else "; the targets are for the default sizes"
    table = Table(title=title, caption=_machine(sizes) + others)
    for column in ("what", "target", "figure", "", "of"):
        table.add_column(column, no_wrap=column == "what")
    marks = {None: "", True: "met", False: "missed"}
    for row in rows:
        table.add_row(row.what, row.target, row.figure, marks[row.met], row.detail)
    return table


def _machine(sizes: Sizes) -> str:
    where = torch.cuda.get_device_name() if sizes.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    dtype = str(sizes.dtype).removeprefix("torch.")
    return f"{where}, {dtype}, torch {torch.__version__}, backend {sizes.backend}"
