"""Invariants 3, 5 and 8 on the clock: what each strategy loads, and when it waits for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile.costs.cost_model import CostModel
from mobile.policies.big_little import MOBILE
from mobile.policies.protocols import LeastRecentlyUsed
from mobile.policies.strategy import Strategy, strategies
from mobile.replay.replay import ReplaySetup, time_requests
from mobile.replay.trace import Request, Step, replay, visits
from tests.toy import CARD, EXPERTS, GEOMETRY, IN_TURN, LAYERS, PREFILL, STANDS_FOR, TOP_K, chosen

# A host that runs ahead of its device; one that does not; one that is slower than its device; and slower than its link.
CARDS = [
    CARD,
    IN_TURN,
    replace(CARD, host_launch_seconds=30e-6, host_copy_seconds=50e-6),
    replace(CARD, host_copy_seconds=1e-3),
]


def clock(strategy, requests: list[Request], slots: int, card=CARD):
    """Counters after replaying the requests on a cold engine."""
    bench = ReplaySetup(strategy, GEOMETRY, STANDS_FOR, card, slots)
    return time_requests(bench, requests)[1].counters


layers = st.tuples(*[chosen] * LAYERS)
full_step = st.builds(Step, kind=st.just("full"), tokens=st.just(1), experts=layers)
full_requests = st.lists(
    st.lists(full_step, min_size=1, max_size=6).map(lambda s: [PREFILL, *s]), min_size=1, max_size=3
)


@st.composite
def two_pass_request(draw) -> Request:
    """Tokens with a little set inside the big one, some of them falling back on a partly wrong prediction."""
    steps = [PREFILL]
    for _ in range(draw(st.integers(1, 6))):
        big, predicted = draw(layers), draw(layers)
        little = tuple(experts[: TOP_K // 2] for experts in big)
        steps.append(Step("little", 1, little, confidence=0.5))
        if draw(st.booleans()):
            guess = tuple(draw(st.sampled_from([right, wrong])) for right, wrong in zip(big, predicted, strict=True))
            steps.append(Step("big", 1, big, confidence=0.5, predicted=guess))
    return steps


@settings(max_examples=40, deadline=None)
@given(full_requests, st.integers(TOP_K, LAYERS * EXPERTS))
def test_on_demand_loads_exactly_the_active_experts_whatever_the_pool(requests, slots):
    active = sum(len(experts) for request in requests for step in request[1:] for experts in step.experts)
    streamed = sum(len(experts) for request in requests for experts in request[0].experts)
    for name in ("on-demand", "on-demand-overlap"):
        counters = clock(strategies()[name], requests, slots)
        assert counters.demand_loads == active
        assert counters.streamed_loads == streamed
        assert counters.loads == active + streamed
        assert counters.hits == counters.prefetch_loads == 0
        assert counters.bytes_loaded == counters.loads * GEOMETRY.expert_nbytes
        assert counters.decode_bytes == active * GEOMETRY.expert_nbytes


@settings(max_examples=40, deadline=None)
@given(full_requests)
def test_on_demand_stays_below_its_ceiling_and_overlap_helps(requests):
    serial, overlap = (clock(strategies()[name], requests, TOP_K) for name in ("on-demand", "on-demand-overlap"))
    ceiling = GEOMETRY.on_demand_ceiling(CARD.link_gb_per_s)
    assert serial.decode_ns > overlap.decode_ns
    assert overlap.tokens / (overlap.decode_ns / 1e9) < ceiling


@settings(max_examples=40, deadline=None)
@given(full_requests, st.integers(TOP_K, LAYERS * EXPERTS))
def test_a_cache_never_loads_more_than_none_and_the_oracle_loads_nothing(requests, slots):
    cached, plain = (clock(strategies()[name], requests, slots) for name in ("lru", "on-demand"))
    assert cached.loads <= plain.loads
    assert cached.touches == plain.touches
    resident = clock(strategies()["resident"], requests, GEOMETRY.total_experts)
    assert resident.loads == resident.stall_ns == 0
    assert resident.decode_ns < cached.decode_ns or cached.decode_ns == resident.decode_ns


@settings(max_examples=80, deadline=None)
@given(st.lists(two_pass_request(), min_size=1, max_size=3), st.integers(TOP_K, LAYERS * EXPERTS))
def test_mobile_keeps_its_books_at_every_pool_size(requests, slots):
    counters = clock(MOBILE, requests, slots)
    tokens = [step for request in requests for step in request if step.kind == "little"]
    falls = [step for request in requests for step in request if step.kind == "big"]
    assert (counters.tokens, counters.fallbacks) == (len(tokens), len(falls))
    asked = sum(len(experts) for step in (*tokens, *falls) for experts in step.experts)
    assert counters.touches == asked
    assert counters.prefetch_useful <= counters.prefetch_loads
    assert counters.loads <= counters.demand_loads + counters.prefetch_loads + counters.streamed_loads
    assert counters.bytes_loaded == counters.loads * GEOMETRY.expert_nbytes


@settings(max_examples=30, deadline=None)
@given(st.lists(two_pass_request(), min_size=1, max_size=3))
def test_a_fallback_with_a_perfect_prediction_never_waits_longer_than_without(requests):
    def perfect(step: Step) -> Step:
        return replace(step, predicted=step.experts) if step.kind == "big" else step

    told = [[perfect(step) for step in request] for request in requests]
    slots = LAYERS * TOP_K + TOP_K
    with_it, without = (clock(replace(MOBILE, prefetch_on_fallback=on), told, slots) for on in (True, False))
    assert with_it.stall_ns <= without.stall_ns
    assert with_it.touches == without.touches


def test_a_fallback_costs_only_the_missing_half():
    """From a warm little set, a full prediction, enough slots: the big pass loads K - K/2 experts a layer."""
    big = ((0, 1, 2, 3),) * LAYERS
    little = ((0, 1),) * LAYERS
    request = [Step("little", 1, little), Step("big", 1, big, predicted=big)]
    counters = clock(MOBILE, [request], LAYERS * TOP_K + TOP_K)
    assert counters.loads == LAYERS * TOP_K
    assert counters.prefetch_loads == counters.prefetch_useful == LAYERS * TOP_K // 2
    assert counters.hits + counters.late_prefetches == LAYERS * TOP_K


def test_the_same_calls_give_the_same_events():
    requests = [[PREFILL, *[Step("full", 1, ((0, 1, 2, 3), (4, 5, 6, 7), (0, 5, 10, 11)))] * 3]]
    runs = []
    for _ in range(2):
        bench = ReplaySetup(strategies()["lru"], GEOMETRY, STANDS_FOR, CARD, 8)
        residency = bench.residency(events=10_000)
        replay(requests, residency, STANDS_FOR)
        runs.append(list(residency.ledger.events))
    assert runs[0] == runs[1]
    assert len(runs[0]) > 50


def with_signals(requests: list[Request], seed: int) -> list[Request]:
    """The same steps with made-up logits for lookaheads to read."""
    rng = np.random.default_rng(seed)
    return [
        [replace(step, ahead=rng.normal(size=(LAYERS - 1, EXPERTS)).astype(np.float16)) for step in request]
        for request in requests
    ]


def slots_of(strategy: Strategy, slots: int) -> int:
    """As many, or as many more as the strategy cannot do without."""
    return GEOMETRY.total_experts if strategy.retain == "everything" else max(slots, TOP_K + strategy.guess_slots)


class OneByOne:
    """Least recently used, asked for one victim at a time."""

    def __init__(self, setting):
        self._recent = LeastRecentlyUsed(setting)

    def used(self, layer, keys):
        self._recent.used(layer, keys)

    def victim(self, pool, coming, *, protected):
        return self._recent.victim(pool, coming, protected=protected)


@settings(max_examples=40, deadline=None)
@given(st.lists(two_pass_request(), min_size=1, max_size=3), st.integers(TOP_K, LAYERS * EXPERTS))
def test_many_victims_at_once_are_those_that_would_be_named_one_by_one(requests, slots):
    for name in ("lru", "next-gate", "mobile"):
        strategy = strategies()[name]
        size = slots_of(strategy, slots)
        assert clock(strategy, requests, size) == clock(replace(strategy, evict=OneByOne), requests, size)


@pytest.mark.parametrize("card", CARDS, ids=["ahead", "in turn", "slow host", "slow to copy"])
@settings(max_examples=25, deadline=None)
@given(st.lists(two_pass_request(), min_size=1, max_size=3), st.integers(TOP_K, LAYERS * EXPERTS), st.integers(0, 99))
def test_a_replay_that_keeps_no_events_has_the_ledger_of_one_that_does(card, requests, slots, seed):
    """Where no events are kept, a layer is charged at once, and decided no differently."""
    told = with_signals(requests, seed)
    for strategy in strategies().values():
        size = slots_of(strategy, slots)
        on = ReplaySetup(strategy, GEOMETRY, STANDS_FOR, card, size)
        future = visits(told, STANDS_FOR) if strategy.needs_future else None
        ledgers = []
        for events in (0, 10_000):
            residency = on.residency(events=events, future=future)
            taken = replay(told, residency, STANDS_FOR)
            ledgers.append((taken, residency.ledger.counters, residency.ledger.guesses))
        assert ledgers[0] == ledgers[1], strategy.name


@settings(max_examples=25, deadline=None)
@given(st.lists(two_pass_request(), min_size=1, max_size=3), st.integers(TOP_K, LAYERS * EXPERTS), st.integers(0, 99))
def test_decode_is_dense_layers_experts_and_waiting_and_nothing_else(requests, slots, seed):
    """Each part is what the cost model says of the steps, and the parts add up to the clock, to the nanosecond."""
    cost = CostModel(IN_TURN, GEOMETRY)
    steps = [step for request in requests for step in request if step.kind != "prefill"]
    falls = sum(step.kind == "big" for step in steps)
    told = with_signals(requests, seed)
    for strategy in strategies().values():
        size = slots_of(strategy, slots)
        counters = clock(strategy, told, size, IN_TURN)
        dense = len(steps) * (LAYERS * cost.dense_ns(1) + cost.head_ns(1))
        dense += falls * cost.router_replay_ns if strategy.prefetch_on_fallback else 0
        assert counters.decode_dense_ns == dense, strategy.name
        assert counters.decode_expert_ns == (counters.touches - counters.cpu_experts) * cost.expert_ns(1)
        assert counters.decode_ns == dense + counters.decode_expert_ns + counters.decode_stall_ns
        assert 0 <= counters.decode_cpu_stall_ns <= min(counters.decode_stall_ns, counters.cpu_stall_ns)
        assert counters.cpu_experts or not counters.decode_cpu_stall_ns


@settings(max_examples=25, deadline=None)
@given(st.lists(two_pass_request(), min_size=1, max_size=3), st.integers(TOP_K, LAYERS * EXPERTS))
def test_a_host_that_runs_ahead_costs_no_more_than_one_that_does_not_and_no_less_than_none(requests, slots):
    """The same launches: beside the device's work, before it, or by a host that takes no time."""
    ahead = replace(CARD, launch_seconds=0.0, host_copy_seconds=0.0, host_read_seconds=0.0)
    no_host = replace(ahead, host_launch_seconds=0.0)
    for strategy in strategies().values():
        if strategy.needs_future or strategy.lookahead is not None:
            continue  # it decides by time
        size = slots_of(strategy, slots)
        least, counters, most = (clock(strategy, requests, size, card) for card in (no_host, ahead, IN_TURN))
        assert least.decode_ns <= counters.decode_ns <= most.decode_ns, strategy.name
        parts = counters.decode_dense_ns + counters.decode_expert_ns + counters.decode_stall_ns
        assert counters.decode_ns == parts


@pytest.mark.parametrize("name", sorted(strategies()))
def test_every_strategy_says_what_it_needs(name):
    strategy = strategies()[name]
    assert TOP_K <= strategy.min_slots(GEOMETRY) <= GEOMETRY.total_experts
    assert strategy.summary
    assert strategy.source
