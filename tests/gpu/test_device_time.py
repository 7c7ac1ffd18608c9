"""Time on a real card: where copies lie hours after attach, seconds up to the last work, rates that were asked for."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from test_cuda_link import CUDA, ids, lone_channel, wide

import mobile
from baselines.lru import LRU
from baselines.on_demand import ON_DEMAND_OVERLAP
from mobile.links import device_clock
from mobile.links.cuda import NEAR
from mobile.policies.big_little import MOBILE


def test_copies_are_in_order_and_inside_the_time_the_host_saw(monkeypatch):
    """With a new anchor every few milliseconds, as a long run has many."""
    monkeypatch.setattr(device_clock, "ANCHOR_NS", 3_000_000)
    store, channel = lone_channel()
    begun, spans = time.perf_counter_ns(), []
    for number in range(300):
        slot = number % 4
        channel.begin((0, number % 8), slot)
        channel.finish(slot)
        spans.append(channel.span(slot))
    ended = time.perf_counter_ns()
    channel.close()
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert begun - 50_000 <= spans[0][0]
    assert spans[-1][1] <= ended + 50_000
    took = sorted(end - start for start, end in spans)
    assert took[0] > 0
    assert took[len(took) // 2] < 3 * store.layout.nbytes / channel.native_gb_per_s


def test_time_before_an_event_is_negative_and_not_an_error():
    """An anchor may be newer than the copy that is asked about."""
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    torch.cuda._sleep(1_000_000)
    second.record()
    second.synchronize()
    assert second.elapsed_time(first) == pytest.approx(-first.elapsed_time(second), rel=0.01)


@pytest.mark.parametrize(("strategy", "gamma"), [(LRU, None), (MOBILE, 0.02)])
def test_decode_seconds_are_those_of_the_clock_on_the_wall(strategy, gamma):
    model = mobile.attach(wide(), strategy, slots=40, gamma=gamma)
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
        for _ in range(4):  # kernels are compiled, memory is touched
            model(ids()[:, :1], past_key_values=cache, use_cache=True)
        torch.cuda.synchronize(CUDA)
        before, begun = model.mobile.stats()["decode_seconds"], time.perf_counter()
        for _ in range(40):
            model(ids()[:, :1], past_key_values=cache, use_cache=True)
        torch.cuda.synchronize(CUDA)
        wall = time.perf_counter() - begun
    counted = model.mobile.stats()["decode_seconds"] - before
    assert counted == pytest.approx(wall, rel=0.1)


def test_a_pause_between_tokens_is_not_counted():
    model = mobile.attach(wide(), LRU, slots=40)
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
        for _ in range(10):
            model(ids()[:, :1], past_key_values=cache, use_cache=True)
            time.sleep(0.1)
    assert model.mobile.stats()["decode_seconds"] < 0.5


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_each_copy_of_a_throttled_link_takes_as_long_as_asked(share):
    """By the device's clock, on which no pause of the host counts."""
    model = mobile.attach(wide(), ON_DEMAND_OVERLAP, slots=8)
    native = model.mobile.link.channel.native_gb_per_s
    mobile.detach(model)
    mobile.attach(model, ON_DEMAND_OVERLAP, slots=8, link_gb_per_s=share * native)
    channel, link, engine = model.mobile.link.channel, model.mobile.link, model.mobile
    assert channel.throttled_gb_per_s == pytest.approx(share * native, rel=NEAR)
    for number in range(64):
        link.submit((number % 4, number % 32), number % 8, demand=True)
    for number in range(64):
        link.wait((number % 4, number % 32))
    torch.cuda.synchronize(CUDA)
    link.compute(0, "mark")
    took = sorted(event.end_ns - event.start_ns for event in engine.ledger.events if event.what == "load")
    assert engine.store.layout.nbytes / took[len(took) // 2] == pytest.approx(share * native, rel=2 * NEAR)
