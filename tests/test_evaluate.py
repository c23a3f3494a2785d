"""The interval of an accuracy, and how rows are shared and counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlattn.statistics import wilson_interval


def test_wilson_on_a_published_example():
    # Agresti and Coull (1998): 0 of 20 gives (0, 0.161); 10 of 20 gives (0.299, 0.701).
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.161, abs=1e-3))
    assert wilson_interval(10, 20) == (pytest.approx(0.299, abs=1e-3), pytest.approx(0.701, abs=1e-3))


@given(st.integers(1, 1000), st.floats(0, 1))
def test_the_interval_holds_the_share_and_narrows(count, share):
    right = round(share * count)
    low, high = wilson_interval(right, count)
    assert 0 <= low <= right / count + 1e-9
    assert right / count - 1e-9 <= high <= 1
    wider_low, wider_high = wilson_interval(right, count, z=2.6)
    assert wider_low <= low
    assert high <= wider_high
