"""The rhythm statistics, by hand, against planted rhythms, and against the training run's own diagnostics."""

import math

import pytest
import torch

from rlattn.credit.diagnostics import diagnose
from rlattn.inspection.rhythm_stats import rhythm_statistics, shuffled_peaks
from rlattn.types import Signals

nan = math.nan


def signals(waad, fai, entropy, mask=None):
    waad = torch.tensor(waad)
    mask = torch.ones(waad.shape, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    return Signals(waad_BN=waad, fai_BN=torch.tensor(fai), entropy_BN=torch.tensor(entropy), mask_BN=mask)


def test_by_hand():
    # Ten tokens, so two peaks each: WAAD at 2 and 6, FAI at 3 (right after) and 5 (neither), receivers at 3 and 1.
    waad = [[1.0, 1, 9, 1, 1, 1, 8, 1, 1, 1]]
    fai = [[0.1, 0.1, 0.1, 0.9, 0.1, 0.8, 0.1, 0.1, nan, nan]]
    receiver = torch.tensor([[0.1, 0.7, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, nan, nan]])
    entropy = [[0.0, 0, 6, 0, 0, 0, 2, 1, 1, 0]]  # 1 on average, 4 at the WAAD peaks
    found = rhythm_statistics(signals(waad, fai, entropy), receiver, shuffles=4000)
    assert found["entropy_at_waad_peaks"].value == pytest.approx(4)
    assert found["entropy_at_waad_peaks"].chance == pytest.approx(1, abs=0.1)
    assert found["receiver_at_global_peaks"].value == 0.5
    assert found["receiver_at_global_peaks"].chance == pytest.approx(2 / 8, abs=0.02)  # 8 tokens have a FAI
    assert found["fai_at_or_after_waad_peaks"].value == 0.5
    assert found["fai_at_or_after_waad_peaks"].chance == pytest.approx(4 / 8, abs=0.02)  # at 2, 3, 6 and 7
    assert all(statistic.peaks == 2 for statistic in found.values())
    # two of eight without replacement, each a hit with probability 1/2: a variance of 1/4 / 2 * 6/7
    assert found["fai_at_or_after_waad_peaks"].chance_std == pytest.approx(math.sqrt(0.125 * 6 / 7), rel=0.05)


def planted(lag, rows=20, length=200):
    """FAI peaks `lag` tokens after WAAD peaks, a fifth of all tokens each, entropy doubled at WAAD peaks."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, rows, length, generator=generator)
    peaks = torch.zeros(rows, length, dtype=torch.bool)
    peaks[:, ::5] = True
    shifted = peaks.roll(lag, dims=1)
    waad, fai = noise[0] + 2 * peaks, noise[1] + 2 * shifted
    fai[:, -10:] = nan
    return Signals(waad_BN=waad, fai_BN=fai, entropy_BN=1.0 + peaks, mask_BN=torch.ones_like(peaks)), fai


@pytest.mark.parametrize(("lag", "expected"), [(0, 1.0), (1, 1.0), (2, 0.0)])
def test_a_planted_rhythm_is_found_and_another_is_not(lag, expected):
    planted_signals, fai = planted(lag)
    found = rhythm_statistics(planted_signals, fai)
    # FAI's 40 peaks are a fifth of 200 tokens; 38 planted ones are defined, so 2 of 40 fall where noise is highest
    coupling = found["fai_at_or_after_waad_peaks"]
    assert coupling.value == pytest.approx(expected, abs=0.06)
    assert coupling.chance == pytest.approx(0.4, abs=0.02)  # two of every five tokens are at or after a peak
    assert found["entropy_at_waad_peaks"].value == pytest.approx(2 / 1.2)
    assert found["receiver_at_global_peaks"].value == 1


def test_without_rhythm_every_statistic_lies_at_chance():
    generator = torch.Generator().manual_seed(1)
    waad, fai, receiver, entropy = torch.rand(4, 50, 100, generator=generator)
    mask = torch.ones(50, 100, dtype=torch.bool)
    unrelated = Signals(waad_BN=waad, fai_BN=fai, entropy_BN=entropy, mask_BN=mask)
    for statistic in rhythm_statistics(unrelated, receiver).values():
        assert abs(statistic.value - statistic.chance) < 4 * statistic.chance_std


def test_clustered_values_raise_the_chance_they_are_held_against():
    # All WAAD peaks in one run of 20: only 21 of 100 tokens are at or after one, not the 36 of scattered peaks.
    waad = torch.arange(100.0)[None].roll(-30)
    fai = torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 100, dtype=torch.bool)
    clustered = Signals(waad_BN=waad, fai_BN=fai, entropy_BN=fai, mask_BN=mask)
    assert rhythm_statistics(clustered, fai)["fai_at_or_after_waad_peaks"].chance == pytest.approx(0.21, abs=0.02)


def test_values_are_those_of_the_training_diagnostics():
    generator = torch.Generator().manual_seed(2)
    waad, fai, entropy = torch.rand(3, 6, 40, generator=generator)
    mask = torch.arange(40) < torch.tensor([40, 40, 31, 12, 3, 1])[:, None]
    padded = Signals(waad_BN=waad.masked_fill(~mask, nan), fai_BN=fai, entropy_BN=entropy, mask_BN=mask)
    logged = diagnose(torch.ones(6, 40), padded)
    found = rhythm_statistics(padded, fai)
    assert found["entropy_at_waad_peaks"].value == pytest.approx(logged["credit/waad_entropy_coupling"].item())
    assert found["fai_at_or_after_waad_peaks"].value == pytest.approx(logged["credit/fai_waad_coupling"].item())


def test_shuffles_keep_each_rows_number_of_peaks_and_where_they_may_be():
    generator = torch.Generator().manual_seed(3)
    movable = torch.rand(5, 30, generator=generator) < 0.6
    peaks = movable & (torch.rand(5, 30, generator=generator) < 0.3)
    peaks[4] = False
    moved = shuffled_peaks(peaks, movable, torch.rand(5, 30, generator=generator))
    assert torch.equal(moved.sum(dim=1), peaks.sum(dim=1))
    assert not (moved & ~movable).any()


def test_the_same_seed_gives_the_same_chance_and_leaves_the_callers_generator_alone():
    planted_signals, fai = planted(1)
    state = torch.get_rng_state()
    first, second, other = (rhythm_statistics(planted_signals, fai, seed=seed) for seed in (5, 5, 6))
    assert first == second
    assert first["fai_at_or_after_waad_peaks"].chance != other["fai_at_or_after_waad_peaks"].chance
    assert torch.equal(torch.get_rng_state(), state)


def test_a_response_without_fai_leaves_its_statistics_undefined():
    short = signals([[1.0, 2, 3]], [[nan, nan, nan]], [[0.5, 0.5, 0.5]])
    found = rhythm_statistics(short, torch.full((1, 3), nan))
    assert math.isnan(found["fai_at_or_after_waad_peaks"].value)
    assert found["fai_at_or_after_waad_peaks"].peaks == 0
    assert found["entropy_at_waad_peaks"].value == 1
