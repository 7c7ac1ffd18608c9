"""The closed forms of section 1, and that replayed runs obey them."""

from __future__ import annotations

import pytest

from mobile.ceilings import highest_fallback_rate, loading_speedup, speedup
from mobile.geometry import GEOMETRIES


def test_all_loading_and_perfect_prefetch_is_two_over_one_plus_r():
    for r in (0.0, 0.1, 0.5, 1.0):
        assert loading_speedup(r) == pytest.approx(2 / (1 + r))
    assert loading_speedup(0) == 2
    assert loading_speedup(1) == 1


@pytest.mark.parametrize(("share", "cap"), [(0.8, 1.67), (0.9, 1.82), (0.95, 1.90)])
def test_without_fallbacks_the_cap_is_set_by_the_share_that_is_loading(share, cap):
    assert speedup(share, 0, 1) == pytest.approx(cap, abs=0.005)


@pytest.mark.parametrize(
    ("share", "wanted", "budget"),
    [
        (0.9, 1.60, 0.075),
        (0.9, 1.72, 0.031),
        (0.95, 1.60, 0.1),
        (0.95, 1.72, 0.056),
        (1, 1.60, 0.125),
        (1, 1.72, 0.081),
    ],
)
def test_the_published_band_leaves_this_much_for_fallbacks(share, wanted, budget):
    assert highest_fallback_rate(wanted, share, 1.0) == pytest.approx(budget, abs=0.0006)
    assert highest_fallback_rate(wanted, share, 0.5) == pytest.approx(2 * budget, abs=0.0012)


def test_a_rate_that_is_found_gives_the_speedup_asked_for():
    rate = highest_fallback_rate(1.6, 0.9, 0.5)
    assert rate is not None
    assert speedup(0.9, rate, 0.5) == pytest.approx(1.6)
    assert highest_fallback_rate(1.72, 0.8, 0.5) is None
    assert highest_fallback_rate(1.1, 1.0, 0.0) == 1.0


@pytest.mark.parametrize("wrong", [(-0.1, 0, 1), (1.1, 0, 1), (1, 1.5, 1), (1, -1, 1), (1, 0, -0.5)])
def test_what_is_no_share_is_refused(wrong):
    with pytest.raises(ValueError, match="not"):
        speedup(*wrong)


def test_on_demand_ceilings_of_the_four_families():
    tokens = {name: round(geometry.on_demand_ceiling(25.0), 1) for name, geometry in GEOMETRIES.items()}
    assert tokens == {
        "olmoe-1b-7b": 15.5, "qwen1.5-moe-a2.7b": 15.1, "deepseek-v2-lite": 9.3, "qwen3-30b-a3b": 6.9,
    }  # fmt: skip
