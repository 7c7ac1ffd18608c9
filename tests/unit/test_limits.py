"""Invariant 8: what no cache and no prefetcher can beat, at every pool size and on any trace."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.belady import BELADY
from baselines.lfu import LFU
from baselines.lru import LRU
from tests.unit.test_residency import EXPERTS, LAYERS, TOP_K, clock, full_requests

pools = st.integers(TOP_K, LAYERS * EXPERTS)


@settings(max_examples=300, deadline=None)
@given(full_requests, pools)
def test_belady_never_misses_more_than_a_cache_that_loads_on_demand(requests, slots):
    least = clock(BELADY, requests, slots).demand_loads
    for strategy in (LRU, LFU):
        assert least <= clock(strategy, requests, slots).demand_loads, strategy.name
