"""Invariant 6: a trace replayed under the strategy that recorded it gives the live run's ledger."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import greedy, live_and_replayed, prompt, tiny

import mobile
from mobile.policies.strategy import BigLittle


@pytest.mark.parametrize("name", [name for name, s in mobile.strategies().items() if not s.needs_future])
def test_a_replayed_trace_gives_the_live_ledger_event_for_event(family, name, tmp_path):
    model = tiny(family)
    strategy = mobile.strategies()[name]
    if name == "mobile":
        strategy = replace(strategy, gating=BigLittle(0.25))
    top_k = model.config.num_experts_per_tok
    for slots in [24] if name == "resident" else [top_k, top_k + 3, 16]:
        live, again = live_and_replayed(model, strategy, slots, tmp_path / "t.npz")
        assert again.counters == live.counters
        assert again.events == live.events
        c = live.counters
        assert c.decode_dense_ns + c.decode_expert_ns + c.decode_stall_ns == c.decode_ns > c.decode_dense_ns > 0
        assert name != "mobile" or 0 < again.counters.fallbacks < again.counters.tokens


def test_the_ledger_exports_a_trace_that_viewers_read(tmp_path):
    model = mobile.attach(tiny("olmoe"), "lru", slots=8)
    greedy(model, prompt())
    model.mobile.ledger.export_perfetto(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(model.mobile.ledger.events) > 100
    assert {event["tid"] for event in spans} == {1, 2}
    assert all(event["dur"] > 0 for event in spans)
