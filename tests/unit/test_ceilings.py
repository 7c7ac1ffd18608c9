"""The closed forms of section 1, and that replayed runs obey them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mobile.cli.planning.memory import plan
from mobile.costs.bounds import ceilings, highest_fallback_rate, loading_speedup, speedup
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import GIB, profile
from mobile.policies.strategy import strategies
from mobile.replay.replay import ReplaySetup, time_requests
from mobile.replay.trace import Step


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
        "olmoe-1b-7b": 15.5,
        "qwen1.5-moe-a2.7b": 15.1,
        "deepseek-v2-lite": 9.3,
        "qwen3-30b-a3b": 6.9,
    }


# --- of a geometry on a profile ---------------------------------------------------------------------

CARD = profile("auto")
FAMILIES = sorted(GEOMETRIES)


def decode_ns(name: str, geometry, steps: list[Step], slots: int) -> int:
    alone = tuple((layer,) for layer in range(geometry.moe_layers))
    return time_requests(ReplaySetup(strategies()[name], geometry, alone, CARD, slots), [steps])[1].counters.decode_ns


@pytest.mark.parametrize("name", FAMILIES)
def test_the_share_that_is_loading_is_that_of_a_replayed_on_demand_step(name):
    """Half the experts take (1 - f/2) of the time: f is measured on the clock, not taken from the formula."""
    geometry = GEOMETRIES[name]
    full, half = (
        decode_ns("on-demand", geometry, [Step("full", 1, (tuple(range(k)),) * geometry.moe_layers)], geometry.top_k)
        for k in (geometry.top_k, geometry.little_k)
    )
    found = ceilings(CostModel(CARD, geometry), (0.0,))
    assert found is not None
    assert half / full == pytest.approx(1 - found.loading_share / 2, abs=1e-9)
    assert found.speedups[0][2] == pytest.approx(full / half)
    assert found.on_demand_tokens_per_s > 1e9 / full


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fallback_costs_its_other_half_and_a_full_compute_pass(name):
    """Replayed with a prediction that comes too late to hide anything: loads in turn with compute."""
    geometry = GEOMETRIES[name]
    big = (tuple(range(geometry.top_k)),) * geometry.moe_layers
    little = (tuple(range(geometry.little_k)),) * geometry.moe_layers
    slots = geometry.moe_layers * geometry.top_k
    steps = [Step("little", 1, little, confidence=0.1), Step("big", 1, big, confidence=0.1, predicted=big)]
    alone = tuple((layer,) for layer in range(geometry.moe_layers))
    serial = replace(strategies()["mobile"], overlap=False, prefetch_on_fallback=False)
    timed = time_requests(ReplaySetup(serial, geometry, alone, CARD, slots), [steps])[1].counters.decode_ns
    cost = CostModel(CARD, geometry)
    step = decode_ns("on-demand", geometry, [Step("full", 1, big)], geometry.top_k)
    found = ceilings(cost, (1.0,))
    assert found is not None
    asking = max(cost.router_replay_ns, cost.host.router_replay) + cost.host.read
    assert (timed + asking) / step == pytest.approx(1 - found.loading_share / 2 + found.fallback_cost)
    assert found.speedups[0][1] == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_shows_them(name):
    made = plan(name, GEOMETRIES[name], 16 * GIB, CARD, None, (0.0, 0.25, 1.0))
    found = made.ceilings
    assert found is not None
    assert found.on_demand_tokens_per_s == GEOMETRIES[name].on_demand_ceiling(CARD.link_gb_per_s)
    for rate, loading, whole in found.speedups:
        assert loading == pytest.approx(2 / (1 + rate))
        assert whole < loading
    assert found.break_even is not None
    assert speedup(found.loading_share, found.break_even, found.fallback_cost) == pytest.approx(1)


def test_an_odd_top_k_has_no_half_and_no_ceiling():
    assert ceilings(CostModel(CARD, replace(GEOMETRIES["olmoe-1b-7b"], top_k=5)), (0.0,)) is None
