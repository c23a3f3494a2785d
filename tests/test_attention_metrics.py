"""Span, WAAD and FAI equal the dense attention map reduced in float64, without ever holding a map."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlattn.attention import AttentionMetrics, attention_metrics

NAN = float("nan")


def dense(query, key, *, scaling, attention_mask, response_mask, window=10, horizon=(10, 100), sliding_window=None,
          softcap=None, sinks=None, rows="token"):  # fmt: skip
    """The definitions, one map and one token at a time, in float64."""
    B, H, N, _ = query.shape
    groups = H // key.shape[1]
    distance_NN = torch.arange(N)[:, None] - torch.arange(N)
    span, waad, fai = torch.full((B, H), NAN), torch.full((B, H, N), NAN), torch.full((B, H, N), NAN)
    for b in range(B):
        real = attention_mask[b].bool()
        response = [s for s in range(N) if real[s] and response_mask[b, s]]
        row_of = {s: s if rows == "token" else s - 1 for s in response}
        row_of = {s: t for s, t in row_of.items() if t >= 0 and real[t]}
        visible = (distance_NN >= 0) & real
        if sliding_window is not None:
            visible &= distance_NN < sliding_window
        for h in range(H):
            scores = query[b, h].double() @ key[b, h // groups].double().T * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~visible, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[h].double().expand(N, 1)], 1)
            p = scores.softmax(-1)[:, :N]
            spans = []
            for s, t in row_of.items():
                spans.append((p[t] * distance_NN[t])[: t + 1].sum())
                waad[b, h, s] = (p[t] * distance_NN[t].clamp(max=window))[: t + 1].sum()
            if spans:
                span[b, h] = torch.stack(spans).mean()
            for s in response:
                later = [t for t in row_of.values() if s + horizon[0] <= t <= s + horizon[1]]
                if later:
                    fai[b, h, s] = p[later, s].mean()
    return AttentionMetrics(span_BH=span, waad_BHN=waad, fai_BHN=fai)


def error(got, expected):
    """Largest error of the three, relative where the value is above 1; the same places must be NaN."""
    worst = 0.0
    for name in ("span_BH", "waad_BHN", "fai_BHN"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan()), name
        worst = max(worst, ((a - b).abs() / b.abs().clamp(min=1)).nan_to_num(0).max().item())
    return worst


def masks(B, N, generator, holes=True):
    """Left and right padding, a prompt, a response with holes; rows may be all padding or have no response."""
    attention, response = torch.zeros(B, N), torch.zeros(B, N)
    for b in range(B):
        left, begin, end = torch.randint(0, N + 1, (3,), generator=generator).sort().values.tolist()
        attention[b, left:end] = 1
        response[b, begin:end] = 1
        if holes:
            response[b] *= torch.rand(N, generator=generator) > 0.2
    return attention, response


def tensors(B, K, groups, N, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, K * groups, N, D, generator=generator).to(dtype)
    return query, torch.randn(B, K, N, D, generator=generator).to(dtype), generator


@settings(max_examples=300, deadline=None)
@given(
    B=st.integers(1, 3), K=st.integers(1, 3), groups=st.integers(1, 4), N=st.integers(1, 48), D=st.integers(1, 16),
    seed=st.integers(0, 2**31), window=st.integers(1, 20), low=st.integers(0, 20), width=st.integers(0, 60),
    block=st.sampled_from([None, 1, 3, 8, 64]), sliding_window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.sampled_from([None, 0.5, 30.0]), sink=st.booleans(), rows=st.sampled_from(["token", "predictor"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    inner_padding=st.booleans(), scaling=st.sampled_from([0.1, 1.0, 8.0]),
)  # fmt: skip
def test_equals_the_dense_maps(
    B, K, groups, N, D, seed, window, low, width, block, sliding_window, softcap, sink, rows, dtype, inner_padding,
    scaling,
):  # fmt: skip
    query, key, generator = tensors(B, K, groups, N, D, seed, dtype)
    attention_mask, response_mask = masks(B, N, generator)
    if inner_padding:
        attention_mask *= torch.rand(B, N, generator=generator) > 0.2
    options = {
        "scaling": scaling, "attention_mask": attention_mask, "response_mask": response_mask, "window": window,
        "horizon": (low, low + width), "sliding_window": sliding_window, "softcap": softcap, "rows": rows,
        "sinks": torch.randn(K * groups, generator=generator) * 3 if sink else None,
    }  # fmt: skip
    assert error(attention_metrics(query, key, block=block, **options), dense(query, key, **options)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_dense_maps_far_into_a_text(dtype):
    query, key, _ = tensors(1, 1, 2, 1500, 16, dtype=dtype)
    ones = torch.ones(1, 1500)
    options = {"scaling": 1.0, "attention_mask": ones, "response_mask": ones}
    for block in (None, 256):
        assert error(attention_metrics(query, key, block=block, **options), dense(query, key, **options)) <= 1e-5


def test_worked_example():
    # Keys 0, log 2, log 3, 0 against a query of 1: rows of the map are [1], [1 2]/3, [1 2 3]/6, [1 2 3 1]/7.
    key = torch.tensor([1.0, 2.0, 3.0, 1.0]).log().view(1, 1, 4, 1)
    ones, response = torch.ones(1, 4), torch.tensor([[0, 1, 1, 1]])
    options = {"scaling": 1.0, "attention_mask": ones, "response_mask": response, "window": 1, "horizon": (1, 2)}
    got = attention_metrics(torch.ones(1, 1, 4, 1), key, **options)
    # Mean distance: row 1: 1/3; row 2: (2·1 + 1·2)/6 = 2/3; row 3: (3·1 + 2·2 + 1·3)/7 = 10/7.
    assert got.span_BH.item() == pytest.approx((1 / 3 + 2 / 3 + 10 / 7) / 3, abs=1e-6)
    # Clipped at 1: whatever is not on the token itself.
    assert got.waad_BHN[0, 0].tolist() == pytest.approx([NAN, 1 / 3, 1 / 2, 6 / 7], abs=1e-6, nan_ok=True)
    # Token 1 gets 2/6 from row 2 and 2/7 from row 3; token 2 gets 3/7 from row 3; token 3 has no later row.
    assert got.fai_BHN[0, 0].tolist() == pytest.approx([NAN, (2 / 6 + 2 / 7) / 2, 3 / 7, NAN], abs=1e-6, nan_ok=True)

    # A sink of logit log 4 takes 4/10 of row 2 and 4/11 of row 3.
    sunk = attention_metrics(torch.ones(1, 1, 4, 1), key, sinks=torch.tensor([4.0]).log(), **options)
    assert sunk.waad_BHN[0, 0].tolist() == pytest.approx([NAN, 1 / 7, 3 / 10, 6 / 11], abs=1e-6, nan_ok=True)

    # One row earlier: tokens 1, 2, 3 come from rows 0, 1, 2; token 1 is seen by row 2 alone, token 2 by none.
    before = attention_metrics(torch.ones(1, 1, 4, 1), key, rows="predictor", **options)
    assert before.span_BH.item() == pytest.approx((0 + 1 / 3 + 2 / 3) / 3, abs=1e-6)
    assert before.waad_BHN[0, 0].tolist() == pytest.approx([NAN, 0, 1 / 3, 1 / 2], abs=1e-6, nan_ok=True)
    assert before.fai_BHN[0, 0].tolist() == pytest.approx([NAN, 2 / 6, NAN, NAN], abs=1e-6, nan_ok=True)


def test_a_window_of_one_sees_only_itself():
    query, key, _ = tensors(1, 1, 1, 5, 4)
    ones = torch.ones(1, 5)
    got = attention_metrics(
        query, key, scaling=1.0, attention_mask=ones, response_mask=ones, sliding_window=1, horizon=(0, 0)
    )
    assert got.span_BH.item() == 0 and got.waad_BHN.abs().max() == 0
    assert got.fai_BHN.min() == 1


@pytest.mark.parametrize("garbage", [0.0, 50.0, NAN])
def test_padding_shifts_and_what_it_holds_stays_there(garbage):
    query, key, _ = tensors(2, 2, 2, 30, 8)
    ones, response = torch.ones(2, 30), torch.arange(30).expand(2, 30) >= 10
    options = {"scaling": 0.5, "horizon": (2, 9)}
    plain = attention_metrics(query, key, attention_mask=ones, response_mask=response, **options)

    lefts = (7, 1)  # of 12 columns of padding, a text each

    def pad(tensor, value, dim):
        wide = torch.full((*tensor.shape[:dim], 42, *tensor.shape[dim + 1 :]), value, dtype=tensor.dtype)
        for b, left in enumerate(lefts):
            wide[b].narrow(dim - 1, left, 30).copy_(tensor[b])
        return wide

    padded = attention_metrics(
        pad(query, garbage, 2), pad(key, garbage, 2), block=4,
        attention_mask=pad(ones, 0, 1), response_mask=pad(response, False, 1), **options,
    )  # fmt: skip
    torch.testing.assert_close(padded.span_BH, plain.span_BH)
    for name in ("waad_BHN", "fai_BHN"):
        expected = pad(getattr(plain, name), NAN, 2)
        torch.testing.assert_close(getattr(padded, name), expected, equal_nan=True)


def test_grouped_heads_equal_repeated_keys_and_rows_of_a_batch_do_not_meet():
    query, key, generator = tensors(3, 2, 3, 40, 8)
    attention_mask, response_mask = masks(3, 40, generator)
    options = {"scaling": 1.0, "window": 4, "horizon": (1, 8), "block": 16}
    grouped = attention_metrics(query, key, attention_mask=attention_mask, response_mask=response_mask, **options)
    repeated = attention_metrics(
        query, key.repeat_interleave(3, 1), attention_mask=attention_mask, response_mask=response_mask, **options
    )
    assert error(grouped, repeated) <= 1e-6
    for b in range(3):
        one = slice(b, b + 1)
        alone = attention_metrics(
            query[one], key[one], attention_mask=attention_mask[one], response_mask=response_mask[one], **options
        )
        for name in ("span_BH", "waad_BHN", "fai_BHN"):
            torch.testing.assert_close(getattr(grouped, name)[one], getattr(alone, name), equal_nan=True)


def test_scores_far_from_zero_and_extreme_sinks():
    query, key, _ = tensors(1, 1, 2, 20, 8)
    ones = torch.ones(1, 20)
    options = {"scaling": 200.0, "attention_mask": ones, "response_mask": ones, "horizon": (1, 9)}
    for sinks in (None, torch.tensor([-1e4, 1e4])):
        got, expected = (f(query, key, sinks=sinks, **options) for f in (attention_metrics, dense))
        # At scores of thousands, float32 itself is off by 1e-4.
        assert error(got, expected) <= 1e-2
        assert got.span_BH.isfinite().all()


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("shift", [-1e4, -120, -90, -50, -40, 40, 65, 75, 100, 1e4])
def test_where_a_rows_scores_lie_does_not_matter(shift, sink):
    """On either side of what their exponentials can be summed to, and of what float32 can hold."""
    query, key, _ = tensors(2, 1, 2, 40, 8)
    query[0, :, 20:, 0] = 1.0  # the rows of one text, in its second half: others stay near 0
    key[0, :, :, 0] = shift
    ones = torch.ones(2, 40)
    options = {"scaling": 1.0, "attention_mask": ones, "response_mask": ones, "horizon": (1, 9)}
    options["sinks"] = torch.tensor([shift, 0.0]) if sink else None
    for block in (None, 8):
        found, expected = attention_metrics(query, key, block=block, **options), dense(query, key, **options)
        assert error(found, expected) <= 1e-5 + 1e-6 * abs(shift)  # float32 rounds the scores themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_a_forward_rounds_nothing(dtype):
    query, key, _ = tensors(1, 2, 2, 40, 8, dtype=dtype)
    ones = torch.ones(1, 40)
    options = {"scaling": 1.0, "attention_mask": ones, "response_mask": ones, "horizon": (1, 9)}
    expected = attention_metrics(query, key, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_metrics(query, key, **options)
    for name in ("span_BH", "waad_BHN", "fai_BHN"):
        assert torch.equal(getattr(found, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1)), name


class Largest(TorchDispatchMode):
    """The elements of the largest tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_map_is_ever_held():
    B, H, N, block = 1, 4, 2048, 32
    query, key, _ = tensors(B, 2, 2, N, 8)
    ones = torch.ones(B, N)
    with Largest() as largest:
        attention_metrics(query, key, scaling=1.0, attention_mask=ones, response_mask=ones, block=block)
    assert largest.numel <= B * H * block * N  # 1/16 of one N x N map
    with Largest() as largest:  # the default takes at most 256 rows
        attention_metrics(query, key, scaling=1.0, attention_mask=ones, response_mask=ones)
    assert largest.numel <= B * H * 256 * N

    response = torch.zeros(B, N)
    response[:, 500:510] = 1  # the prompt's rows and the keys after the response cost nothing
    with Largest() as largest:
        attention_metrics(query, key, scaling=1.0, attention_mask=ones, response_mask=response)
    assert largest.numel <= B * H * 10 * N


def test_gradients_and_inputs_are_left_alone():
    query, key, _ = tensors(1, 1, 1, 12, 4)
    query.requires_grad_(), key.requires_grad_()
    before = query.detach().clone(), key.detach().clone()
    mask = torch.ones(1, 12)
    mask[:, :2] = 0
    got = attention_metrics(query, key, scaling=1.0, attention_mask=mask, response_mask=mask)
    assert not got.span_BH.requires_grad
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


@pytest.mark.parametrize("N", [0, 1, 3])
def test_nothing_to_measure(N):
    query, key, _ = tensors(2, 1, 2, N, 4)
    none = torch.zeros(2, N)
    for attention_mask, response_mask in ((none, none), (none, none + 1), (none + 1, none)):
        got = attention_metrics(query, key, scaling=1.0, attention_mask=attention_mask, response_mask=response_mask)
        assert got.span_BH.isnan().all() and got.waad_BHN.isnan().all() and got.fai_BHN.isnan().all()
        assert got.waad_BHN.shape == got.fai_BHN.shape == (2, 2, N)
    # The first token of a text was drawn from no row.
    start = torch.arange(N).expand(2, N) == 0
    first = attention_metrics(query, key, scaling=1.0, attention_mask=none + 1, response_mask=start, rows="predictor")
    assert first.waad_BHN.shape == (2, 2, N)
    assert first.waad_BHN.isnan().all() and first.span_BH.isnan().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query": torch.zeros(1, 3, 5, 4)}, "multiple"),
        ({"query": torch.zeros(1, 2, 6, 4)}, "differ"),
        ({"query": torch.zeros(2, 5, 4)}, "expected query"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask"),
        ({"response_mask": torch.ones(5)}, "response_mask"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"horizon": (5, 4)}, "horizon"),
        ({"horizon": (-1, 4)}, "horizon"),
        ({"window": 0}, "window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"softcap": 0.0}, "softcap"),
        ({"window": math.nan}, "window"),
        ({"window": 1.5}, "window"),
        ({"window": True}, "window"),
        ({"horizon": (1, math.inf)}, "horizon"),
        ({"horizon": (0, 10**30)}, "horizon"),
        ({"sliding_window": 1.5}, "sliding_window"),
        ({"softcap": math.inf}, "softcap"),
        ({"query": torch.zeros(1, 4, 5, 0), "key": torch.zeros(1, 2, 5, 0)}, "size 0"),
        ({"query": torch.zeros(1, 0, 5, 4)}, "multiple"),
        ({"rows": "next"}, "rows"),
        ({"block": 0}, "block"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    query, key, ones = torch.zeros(1, 4, 5, 4), torch.zeros(1, 2, 5, 4), torch.ones(1, 5)
    arguments = {"query": query, "key": key, "scaling": 1.0, "attention_mask": ones, "response_mask": ones}
    with pytest.raises(ValueError, match=said):
        attention_metrics(**{**arguments, **change})
