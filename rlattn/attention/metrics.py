"""Span, WAAD and FAI of attention heads from queries and keys, block by block: no N x N map (arXiv 2510.13554).

Legend: B rollouts, N positions (prompt and completion), H query heads, K key-value heads, G = H / K, D head size,
Q the rows (queries) of one block, S the keys that block can see, C some of those columns; Z = B * K, R = G * Q.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlattn.attention.row_masks import RowMasks, row_masks

# Rows and bytes of scores at a time where `block` is None. On a CPU, few rows waste little beyond the diagonal and in
# the bands, and the scores stay in the last-level cache; on a GPU, enough to fill it.
LIMITS = {"cpu": (64, 2**24), "cuda": (256, 2**29)}
# Of a row's exponentials: none overflowed, and one that underflowed is below any rounding of their sum.
SOUND_MASS = (1e-20, 1e30)
LARGEST = 2**31 - 1  # tokens


@dataclass(frozen=True, kw_only=True)
class AttentionMetrics:
    """What one attention layer looks at. All float32, detached, NaN where undefined."""

    span_BH: Tensor
    """Mean distance, in tokens, that the response's rows look back (eq. 7)."""
    waad_BHN: Tensor
    """The same per response token, every distance clipped at the window (definition 4.1)."""
    fai_BHN: Tensor
    """Mean attention a response token receives from the response's rows inside the horizon (definition 4.2)."""


@torch.no_grad()
def attention_metrics(
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
    block: int | None = None,
    masks: RowMasks | None = None,
) -> AttentionMetrics:
    """Span, WAAD and FAI of every head of one causal layer (arXiv 2510.13554, section 4).

    With p the softmax row of query t over the keys s <= t, R the response's rows, W the window, (lo, hi) the horizon:

        span    mean over t in R of sum_s p[t, s] * (t - s)                                 eq. 7
        waad_t  sum_s p[t, s] * min(t - s, W)              NaN outside the response         definition 4.1
        fai_s   mean of p[t, s] over t in R with s + lo <= t <= s + hi, for response s      definition 4.2
                NaN where no such row

    query (B, H, N, D), key (B, K, N, D): as the attention function gets them, after RoPE, key heads not repeated. No
    KV cache. Half precision is raised to float32 before the product (float64 stays). masks (B, N): 1 = real / response
    token; padding on either side and holes in the response are fine. Distances are differences of column index, in
    tokens; that is the distance in positions where padding lies left or right of a text, not inside it.
    scaling: the factor on q.k. sliding_window: s is visible where t - s < sliding_window (as in transformers).
    softcap: scores become softcap * tanh(scores / softcap). sinks (H,): logits of a column that takes mass and belongs
    to no token (gpt-oss); rows then sum to less than 1.
    rows: "token", the row in which a token is the query; "predictor", the one before, from which it was drawn
    (R is then those earlier rows; distances and the horizon count from them).
    block: rows at a time; None chooses by size and device. It changes memory and speed, not the result.
    masks: what `row_masks` made of both masks, `horizon` and `rows` for another layer of the same forward: saves time,
    and is believed.
    In float32 the rounding error is a few 1e-7 of the span's distance, of W (WAAD), and of 1 (FAI); a softcap adds 1e-7
    of itself to the error of every score.

    Raises ValueError for shapes or options that do not fit. Rows with scores that are not finite give NaN.
    Cost: on a CPU about what scaled_dot_product_attention takes for the response's rows, and one buffer of
    B * H * block * N floats. On CUDA the products follow `torch.backends.cuda.matmul.fp32_precision`.
    """
    low, high = horizon
    check_shapes(query, key, attention_mask, response_mask, sinks)
    check_options(window, low, high, sliding_window, softcap, rows, block)
    B, H, N, D = query.shape
    K = key.shape[1]
    window = min(window, N)  # no distance is longer; a huge factor would cost digits
    device, dtype = query.device, torch.promote_types(query.dtype, torch.float32)
    masks = masks or row_masks(attention_mask, response_mask, horizon, rows, device)
    rows_BN = masks.rows_BN

    span_BH = torch.zeros(B, H, dtype=dtype, device=device)
    waad_BHN = torch.full((B, H, N), torch.nan, dtype=dtype, device=device)
    fai_BHN = torch.zeros(B, H, N, dtype=dtype, device=device)

    blocks: list[tuple[int, int, int]] = []
    if active := masks.active:
        widest = active[-1] + 1 - masks.first_key if sliding_window is None else min(N, sliding_window)
        size = block or _block_size(B * H * widest * dtype.itemsize, device)
        blocks = _blocks(active, size, masks.first_key, sliding_window)
    cells = max(((end - start) * (end - first) for start, end, first in blocks), default=0)
    scores_flat = torch.empty(B * H * cells, dtype=dtype, device=device)

    # Zeros, not whatever the model left in the padding: a NaN would survive a weight of 0.
    key_ZND = key.masked_fill(~masks.real_BN[:, None, :, None], 0).to(dtype).reshape(B * K, N, D)

    column_N = torch.arange(N, device=device)
    with torch.autocast(device.type, enabled=False):  # it would round what the products below get
        for start, end, first in blocks:
            Q, S = end - start, end - first
            rows_B1Q = rows_BN[:, None, start:end]
            query_BHQD = query[:, :, start:end].to(dtype) * (2 * scaling / softcap if softcap else scaling)
            # Query heads of a group are neighbours: they become more rows against their one key head.
            query_ZRD = query_BHQD.masked_fill(~rows_B1Q[..., None], 0).reshape(B * K, -1, D)
            t_Q1, s_S = column_N[start:end, None], column_N[first:end]
            hide = partial(
                _hide, t_Q1=t_Q1, s_S=s_S, hidden_BC=masks.hidden_BN[:, first:end], sliding_window=sliding_window
            )
            scores_BHQS = scores_flat[: B * H * Q * S].view(B, H, Q, S)
            score = partial(_score, scores_BHQS, query_ZRD, key_ZND[:, first:end], softcap)
            # Distances from the block's last row, so that near keys keep their digits far into a text.
            p_BHQS, mass_BHQ, distance_BHQ, keep_BHQ = _softmax(score, hide, (end - 1 - s_S).to(dtype), sinks, rows_B1Q)
            away_BHQ = keep_BHQ * (distance_BHQ - mass_BHQ * (end - 1 - t_Q1[:, 0]))
            span_BH += away_BHQ.masked_fill(~rows_B1Q, 0).sum(-1)  # not times 0: what is no row may be NaN

            # sum_s p * min(t-s, W) = mass * W - sum over t-s < W of p * (W - (t-s)).
            near = slice(max(0, S - Q - window + 1), S)
            short_QC = (window - (t_Q1 - s_S[near])).clamp(min=0).to(dtype)
            waad_BHQ = keep_BHQ * (mass_BHQ * window - (p_BHQS[..., near] * short_QC).sum(-1))
            waad_BHN[:, :, start:end] = waad_BHQ.masked_fill(~rows_B1Q, torch.nan)

            band = slice(max(0, S - Q - high), max(0, S - low))
            distance_QC = t_Q1 - s_S[band]
            inside_QC = (distance_QC >= low) & (distance_QC <= high)
            if device.type == "cpu" and away_BHQ.isfinite().all():  # a sixth of the other's time
                counted_BHQC = p_BHQS[..., band] * inside_QC
            else:
                counted_BHQC = p_BHQS[..., band].masked_fill(~(inside_QC & rows_B1Q[..., None]), 0)
            received_BH1C = keep_BHQ[..., None, :] @ counted_BHQC
            fai_BHN[:, :, first + band.start : first + band.stop] += received_BH1C[..., 0, :]

    fai_BHN = (fai_BHN / masks.in_horizon_BN[:, None]).masked_fill(~masks.response_BN[:, None], torch.nan)
    if rows == "predictor":
        waad_BHN = at_the_next(waad_BHN)
    return AttentionMetrics(
        span_BH=(span_BH / masks.count_B1).float(), waad_BHN=waad_BHN.float(), fai_BHN=fai_BHN.float()
    )


def at_the_next(waad_BHN: Tensor) -> Tensor:
    """What a predicting row looked at, at the token it predicted."""
    return torch.nn.functional.pad(waad_BHN, (1, 0), value=torch.nan)[..., :-1]


def _score(scores_BHQS: Tensor, query_ZRD: Tensor, key_ZSD: Tensor, softcap: float | None) -> Tensor:
    torch.bmm(query_ZRD, key_ZSD.transpose(1, 2), out=scores_BHQS.view(len(key_ZSD), -1, key_ZSD.shape[1]))
    if softcap is not None:
        scores_BHQS.sigmoid_().mul_(2 * softcap).sub_(softcap)  # tanh x = 2 sigmoid(2x) - 1, and much quicker
    return scores_BHQS


def _softmax(
    score: Callable[[], Tensor],
    hide: Callable[[Tensor, float], Tensor],
    distance_S: Tensor,
    sinks: Tensor | None,
    rows_B1Q: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p_BHQS; its sums over the keys, plain and times their distances; and the factor that makes p a softmax (beside
    the sink): 0 where there is no row.

    p is the scores' buffer: half the memory, and it stays in cache. On a CPU it is the scores' exponentials as they
    are: the search for the largest score and the division take half the time of a softmax. Where that is not sound, or
    on CUDA, where to ask would wait for the GPU, it is torch's softmax.
    """
    scores_BHQS = score()
    if scores_BHQS.device.type == "cpu":
        p_BHQS = hide(scores_BHQS.exp_(), 0)  # hidden afterwards: the exponential of a huge number is slow
        # One product reads p once; with p on the left it would take twice as long.
        sums_2R = torch.stack([torch.ones_like(distance_S), distance_S]) @ p_BHQS.view(-1, len(distance_S)).t()
        mass_BHQ, distance_BHQ = sums_2R.view(2, *p_BHQS.shape[:-1])
        all_BHQ = mass_BHQ if sinks is None else mass_BHQ + sinks.to(mass_BHQ).exp()[:, None]
        if ((all_BHQ > SOUND_MASS[0]) & (all_BHQ < SOUND_MASS[1]) | ~rows_B1Q).all():
            return p_BHQS, mass_BHQ, distance_BHQ, (1 / all_BHQ).masked_fill(~rows_B1Q, 0)
        scores_BHQS = score()
    hide(scores_BHQS, torch.finfo(scores_BHQS.dtype).min)  # finite: a padded row that sees no key stays finite too
    keep_BHQ = rows_B1Q.to(scores_BHQS.dtype).expand(scores_BHQS.shape[:-1])
    if sinks is None:
        p_BHQS = torch.softmax(scores_BHQS, -1, out=scores_BHQS)
    else:
        top_BHQ = scores_BHQS.amax(-1)
        p_BHQS = torch.softmax(scores_BHQS, -1, out=scores_BHQS)
        lse_BHQ = top_BHQ - p_BHQS.amax(-1).log()  # no second pass of exponentials: the largest p is exp(top - lse)
        keep_BHQ = keep_BHQ * torch.sigmoid(lse_BHQ - sinks.to(lse_BHQ)[:, None])
    distance_BHQ = torch.mv(p_BHQS.view(-1, len(distance_S)), distance_S).view_as(keep_BHQ)
    return p_BHQS, torch.ones_like(keep_BHQ), distance_BHQ, keep_BHQ


def _hide(
    values_BHQS: Tensor, fill: float, *, t_Q1: Tensor, s_S: Tensor, hidden_BC: Tensor, sliding_window: int | None
) -> Tensor:
    """Hides in place what a row does not see. Every mask touches only the columns where it can hide something."""
    Q, S = values_BHQS.shape[-2:]
    values_BHQS[..., -Q:].masked_fill_(s_S[-Q:] > t_Q1, fill)
    if sliding_window is not None and (left := S - sliding_window) > 0:
        values_BHQS[..., :left].masked_fill_(s_S[:left] <= t_Q1 - sliding_window, fill)
    if hidden_BC.shape[1]:
        values_BHQS[..., : hidden_BC.shape[1]].masked_fill_(hidden_BC[:, None, None], fill)
    return values_BHQS


def _block_size(row_bytes: int, device: torch.device) -> int:
    most_rows, most_bytes = LIMITS.get(device.type, LIMITS["cpu"])
    return min(most_rows, max(32, most_bytes // row_bytes))


def _blocks(active: list[int], size: int, first_key: int, sliding_window: int | None) -> list[tuple[int, int, int]]:
    """(start, end, first key) of blocks of at most `size` columns; they begin and end on active ones and cover them."""
    runs = [[active[0], active[0]]]
    for t in active:
        if t >= runs[-1][0] + size:
            runs.append([t, t])
        runs[-1][1] = t
    reach = sliding_window or active[-1] + 1
    return [(start, last + 1, max(first_key, start - reach + 1)) for start, last in runs]


def check_shapes(
    query: Tensor, key: Tensor, attention_mask: Tensor, response_mask: Tensor, sinks: Tensor | None
) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"expected query (B, H, N, D) and key (B, K, N, D), got {_shape(query)} and {_shape(key)}")
    B, H, N, D = query.shape
    K = key.shape[1]
    if key.shape != (B, K, N, D):
        raise ValueError(f"query {_shape(query)} and key {_shape(key)} differ in more than heads; a KV cache is no use")
    if K == 0 or H == 0 or H % K:
        raise ValueError(f"{H} query heads are not a multiple of {K} key heads")
    if D == 0:
        raise ValueError(f"query {_shape(query)}: a head of size 0 has no scores")
    for name, mask in (("attention_mask", attention_mask), ("response_mask", response_mask)):
        if mask.shape != (B, N):
            raise ValueError(f"{name}: expected {(B, N)}, got {_shape(mask)}")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"sinks: expected one per query head, {(H,)}, got {_shape(sinks)}")


def check_options(
    window: int,
    low: int,
    high: int,
    sliding_window: int | None,
    softcap: float | None,
    rows: str,
    block: int | None = None,
) -> None:
    _check_whole("window", window, 1)
    _check_whole("horizon's low", low, 0)
    _check_whole("horizon's high", high, low)
    if sliding_window is not None:
        _check_whole("sliding_window", sliding_window, 1)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number above 0, or None, got {softcap}")
    if rows not in ("token", "predictor"):
        raise ValueError(f"rows: expected 'token' or 'predictor', got {rows!r}")
    if block is not None:
        _check_whole("block", block, 1)


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise ValueError(f"{name}: expected a whole number from {least} to {LARGEST:,}, got {value}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
