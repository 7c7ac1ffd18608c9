"""Experts computed where they lie: the same bits, the earliest end, and a third row of the timeline."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from conftest import greedy, live_and_replayed, prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import mobile
from baselines.cpu_hybrid import CPU_HYBRID, FEW_PLANS, EarliestEnd, part, part_in_order
from baselines.lru import LRU
from mobile.cli.planning.bounds import bound
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import profile
from mobile.errors import Refused
from mobile.replay import trace
from mobile.replay.replay import ReplaySetup, time_requests
from mobile.replay.trace import Request, Step
from mobile.residency.residency import HOST
from tests.toy import CARD, EXPERTS, GEOMETRY, IN_TURN, LAYERS, PREFILL, STANDS_FOR, TOP_K, chosen

NEVER = replace(CARD, cpu_gb_per_s=1e-6)
ENDLESS = replace(CARD, cpu_gb_per_s=float("inf"), cpu_tflops=float("inf"), link_latency_seconds=0.0)
ALWAYS = replace(ENDLESS, link_gb_per_s=1e-3, link_latency_seconds=CARD.link_latency_seconds)


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("card", [IN_TURN, ALWAYS, NEVER], ids=["as it is", "all on the CPU", "none on the CPU"])
def test_tokens_and_logits_equal_the_stock_model_wherever_experts_are_computed(family, card):
    model, ids = tiny(family), prompt()
    with torch.no_grad():
        prefill = model(ids).logits
    sequences, logits = greedy(model, ids)
    top_k = model.config.num_experts_per_tok
    for slots in (top_k, top_k + 1, 12, 24):
        mobile.attach(model, CPU_HYBRID, slots=slots, hardware=card, poison=True)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, prefill)
        offloaded = greedy(model, ids)
        stats = model.mobile.stats()
        mobile.detach(model)
        assert torch.equal(offloaded[0], sequences)
        assert torch.equal(offloaded[1], logits)
        assert (stats["streamed_on_cpu"] > 0) is (card is not NEVER)
        assert (stats["cpu_experts"] > 0) is (card is not NEVER)
        assert (stats["loads"] == 0) is (card is ALWAYS)


def test_a_batch_computed_in_part_on_the_cpu_equals_the_stock_model(family):
    """Unequal numbers of tokens an expert, and a step wider than the pool."""
    model, ids = tiny(family), prompt(rows=3)
    sequences, logits = greedy(model, ids)
    for slots in (4, 16):
        mobile.attach(model, CPU_HYBRID, slots=slots, poison=True)
        offloaded = greedy(model, ids)
        assert model.mobile.stats()["streamed_on_cpu"] > 0
        mobile.detach(model)
        assert torch.equal(offloaded[0], sequences)
        assert torch.equal(offloaded[1], logits)


def test_what_the_cpu_computes_is_read_from_the_host_row(monkeypatch):
    """The tests above can fail: with other rows in the host store the logits are others."""
    from mobile.store import HostStore

    model, ids = tiny("olmoe"), prompt()
    _, logits = greedy(model, ids)
    views = HostStore.views
    monkeypatch.setattr(
        HostStore, "views", lambda store, layer: {name: -view for name, view in views(store, layer).items()}
    )
    mobile.attach(model, CPU_HYBRID, slots=8, hardware=ALWAYS)
    assert not torch.equal(greedy(model, ids)[1], logits)


def test_the_paced_link_gives_the_same_tokens():
    model, ids = tiny("mixtral"), prompt()
    sequences, logits = greedy(model, ids)
    mobile.attach(model, CPU_HYBRID, slots=4, link="paced", poison=True)
    offloaded = greedy(model, ids)
    stats = model.mobile.stats()
    assert stats["cpu_experts"] > 0
    assert stats["decode_seconds"] > 0
    unknown = ("decode_dense_seconds", "decode_expert_seconds", "decode_cpu_stall_seconds")
    assert [stats[name] for name in unknown] == [None] * 3, "a real link does not time kernels"
    assert torch.equal(offloaded[0], sequences)
    assert torch.equal(offloaded[1], logits)


def test_other_kernels_refuse_to_compute_on_the_cpu():
    model = tiny("olmoe")
    with pytest.raises(Refused, match="only the kernel loop can"):
        mobile.attach(model, CPU_HYBRID, slots=8, kernel="grouped")
    assert not hasattr(model, "mobile")


# --- the earliest end -----------------------------------------------------------------------------


def end(cpu, device, chosen) -> int:
    chosen = set(chosen)
    return max(
        sum(ns for i, ns in enumerate(cpu) if i in chosen), sum(ns for i, ns in enumerate(device) if i not in chosen)
    )


def brute_force(cpu, device) -> int:
    every = range(len(cpu))
    return min(end(cpu, device, chosen) for n in range(len(cpu) + 1) for chosen in combinations(every, n))


costs = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(costs)
def test_the_parting_ends_as_early_as_any(pairs):
    cpu, device = zip(*pairs, strict=True)
    assert end(cpu, device, part(cpu, device)) == brute_force(cpu, device)
    assert brute_force(cpu, device) <= end(cpu, device, part_in_order(cpu, device))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_both_partings_are_exact_where_all_experts_cost_the_same(cpu_ns, device_ns, missing):
    cpu, device = [cpu_ns] * missing, [device_ns] * missing
    best = brute_force(cpu, device)
    assert end(cpu, device, part(cpu, device)) == end(cpu, device, part_in_order(cpu, device)) == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=9), st.sampled_from(sorted(GEOMETRIES)))
def test_real_costs_are_parted_best_and_in_order_hardly_worse(counts, name):
    cost = CostModel(CARD, GEOMETRIES[name])
    cpu = [cost.cpu_expert_ns(count) for count in counts]
    device = [cost.load_ns + cost.expert_ns(count) for count in counts]
    best = brute_force(cpu, device)
    assert end(cpu, device, EarliestEnd(cost).on_cpu(0, counts)) == best
    assert end(cpu, device, part_in_order(cpu, device)) <= best + max(
        min(a, b) for a, b in zip(cpu, device, strict=True)
    )


def test_a_set_with_too_many_plans_is_parted_in_order():
    cost = CostModel(CARD, GEOMETRIES["olmoe-1b-7b"])
    counts = list(range(1, 65))
    assert 2 ** len(counts) > FEW_PLANS
    cpu = [cost.cpu_expert_ns(count) for count in counts]
    device = [cost.load_ns + cost.expert_ns(count) for count in counts]
    assert EarliestEnd(cost).on_cpu(0, counts) == part_in_order(cpu, device)


# --- on the clock ---------------------------------------------------------------------------------

step = st.builds(Step, kind=st.just("full"), tokens=st.just(1), experts=st.tuples(*[chosen] * LAYERS))
requests_of = st.lists(
    st.lists(step, min_size=1, max_size=6).map(lambda steps: [PREFILL, *steps]), min_size=1, max_size=3
)


def clock(strategy, requests: list[Request], slots: int, card=CARD, events: int = 0):
    bench = ReplaySetup(strategy, GEOMETRY, STANDS_FOR, card, slots)
    if not events:
        return time_requests(bench, requests)[1]
    residency = bench.residency(events=events)
    trace.replay(requests, residency, STANDS_FOR)
    return residency.ledger


@settings(max_examples=40, deadline=None)
@given(requests_of, st.integers(TOP_K, LAYERS * EXPERTS))
def test_without_a_cpu_it_is_lru_and_with_an_endless_one_never_slower(requests, slots):
    lru = clock(LRU, requests, slots).counters
    assert clock(CPU_HYBRID, requests, slots, NEVER).counters == lru
    endless = clock(CPU_HYBRID, requests, slots, ENDLESS).counters
    assert endless.loads == 0
    assert endless.decode_ns <= lru.decode_ns
    assert endless.prefill_ns <= lru.prefill_ns


@settings(max_examples=40, deadline=None)
@given(requests_of, st.integers(TOP_K, LAYERS * EXPERTS))
def test_its_books_balance(requests, slots):
    ledger = clock(CPU_HYBRID, requests, slots, events=100_000)
    counters = ledger.counters
    assert counters.touches == clock(LRU, requests, slots).counters.touches
    assert counters.loads == counters.demand_loads + counters.streamed_loads
    assert counters.bytes_loaded == counters.loads * GEOMETRY.expert_nbytes
    spans = [event for event in ledger.events if event.what == "cpu"]
    assert len(spans) == counters.cpu_experts + counters.streamed_on_cpu
    assert all(a.end_ns <= b.start_ns for a, b in pairwise(spans)), "one CPU"
    heads = [event.start_ns for event in ledger.events if event.about == "head"]
    assert max(event.end_ns for event in spans) <= heads[-1], "the head waits for it"


@settings(max_examples=40, deadline=None)
@given(st.lists(step, min_size=1, max_size=4))
def test_one_token_on_cold_slots_is_never_slower_than_loading_all(steps):
    requests = [[one] for one in steps[:1]]
    assert clock(CPU_HYBRID, requests, TOP_K).counters.decode_ns <= clock(LRU, requests, TOP_K).counters.decode_ns


def test_the_cpu_and_the_link_share_a_layer():
    """Four missing, 264 us each on the CPU, 448 us each loaded: three there end before two here would."""
    ledger = clock(CPU_HYBRID, [[Step("full", 1, ((0, 1, 2, 3),) * LAYERS)]], TOP_K, IN_TURN, events=1000)
    cost = CostModel(IN_TURN, GEOMETRY)
    assert (cost.cpu_expert_ns(1), cost.load_ns, cost.expert_ns(1)) == (263_902, 410_000, 37_951)
    assert ledger.counters.cpu_experts == 3 * LAYERS
    assert ledger.counters.loads == LAYERS
    assert ledger.counters.decode_ns == LAYERS * (cost.dense_ns(1) + 3 * cost.cpu_expert_ns(1)) + cost.head_ns(1)


def test_compute_waits_for_a_slow_cpu_and_the_wait_is_a_stall():
    ledger = clock(CPU_HYBRID, [[Step("full", 1, ((5,),) * LAYERS)]], TOP_K, events=1000)
    waited = LAYERS * CostModel(CARD, GEOMETRY).cpu_expert_ns(1)
    assert ledger.counters.stall_ns == ledger.counters.decode_cpu_stall_ns == waited
    assert ledger.stats()["decode_cpu_stall_seconds"] == waited / 1e9
    assert ledger.stats()["decode_expert_seconds"] == 0
    assert [event.name for event in ledger.events if event.what == "stall"] == [f"stall {n}.5" for n in range(LAYERS)]


def test_a_plan_bounds_it_by_the_slower_of_link_and_cpu():
    """OLMoE on the paper's probable card: 5 of 8 experts a layer on the CPU, which is the slower."""
    cost = CostModel(CARD, GEOMETRIES["olmoe-1b-7b"])
    found, plain = bound(CPU_HYBRID, cost, None), bound(LRU, cost, None)
    assert found.nbytes == plain.nbytes * 3 // 8
    assert found.link_tokens_per_s == pytest.approx(1e9 / (16 * 5 * cost.cpu_expert_ns(1)))
    assert found.compute_tokens_per_s == plain.compute_tokens_per_s
    assert plain.link_tokens_per_s < found.link_tokens_per_s < plain.link_tokens_per_s * 8 / 3


# --- traces and viewers ---------------------------------------------------------------------------


@pytest.mark.parametrize("card", [CARD, ALWAYS], ids=["as it is", "all on the CPU"])
def test_a_replayed_trace_gives_the_live_ledger_event_for_event(family, card, tmp_path):
    model = tiny(family)
    top_k = model.config.num_experts_per_tok
    for slots in (top_k, top_k + 3, 16):
        live, again = live_and_replayed(model, CPU_HYBRID, slots, tmp_path / "t.npz", hardware=card)
        assert again.counters == live.counters
        assert again.events == live.events
        assert again.counters.cpu_experts > 0


def test_viewers_see_a_row_for_the_cpu(tmp_path):
    model = mobile.attach(tiny("olmoe"), CPU_HYBRID, slots=8, hardware=ALWAYS)
    greedy(model, prompt())
    model.mobile.ledger.export_perfetto(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["name"].startswith("cpu ")} == {3}
    assert any(event["ph"] == "M" and event["args"]["name"] == "CPU" for event in events)


def test_no_slot_is_called_host():
    assert HOST < 0


@settings(max_examples=40, deadline=None)
@given(requests_of, st.integers(TOP_K, LAYERS * EXPERTS))
def test_memory_that_the_link_shares_leaves_the_cpu_less_to_win(requests, slots):
    """41 GB/s as if it were alone, and the 16 that a link at 25 leaves of them."""
    alone, shared = profile("rtx4080-pcie4"), profile("rtx4080-pcie4-shared-memory")
    assert shared.cpu_gb_per_s == alone.cpu_gb_per_s - alone.link_gb_per_s
    lru, fast, slow = (
        clock(strategy, requests, slots, card).counters
        for strategy, card in ((LRU, shared), (CPU_HYBRID, alone), (CPU_HYBRID, shared))
    )
    assert lru == clock(LRU, requests, slots, alone).counters
    assert fast.prefill_ns <= slow.prefill_ns <= lru.prefill_ns
    assert slow.cpu_experts + slow.streamed_on_cpu <= fast.cpu_experts + fast.streamed_on_cpu
