"""`rlattn bench attention` prints what it measured against its targets. What the figures are is for a quiet machine."""

import pytest
from conftest import rlattn

from rlattn.bench.attention import Sizes, bench_attention

TINY = Sizes(tokens=48, layers=3, hidden=32, heads=4, key_heads=2)


def test_every_way_is_measured_and_held_against_its_target(capsys):
    found = bench_attention(TINY, rounds=2, curve=(32,))
    printed = capsys.readouterr().out
    for what, target in (
        ("time: signals / plain", "<= 0.90"),
        ("time: capture beyond plain", "<= 20 %"),
        ("time: eager / capture", ">= 8x"),
        ("memory: capture beyond plain", "<= 10 %"),
        ("memory: eager / capture", ">= 12x"),
    ):
        line = next(line for line in printed.splitlines() if what in line)
        assert target in line and ("met" in line or "missed" in line)
    assert {way: len(times) for way, times in found["seconds"].items()} == {
        "plain": 6, "capture": 6, "signals": 6, "eager": 2
    }  # fmt: skip
    assert all(found["peak_bytes"].values())
    assert found["curve"][0]["ratio"] > 0
    error = next(row for row in found["rows"] if row["what"] == "error: capture against eager")
    assert float(error["figure"]) < 1e-5


def test_maps_that_do_not_fit_are_not_made(capsys, monkeypatch):
    monkeypatch.setattr("rlattn.bench.attention._free_bytes", lambda device: 1e4)
    found = bench_attention(TINY, rounds=1)
    assert "eager" not in found["seconds"] and "not measured" in capsys.readouterr().out


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="a GPU is there")
def test_the_command_refuses_what_it_cannot_measure(tmp_path):
    refused = rlattn("bench", "attention", "--backend", "triton", cwd=tmp_path)
    assert refused.returncode == 2 and "CUDA" in refused.stderr and "Traceback" not in refused.stderr
    for file in ("no/such/folder.json", "."):
        refused = rlattn("bench", "attention", "--json", file, cwd=tmp_path)
        assert refused.returncode == 2 and "--json" in refused.stderr
