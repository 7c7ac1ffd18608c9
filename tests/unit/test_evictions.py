"""Evictions against a plain search through the pool, also where prefetches come, go unused and are cancelled."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.least_stale import LeastStale
from mobile.policies import MOBILE, Strategy
from mobile.policies.strategy import compose, resolve
from mobile.replay.replay import ReplaySetup, time_requests
from mobile.replay.trace import Request, Step
from tests.toy import CARD, EXPERTS, GEOMETRY, LAYERS, STANDS_FOR, TOP_K
from tests.unit.test_residency import two_pass_request, with_signals

requests_of_tokens = st.lists(two_pass_request(), min_size=1, max_size=3)
pool_sizes = st.integers(TOP_K, LAYERS * EXPERTS)


def ledger(strategy: Strategy, requests: list[Request], slots: int):
    """All that a replay counts, on a cold engine."""
    counters, found = time_requests(ReplaySetup(strategy, GEOMETRY, STANDS_FOR, CARD, slots), requests)
    return counters, found.counters, found.guesses


class PlainFrequent:
    """The least frequently used expert, of those the one used earliest, of those never used the lowest key."""

    def __init__(self, context):
        self.uses, self.clock = {}, 0

    def used(self, layer, keys):
        for key in keys:
            self.clock += 1
            self.uses[key] = (self.uses.get(key, (0, 0))[0] + 1, self.clock)

    def victim(self, pool, incoming, *, protected):
        evictable = pool.evictable(protected=protected)
        return min(evictable, key=lambda key: (self.uses.get(key, (0, 0)), key), default=None)


@settings(max_examples=60, deadline=None)
@given(requests_of_tokens, pool_sizes, st.integers(0, 99))
def test_the_least_frequent_goes_whatever_prefetching_has_left_behind(requests, slots, seed):
    told = with_signals(requests, seed)
    for names in ("lfu", "mobile+lfu", "next-gate+lfu", "mobile+next-gate+lfu", "pre-gated+lfu", "lfu+cpu-hybrid"):
        found = resolve(names)
        size = max(slots, TOP_K + found.guess_slots)
        assert ledger(found, told, size) == ledger(replace(found, evict=PlainFrequent), told, size), names


class OneByOne(LeastStale):
    """The same, asked for one victim at a time."""

    victims = None


@settings(max_examples=60, deadline=None)
@given(requests_of_tokens, pool_sizes, st.integers(0, 99))
def test_many_stale_victims_at_once_are_those_that_would_be_named_one_by_one(requests, slots, seed):
    told = with_signals(requests, seed)
    for names in ("least-stale", "mobile+least-stale", "least-stale+cpu-hybrid"):
        found = resolve(names)
        assert ledger(found, told, slots) == ledger(replace(found, evict=OneByOne), told, slots), names


class PlainLeastStale:
    """Stale before fresh, then the layer that is visited again the latest, then the least recently used."""

    def __init__(self, context):
        self.layers, self.now, self.last_run, self.seen = context.geometry.moe_layers, 0, LAYERS - 1, {}

    def begin(self, kind):
        self.now += kind != "big"

    def streamed(self, layer, experts, counts):
        pass

    def used(self, layer, keys):
        self.last_run = layer
        self.seen.update(dict.fromkeys(keys, self.now))

    def victim(self, pool, incoming, *, protected):
        running = next(iter(pool.pinned))[0] if pool.pinned else self.last_run

        def order(key):
            until_its_layer = (key[0] - running - 1) % self.layers
            return self.seen.get(key, 0) == self.now, -until_its_layer

        found = min(pool.evictable(protected=protected), key=order, default=None)
        if found is not None:
            self.seen[incoming] = self.now
        return found


@settings(max_examples=60, deadline=None)
@given(requests_of_tokens, pool_sizes)
def test_what_earlier_passes_left_goes_first(requests, slots):
    """On demand, where the order of use in the pool is the order of what was noted."""
    on_demand = replace(MOBILE, prefetch_on_fallback=False)
    for gating in (on_demand, resolve("static-half")):
        stale = compose([gating, resolve("least-stale")])
        assert ledger(stale, requests, slots) == ledger(replace(stale, evict=PlainLeastStale), requests, slots)


def test_a_scan_that_is_larger_than_the_cache_still_hits_where_lru_keeps_nothing():
    """Each token runs the same 12 experts with 8 slots: LRU evicts each just before its use."""
    token = Step("full", 1, ((0, 1, 2, 3),) * LAYERS)
    hits = {name: ledger(resolve(name), [[token] * 10], 8)[1].hits for name in ("lru", "lfu", "least-stale", "belady")}
    assert hits["lru"] == 0
    assert hits["least-stale"] == 9 * TOP_K, "the first layer's, in every token but the first"
    assert hits["least-stale"] < hits["belady"]
