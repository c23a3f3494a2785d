"""The Triton kernels equal the torch path: on a GPU where there is one, else through Triton's interpreter."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from forked import PYTHON

from rlattn.attention import attention_metrics

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU; test_through_the_interpreter runs it in a process of its own"
)
NAN = float("nan")
PLAIN = {"B": 2, "K": 1, "group": 2, "N": 45, "D": 16}
CASES = {
    "defaults": {},
    "grouped heads": {"K": 2, "group": 3},
    "odd sizes": {"B": 3, "N": 37, "D": 20, "window": 3, "horizon": (2, 6)},
    "one token": {"N": 1, "D": 1},
    "horizon from itself": {"horizon": (0, 0)},
    "horizon beyond the text": {"horizon": (3, 10**9)},
    "window beyond the text": {"window": 10**9},
    "window of one": {"window": 1, "horizon": (1, 8)},
    "sliding window": {"sliding_window": 7, "horizon": (2, 30)},
    "sliding window wider than a tile": {"sliding_window": 20, "N": 70, "B": 1},
    "sliding window far beyond the window": {"sliding_window": 50, "N": 110, "B": 1, "window": 3},
    "softcap": {"softcap": 2.0, "horizon": (1, 9)},
    "sinks": {"sinks": True, "horizon": (1, 9)},
    "predictor": {"rows": "predictor", "horizon": (1, 9)},
    "half precision": {"dtype": torch.float16, "horizon": (1, 9)},
    "bfloat16": {"dtype": torch.bfloat16, "horizon": (1, 9)},
    "peaked": {"scaling": 20.0, "horizon": (1, 9)},
    "all of it": {
        "K": 2, "sliding_window": 19, "softcap": 5.0, "sinks": True, "rows": "predictor", "horizon": (2, 9),
        "dtype": torch.bfloat16, "window": 4,
    },
}  # fmt: skip


def inputs(*, B, K, group, N, D, seed=0, dtype=torch.float32, sinks=False, **options):
    """Left, right and inner padding, a response with holes, garbage where the padding is."""
    random = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(B, heads, N, D, generator=random).to(dtype) for heads in (K * group, K))
    attention_mask, response_mask = torch.zeros(2, B, N, dtype=torch.long)
    for b in range(B):
        left, begin, right = (torch.rand(3, generator=random) * torch.tensor([N / 4, N / 2, N / 4])).long().tolist()
        attention_mask[b, left : N - right] = 1
        response_mask[b, left + begin :] = 1
    if N > 1:
        attention_mask *= torch.rand(B, N, generator=random) > 0.05
        response_mask *= torch.rand(B, N, generator=random) > 0.1
    hidden = (attention_mask == 0)[:, None, :, None]
    options = {"scaling": 0.3, "attention_mask": attention_mask, "response_mask": response_mask, **options}
    if sinks:
        options["sinks"] = torch.randn(K * group, generator=random) * 2
    query, key = query.masked_fill(hidden, NAN), key.masked_fill(hidden, NAN)
    on_device = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in options.items()}
    return query.to(DEVICE), key.to(DEVICE), on_device


def assert_equal(got, expected):
    for name in ("span_BH", "waad_BHN", "fai_BHN"):
        a, b = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(a, b, equal_nan=True, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)


@runs_kernels
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_torch_path(name):
    from rlattn.attention.kernels import attention_metrics_triton

    query, key, options = inputs(**{**PLAIN, **CASES[name]}, seed=len(name))
    got = attention_metrics_triton(query, key, **options)
    assert got.waad_BHN.isfinite().any() and got.span_BH.isfinite().any()
    assert_equal(got, attention_metrics(query, key, **options))


@runs_kernels
@pytest.mark.parametrize("options", [{}, {"sliding_window": 150}, {"sinks": True, "dtype": torch.bfloat16}])
def test_kernels_pass_over_padding_of_several_tiles(options):
    """Tiles that hold nothing but padding, or a hole, before the columns that every row sees."""
    from rlattn.attention.kernels import attention_metrics_triton

    N = 64 if INTERPRETED else 700
    query, key, options = inputs(**{**PLAIN, "N": N, "B": 3, **options})
    options["attention_mask"][:] = 1
    options["attention_mask"][0, : N // 2] = options["attention_mask"][1, N // 3] = 0
    options["response_mask"][:] = 0
    options["response_mask"][:, N // 2 + 5 :] = 1
    query, key = query.nan_to_num(0.5), key.nan_to_num(0.5)
    got = attention_metrics_triton(query, key, **options)
    assert got.span_BH.isfinite().all()
    assert_equal(got, attention_metrics(query, key, **options))


@runs_kernels
def test_kernels_repeat_bit_for_bit_and_strides_do_not_matter():
    from rlattn.attention.kernels import attention_metrics_triton

    query, key, options = inputs(**PLAIN, horizon=(1, 9))
    first = attention_metrics_triton(query, key, **options)
    # as attention modules make them: (B, N, H, D), transposed
    query, key = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key))
    again = attention_metrics_triton(query, key, **options)
    for name in ("span_BH", "waad_BHN", "fai_BHN"):
        assert torch.equal(getattr(first, name).nan_to_num(-1), getattr(again, name).nan_to_num(-1))
    options |= {name: options[name].T.contiguous().T for name in ("attention_mask", "response_mask")}
    options["sinks"] = torch.linspace(-2, 2, 2 * query.shape[1], device=DEVICE)[::2]
    assert_equal(attention_metrics_triton(query, key, **options), attention_metrics(query, key, **options))


@runs_kernels
def test_kernels_run_where_tf32_is_asked_for_in_torchs_new_way(monkeypatch):
    from rlattn.attention.kernels import attention_metrics_triton

    query, key, options = inputs(**PLAIN, horizon=(1, 9))
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"  # as transformers does for `tf32: true`
    try:
        found = attention_metrics_triton(query, key, **options)
    finally:
        torch.backends.fp32_precision = before
    for name in ("span_BH", "waad_BHN", "fai_BHN"):
        torch.testing.assert_close(
            getattr(found, name), getattr(attention_metrics(query, key, **options), name), equal_nan=True, atol=1e-2,
            rtol=1e-2,
        )  # fmt: skip


@runs_kernels
def test_kernels_have_nan_where_the_torch_path_has_it():
    from rlattn.attention.kernels import attention_metrics_triton

    query, key, options = inputs(B=2, K=1, group=2, N=60, D=8, horizon=(2, 5))
    options |= {"attention_mask": torch.ones(2, 60, device=DEVICE), "response_mask": torch.ones(2, 60, device=DEVICE)}
    options["response_mask"][0, 30:] = 0
    query, key = query.nan_to_num(0.5), key.nan_to_num(0.5)
    query[1, :, 40] = key[0, :, 35] = NAN
    found = attention_metrics_triton(query, key, **options)
    for block in (None, 1, 8):
        assert_equal(found, attention_metrics(query, key, block=block, **options))
    assert found.span_BH[0].isfinite().all() and found.fai_BHN[1].isnan().sum() == 2 * (4 + 2)  # 2 have no row at all


@runs_kernels
def test_kernels_give_nan_where_nothing_is_measured_or_finite():
    from rlattn.attention.kernels import attention_metrics_triton

    for N in (0, 5):
        none = torch.zeros(1, N, device=DEVICE)
        query, key = torch.zeros(1, 2, N, 8, device=DEVICE), torch.zeros(1, 1, N, 8, device=DEVICE)
        got = attention_metrics_triton(query, key, scaling=1.0, attention_mask=none + 1, response_mask=none)
        assert got.span_BH.isnan().all() and got.waad_BHN.isnan().all() and got.fai_BHN.isnan().all()
    query[:, :, 3] = NAN
    got = attention_metrics_triton(query, key, scaling=1.0, attention_mask=none + 1, response_mask=none + 1)
    assert got.span_BH.isnan().all() and got.waad_BHN[0, 0].isnan().tolist() == [False] * 3 + [True, False]


@runs_kernels
def test_kernels_are_tried_once_before_auto_takes_them(monkeypatch, caplog):
    from rlattn.attention import kernels

    kinds = [
        (torch.device(DEVICE), dtype, size, softcap, sinks)
        for dtype in kernels.DTYPES for size in (16, 20) for softcap in (False, True) for sinks in (False, True)
    ]  # fmt: skip
    kernels._works.cache_clear()
    assert all(kernels._works(*kind) for kind in (kinds[1:] if DEVICE == "cuda" else kinds[15:16]))
    right, found = kernels.attention_metrics_triton, None

    def kept(*arguments, **options):
        nonlocal found
        found = right(*arguments, **options)
        return found

    kernels._works.cache_clear()
    monkeypatch.setattr(kernels, "attention_metrics_triton", kept)
    assert kernels._works(*kinds[0])

    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    def less(name):
        def wrong(*_, **__):
            return replace(found, **{name: getattr(found, name) * 0.9})

        return wrong

    faults = [(less(name), "other numbers than PyTorch") for name in ("span_BH", "waad_BHN", "fai_BHN")]
    for broken, said in [(no_compiler, "Failed to find C compiler"), *faults]:
        kernels._works.cache_clear()
        caplog.clear()
        monkeypatch.setattr(kernels, "attention_metrics_triton", broken)
        assert not kernels._works(*kinds[0]) and not kernels._works(*kinds[0])
        assert caplog.text.count(said) == 1
    kernels._works.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above ran the kernels in this process")
def test_through_the_interpreter():
    command = f"{sys.executable} -m pytest -o addopts= -p no:cacheprovider -k test_kernels_ {__file__}"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command.split(), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_cards_that_are_not_here(capability):
    """The interpreter sees neither types nor shared memory: Triton's own compiler does, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlattn.attention import kernels

    masks = dict.fromkeys(("flags", "first_key", "clear_from"), "*i32")
    pointers = {"query": "*bf16", "key": "*bf16", "in_horizon": "*i64", **masks}
    floats = ("sinks", "distance_out", "waad_out", "lse_out", "lse", "fai_out")
    tile = kernels._tile(torch.bfloat16, 128)
    constants = {**tile, "SOFTCAP": True, "SINKS": True, "PRECISION": "tf32x3", "D": 128, "TILE_D": 128}
    constants |= {"query_d": 1, "key_d": 1}
    for kernel in (kernels._rows, kernels._columns):
        signature = {**dict.fromkeys(kernel.arg_names, "i32"), "scale": "fp32", "factor": "fp32"}
        signature |= {**pointers, **dict.fromkeys(floats, "*fp32"), **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(
            kernel,
            {name: signature[name] for name in kernel.arg_names},
            {name: value for name, value in constants.items() if name in kernel.arg_names},
        )
        options = {name: value for name, value in tile.items() if name not in ("M", "C")}
        made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= {80: 99, 90: 227}[capability] * 1024


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_tensors_on_a_cpu_and_float64_are_refused():
    from rlattn.attention.kernels import attention_metrics_triton

    def measure(tensor):
        ones = torch.ones(1, 4)
        attention_metrics_triton(tensor, tensor, scaling=1.0, attention_mask=ones, response_mask=ones)

    with pytest.raises(ValueError, match="CUDA"):
        measure(torch.zeros(1, 1, 4, 8))
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="float64"):
            measure(torch.zeros(1, 1, 4, 8, dtype=torch.float64, device=DEVICE))


def test_kernels_are_chosen_by_an_option_and_refused_where_it_cannot_run():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlattn.attention import rhythm_signals
    from rlattn.types import AttentionOptions

    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model, ids = Qwen3ForCausalLM(config).to(DEVICE), torch.arange(20, device=DEVICE)[None]

    def signals(backend):
        options = AttentionOptions(backend=backend, horizon=(1, 4))
        return rhythm_signals(model, ids, torch.ones_like(ids), torch.ones_like(ids), options=options)

    if DEVICE == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match="CUDA"):
            signals("triton")
    else:
        torch.testing.assert_close(signals("triton").waad_BN, signals("torch").waad_BN, equal_nan=True)


def test_triton_is_imported_only_on_request(tmp_path):
    # torch and transformers may import triton themselves; what counts is that the kernels are not
    code = (
        "import rlattn.credit\n"
        "sys.modules['triton'] = None\nfrom rlattn.attention.capture import metrics_function\n"
        "try: metrics_function('triton')\nexcept ValueError as error: assert 'attention.backend' in str(error)\n"
        "else: raise AssertionError"
    )
    code += "\nassert 'rlattn.attention.kernels' not in sys.modules"
    result = subprocess.run([*PYTHON, "-c", "import sys\n" + code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_auto_is_the_torch_path_where_the_kernels_cannot_run():
    from rlattn.attention.capture import metrics_function
    from rlattn.types import AttentionOptions

    assert AttentionOptions().backend == "auto"
    query = torch.randn(1, 2, 9, 8, dtype=torch.float64, device=DEVICE)  # the kernels have no float64
    ones = torch.ones(1, 9, device=DEVICE)
    options = {"scaling": 0.3, "attention_mask": ones, "response_mask": ones, "horizon": (1, 4)}
    assert_equal(metrics_function("auto")(query, query, **options), attention_metrics(query, query, **options))


def test_auto_is_the_torch_path_where_triton_is_broken(monkeypatch, caplog):
    from rlattn.attention import capture

    def broken(name):
        raise AttributeError("module 'triton' has no attribute 'knobs'")

    monkeypatch.setattr(capture.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(capture.importlib, "import_module", broken)
    capture._kernels.cache_clear()
    query, ones = torch.randn(1, 2, 9, 8), torch.ones(1, 9)
    options = {"scaling": 0.3, "attention_mask": ones, "response_mask": ones, "horizon": (1, 4)}
    for _ in range(2):
        assert_equal(
            capture.metrics_function("auto")(query, query, **options), attention_metrics(query, query, **options)
        )
    assert caplog.text.count("no Triton kernels: AttributeError") == 1
    with pytest.raises(ValueError, match="triton cannot be imported"):
        capture.metrics_function("triton")
    capture._kernels.cache_clear()
