"""Micro-benchmarks: `nox -s bench`. Skipped in an ordinary test run; they assert nothing about time."""

from __future__ import annotations

from random import Random

import pytest
import torch
from conftest import prompt, tiny

import mobile
from mobile.geometry import GEOMETRIES
from mobile.hardware import profile
from mobile.ledger import Ledger
from mobile.link import VirtualLink
from mobile.pool import SlotPool
from mobile.strategy import strategies
from mobile.trace import Step
from suites.timing import Bench, time_requests

TOKENS = 200


def request_of(geometry, tokens: int) -> list[Step]:
    """Decode steps whose experts repeat from token to token about as often as a trained model's do."""
    rng = Random(0)
    layers = [sorted(rng.sample(range(geometry.experts), geometry.top_k)) for _ in range(geometry.moe_layers)]
    steps = []
    for _ in range(tokens):
        for layer in layers:
            kept = rng.sample(layer, geometry.top_k // 4)
            fresh = [e for e in rng.sample(range(geometry.experts), geometry.top_k * 2) if e not in kept]
            layer[:] = sorted(kept + fresh[: geometry.top_k - len(kept)])
        steps.append(Step("full", 1, tuple(tuple(layer) for layer in layers)))
    return steps


@pytest.mark.parametrize("strategy", ["on-demand-overlap", "lru"])
def test_replay_of_olmoe_decode_tokens(benchmark, strategy):
    geometry = GEOMETRIES["olmoe-1b-7b"]
    request = request_of(geometry, TOKENS)
    alone = tuple((layer,) for layer in range(geometry.moe_layers))
    bench = Bench(strategies()[strategy], geometry, alone, profile("auto"), geometry.keys // 2)
    counters = benchmark(lambda: time_requests(bench, [request])[1].counters)
    assert counters.tokens == TOKENS
    benchmark.extra_info["decode_tokens_per_s"] = TOKENS / benchmark.stats.stats.median


def test_virtual_clock_events(benchmark):
    def thousand_loads() -> int:
        link = VirtualLink(100, 1, Ledger(0), lambda key, slot: None)
        for number in range(1000):
            link.submit((0, number), number, demand=number % 2 == 0)
            link.compute(90, "")
        return link.now

    assert benchmark(thousand_loads) == 90_000


def test_slot_lookup(benchmark):
    pool = SlotPool(512)
    keys = [(layer, expert) for layer in range(16) for expert in range(32)]
    for key in keys:
        pool.take_free(key)
        pool.arrived(key)
    assert benchmark(lambda: sum(key in pool.ready for key in keys)) == 512


@pytest.mark.parametrize("attached", [False, True])
def test_decode_step_of_a_tiny_model(benchmark, attached):
    model = tiny("olmoe")
    if attached:
        mobile.attach(model, "resident")
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values

        def step() -> None:
            model(torch.tensor([[5]]), past_key_values=cache)
            cache.crop(-1)

        benchmark(step)
