"""Span, WAAD and FAI as two fused Triton kernels for CUDA: no score ever reaches memory. The same as metrics.py.

One program reads the keys once for a block of rows and keeps, beside the running maximum and mass of an online softmax,
running sums of distance (span) and clipped distance (WAAD). Another sums a block of columns over the rows inside the
horizon (FAI), from the rows' log-sum-exp. Every sum has one owner, so results repeat bit for bit.

Legend: as in metrics.py; M rows and C columns of a tile. Scores are in base 2 (times log2 e): GPUs take powers of 2.
Under TRITON_INTERPRET=1, set before triton is imported, the kernels run on a CPU, slowly.
"""

import logging
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlattn.attention.metrics import AttentionMetrics, at_the_next, attention_metrics, check_options, check_shapes
from rlattn.attention.row_masks import RowMasks, row_masks
from rlattn.errors import describe

LARGEST_HEAD = 256  # tried; larger tiles may not fit in shared memory
INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Finite, times `factor` too: so is a row of a tile that sees no key. A power of 2: that product is not rounded, or what
# `score * factor - top` leaves of two hidden ones, fused, would be huge.
HIDDEN: tl.constexpr = tl.constexpr(-(2.0**100))


logger = logging.getLogger(__name__)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def runs_here(query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
    """Whether `backend: auto` takes the kernels: on NVIDIA cards from Ampere on, where Triton compiles them rightly."""
    return (
        query.is_cuda
        and not INTERPRETED
        and torch.version.cuda is not None
        and query.dtype == key.dtype
        and query.dtype in DTYPES
        and query.shape[-1] <= LARGEST_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _works(
            query.device, query.dtype, query.shape[-1], bool(options.get("softcap")), options.get("sinks") is not None
        )
    )


@cache
def _works(device: torch.device, dtype: torch.dtype, head_size: int, softcap: bool, sinks: bool) -> bool:
    """Tried once a process and kind of call, against the torch path, on a text that takes all three loops over columns.

    Without a C compiler, say, Triton cannot start a kernel; and no card or Triton is trusted unseen.
    """
    tokens = 6 * _tile(dtype, head_size)["M"] + 16
    real, response = torch.zeros(2, 1, tokens, device=device)
    real[:, 20:] = response[:, 40:] = 1
    options: dict[str, Any] = {"scaling": head_size**-0.5, "attention_mask": real, "response_mask": response}
    options |= {"softcap": 1.0 if softcap else None, "sinks": real[0, -4:] if sinks else None}
    draw = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(1, heads, tokens, head_size, generator=draw, device="cpu").to(device, dtype) for heads in (4, 2)
    )
    try:
        both = [measure(query, key, **options) for measure in (attention_metrics_triton, attention_metrics)]
        found, expected = (torch.cat([x.flatten() for x in (m.span_BH, m.waad_BHN, m.fai_BHN)]) for m in both)
        # Wider than rounding, that of tf32 included. FAI, a share of some hundred tokens, is the smallest of the three.
        right = torch.allclose(found, expected, rtol=0.02, atol=1e-4, equal_nan=True)
        problem = "they give other numbers than PyTorch"
    except Exception as error:
        right, problem = False, describe(error)
    if not right:
        logger.warning("attention: Triton's kernels cannot run here, PyTorch's slower path does: %s", problem)
    return right


@torch.no_grad()
def attention_metrics_triton(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor,
    response_mask: Tensor,
    window: int = 10,
    horizon: tuple[int, int] = (10, 100),
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows: str = "token",
    masks: RowMasks | None = None,
) -> AttentionMetrics:
    """`attention_metrics` for CUDA tensors in bfloat16, float16 or float32; the same arguments and result.

    Sums and softmax are in float32. Products of float32 inputs follow `torch.backends.cuda.matmul.fp32_precision`.
    Raises ValueError for shapes, options, types or devices that do not fit.
    Cost: one product q.k per visible pair of the response's rows (half of causal attention's forward), a second one
    inside the horizon; memory of four floats a row and head.
    """
    check_shapes(query, key, attention_mask, response_mask, sinks)
    check_options(window, *horizon, sliding_window, softcap, rows)
    if not query.is_cuda and not INTERPRETED:
        raise ValueError(f"the triton backend needs CUDA tensors, got {query.device}; the torch backend runs anywhere")
    if query.dtype not in DTYPES or key.dtype != query.dtype:
        raise ValueError(f"expected bfloat16, float16 or float32 query and key, got {query.dtype} and {key.dtype}")
    if INTERPRETED and query.dtype == torch.bfloat16:
        query, key = query.float(), key.float()  # the interpreter multiplies the bits of bfloat16 as integers

    B, H, N, D = query.shape
    low, high = horizon
    masks = masks or row_masks(attention_mask, response_mask, horizon, rows, query.device)
    distance_BHN, waad_BHN, lse_BHN, fai_BHN = (query.new_empty(B, H, N, dtype=torch.float32) for _ in range(4))
    if distance_BHN.numel():
        tile = _tile(query.dtype, D)
        shared = {
            "N": N, "heads": H, "group": H // key.shape[1],
            "scale": scaling / softcap if softcap else 1.0,  # of q.k inside the softcap
            "factor": (softcap or scaling) * LOG2_E.value,  # of what comes out of it
            "sliding_window": min(N, sliding_window or N),
            "SOFTCAP": softcap is not None,
            # x3: float32 from tensor cores
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3",
            "D": D, "TILE_D": max(16, triton.next_power_of_2(D)), **tile,
        }  # fmt: skip
        strides = (*query.stride(), *key.stride())
        with torch.cuda.device_of(query):
            _rows[(triton.cdiv(N, tile["M"]) * B * H,)](
                query, key, masks.flags_BN, masks.first_key_B, masks.clear_from_B,
                lse_BHN if sinks is None else sinks.to(query.device, torch.float32).contiguous(),
                distance_BHN, waad_BHN, lse_BHN, *strides,
                window=min(window, N), SINKS=sinks is not None, **shared,
            )  # fmt: skip
            _columns[(triton.cdiv(N, tile["C"]) * B * H,)](
                query, key, masks.flags_BN, masks.in_horizon_BN, lse_BHN, fai_BHN, *strides,
                low=min(low, N), high=min(high, N), **shared,
            )  # fmt: skip
    if rows == "predictor":
        waad_BHN = at_the_next(waad_BHN)
    return AttentionMetrics(span_BH=distance_BHN.sum(-1) / masks.count_B1, waad_BHN=waad_BHN, fai_BHN=fai_BHN)


def _tile(dtype: torch.dtype, head_size: int) -> dict[str, int]:
    """M rows and C columns of a tile, its warps and pipeline stages: within 99 KB of shared memory (227 KB on Hopper),
    and in registers.
    """
    if INTERPRETED:
        return {"M": 16, "C": 16}
    if dtype == torch.float32:
        rows, warps = (64, 8) if head_size <= 128 else (16, 4)
        return {"M": rows, "C": 32, "num_warps": warps, "num_stages": 2}
    tile = {"M": 64, "C": 64 if head_size <= 128 else 32, "num_warps": 4, "num_stages": 3}
    return tile | {"maxnreg": 128} if head_size <= 64 else tile  # four programs on a multiprocessor instead of three


@triton.jit
def _rows(
    query, key, flags, first_key, clear_from, sinks, distance_out, waad_out, lse_out,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
    N, heads, group, scale, factor, sliding_window, window,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Mean distance (0 where no row), WAAD (NaN) and log-sum-exp (anything) of the M rows of one head."""
    blocks = tl.cdiv(N, M)
    # Neighbouring programs share a head's keys; its longest rows start first.
    start = (blocks - 1 - tl.program_id(0) % blocks) * M
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    t_M, d_D = start + tl.arange(0, M), tl.arange(0, TILE_D)
    out_M = head * N + t_M
    rows_M = (tl.load(flags + b * N + t_M, mask=t_M < N, other=0) & 2) != 0
    if tl.sum(rows_M.to(tl.int32), 0) == 0:
        tl.store(distance_out + out_M, tl.zeros([M], tl.float32), mask=t_M < N)
        tl.store(waad_out + out_M, tl.full([M], float("nan"), tl.float32), mask=t_M < N)
        return
    query_MD = tl.load(
        query + b * query_b + h * query_h + t_M[:, None] * query_n + d_D[None, :] * query_d,
        mask=rows_M[:, None] & (d_D[None, :] < D), other=0,
    )  # fmt: skip
    key += b * key_b + h // group * key_h
    flags += b * N

    # Three runs of columns: first where padding or a sliding window hides some; the inner ones, which every row sees
    # from a distance of at least the window; the near ones, where the future is hidden and distances are clipped.
    first = tl.maximum(tl.load(first_key + b), start - sliding_window + 1) // C * C
    near = tl.maximum(tl.maximum(start - window + 1, 0) // C * C, first)
    all_seen = tl.maximum(tl.load(clear_from + b), start + M - sliding_window)
    inner = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(all_seen, 0), C) * C, first), near)
    stop = tl.minimum(start + M, N)
    peak_M = tl.full([M], HIDDEN, tl.float32)
    mass_M, far_M = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    column_C = tl.arange(0, C).to(tl.float32)
    for s in range(first, inner, C):
        p_MC, kept_M, peak_M = _online(
            query_MD, key, flags, t_M, s, peak_M, key_n, key_d, N, scale, factor, sliding_window, False, SOFTCAP,
            PRECISION, C, D, TILE_D,
        )  # fmt: skip
        seen_M = tl.sum(p_MC, 1)
        mass_M = mass_M * kept_M + seen_M
        far_M = far_M * kept_M + ((t_M - s) * seen_M - tl.sum(p_MC * column_C[None, :], 1))
    for s in range(inner, near, C):
        p_MC, kept_M, peak_M = _online(
            query_MD, key, flags, t_M, s, peak_M, key_n, key_d, N, scale, factor, sliding_window, True, SOFTCAP,
            PRECISION, C, D, TILE_D,
        )  # fmt: skip
        seen_M = tl.sum(p_MC, 1)
        mass_M = mass_M * kept_M + seen_M
        far_M = far_M * kept_M + ((t_M - s) * seen_M - tl.sum(p_MC * column_C[None, :], 1))
    clipped_M = mass_M * window
    for s in range(near, stop, C):
        p_MC, kept_M, peak_M = _online(
            query_MD, key, flags, t_M, s, peak_M, key_n, key_d, N, scale, factor, sliding_window, False, SOFTCAP,
            PRECISION, C, D, TILE_D,
        )  # fmt: skip
        away_MC = (t_M - s).to(tl.float32)[:, None] - column_C[None, :]
        mass_M = mass_M * kept_M + tl.sum(p_MC, 1)
        far_M = far_M * kept_M + tl.sum(p_MC * away_MC, 1)
        clipped_M = clipped_M * kept_M + tl.sum(p_MC * tl.minimum(away_MC, window), 1)

    kept_M = tl.full([M], 1.0, tl.float32)
    top_M = peak_M * factor
    if SINKS:  # one more column, which takes mass and has no distance
        sink = tl.load(sinks + h) * LOG2_E
        highest_M = tl.maximum(top_M, sink)
        kept_M = tl.exp2(top_M - highest_M)
        mass_M, top_M = mass_M * kept_M + tl.exp2(sink - highest_M), highest_M
    tl.store(distance_out + out_M, tl.where(rows_M, far_M * kept_M / mass_M, 0.0), mask=t_M < N)
    tl.store(waad_out + out_M, tl.where(rows_M, clipped_M * kept_M / mass_M, float("nan")), mask=t_M < N)
    tl.store(lse_out + out_M, top_M + tl.log2(mass_M), mask=rows_M)


@triton.jit
def _online(
    query_MD, key, flags, t_M, start, peak_M, key_n, key_d, N, scale, factor, sliding_window, INNER: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: p (over the new maximum), what earlier sums keep, the new maximum."""
    s_C, d_D = start + tl.arange(0, C), tl.arange(0, TILE_D)
    keys_DC, inside_DC = key + d_D[:, None] * key_d + s_C[None, :] * key_n, d_D[:, None] < D
    if INNER:
        scores_MC = _scores(query_MD, tl.load(keys_DC, mask=inside_DC, other=0), scale, SOFTCAP, PRECISION)
    else:
        inside_DC = inside_DC & (s_C[None, :] < N)
        scores_MC = _scores(query_MD, tl.load(keys_DC, mask=inside_DC, other=0), scale, SOFTCAP, PRECISION)
        away_MC = t_M[:, None] - s_C[None, :]
        real_C = (tl.load(flags + s_C, mask=s_C < N, other=0) & 1) != 0
        seen_MC = real_C[None, :] & (away_MC >= 0) & (away_MC < sliding_window)
        scores_MC = tl.where(seen_MC, scores_MC, HIDDEN)
    highest_M = tl.maximum(peak_M, tl.max(scores_MC, 1))
    top_M = highest_M * factor
    return tl.exp2(scores_MC * factor - top_M[:, None]), tl.exp2(peak_M * factor - top_M), highest_M


@triton.jit
def _columns(
    query, key, flags, in_horizon, lse, fai_out,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
    N, heads, group, scale, factor, sliding_window, low, high,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """FAI of the C columns of one head: what they receive from the rows inside the horizon; NaN where undefined."""
    blocks = tl.cdiv(N, C)
    start = tl.program_id(0) % blocks * C
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    s_C, d_D = start + tl.arange(0, C), tl.arange(0, TILE_D)
    response_C = (tl.load(flags + b * N + s_C, mask=s_C < N, other=0) & 4) != 0
    if tl.sum(response_C.to(tl.int32), 0) == 0:
        tl.store(fai_out + head * N + s_C, tl.full([C], float("nan"), tl.float32), mask=s_C < N)
        return
    key_DC = tl.load(
        key + b * key_b + h // group * key_h + d_D[:, None] * key_d + s_C[None, :] * key_n,
        mask=(d_D[:, None] < D) & response_C[None, :], other=0,
    )  # fmt: skip
    received_C = tl.zeros([C], tl.float32)
    for t in range((start + low) // M * M, tl.minimum(start + C + high, N), M):
        t_M = t + tl.arange(0, M)
        rows_M = (tl.load(flags + b * N + t_M, mask=t_M < N, other=0) & 2) != 0
        lse_M = tl.load(lse + head * N + t_M, mask=rows_M, other=0)
        query_MD = tl.load(
            query + b * query_b + h * query_h + t_M[:, None] * query_n + d_D[None, :] * query_d,
            mask=rows_M[:, None] & (d_D[None, :] < D), other=0,
        )  # fmt: skip
        p_MC = tl.exp2(_scores(query_MD, key_DC, scale, SOFTCAP, PRECISION) * factor - lse_M[:, None])
        away_MC = t_M[:, None] - s_C[None, :]
        counts_MC = (away_MC >= low) & (away_MC <= high) & (away_MC < sliding_window) & rows_M[:, None]
        received_C += tl.sum(tl.where(counts_MC, p_MC, 0.0), 0)
    count_C = tl.load(in_horizon + b * N + s_C, mask=response_C, other=0).to(tl.float32)
    fai_C = tl.where(response_C & (count_C > 0), received_C / count_C, float("nan"))
    tl.store(fai_out + head * N + s_C, fai_C, mask=s_C < N)


@triton.jit
def _scores(query_MD, key_DC, scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Not yet times `factor`."""
    scores_MC = tl.dot(query_MD, key_DC, input_precision=PRECISION)
    if SOFTCAP:
        scores_MC = 2 * tl.sigmoid(2 * scale * scores_MC) - 1  # tanh, which Triton has no portable name for
    return scores_MC
