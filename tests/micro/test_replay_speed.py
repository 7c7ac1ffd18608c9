"""Micro-benchmarks: `nox -s bench`. Skipped in an ordinary test run; they assert nothing about time."""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from conftest import prompt, tiny

import mobile
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import profile
from mobile.ledger import Ledger
from mobile.links.virtual import VirtualLink
from mobile.policies.strategy import strategies
from mobile.replay import trace
from mobile.replay.replay import ReplaySetup, time_requests
from mobile.replay.trace import Step
from mobile.slots import SlotPool

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


def foreseen(request: list[Step], geometry) -> list[Step]:
    """The same steps with router logits to guess from, which name about one expert in eight."""
    rng = np.random.default_rng(0)
    shape = (geometry.moe_layers - 1, geometry.experts)
    return [replace(step, ahead=rng.normal(size=shape).astype(np.float16)) for step in request]


def two_pass(request: list[Step], geometry) -> list[Step]:
    """The same tokens run by half their experts first; three in ten fall back, with one wrong guess a layer."""
    rng, steps = Random(1), []
    for step in request:
        little = tuple(tuple(sorted(rng.sample(layer, geometry.little_k))) for layer in step.experts)
        steps.append(Step("little", 1, little, confidence=(sure := rng.random())))
        if sure < 0.3:
            guessed = tuple(tuple(sorted({*layer[1:], rng.randrange(geometry.experts)})) for layer in step.experts)
            steps.append(Step("big", 1, step.experts, confidence=sure, predicted=guessed))
    return steps


@pytest.mark.parametrize(
    "strategy",
    [
        "on-demand-overlap",
        "lru",
        "lfu",
        "cpu-hybrid",
        "mobile",
        "next-gate",
        "fate",
        "adapmoe",
        "activation-trace",
        "trained-predictor",
        "belady",
        "oracle-prefetch",
    ],
)
@pytest.mark.benchmark(timer=time.process_time)
def test_replay_of_olmoe_decode_tokens(benchmark, strategy):
    """Decode tokens a second of one core: by processor time, because a busy machine says nothing about the replay."""
    geometry = GEOMETRIES["olmoe-1b-7b"]
    request = request_of(geometry, TOKENS)
    if strategies()[strategy].lookahead is not None:
        request = foreseen(request, geometry)
    elif strategy == "mobile":
        request = two_pass(request, geometry)
    alone = tuple((layer,) for layer in range(geometry.moe_layers))
    bench = ReplaySetup(strategies()[strategy], geometry, alone, profile("auto"), geometry.total_experts // 2)
    counters = benchmark(lambda: time_requests(bench, [request])[1].counters)
    assert counters.tokens == TOKENS
    benchmark.extra_info["decode_tokens_per_s"] = TOKENS / benchmark.stats.stats.median


def test_reading_a_trace_file(benchmark, tmp_path):
    geometry = GEOMETRIES["olmoe-1b-7b"]
    request = foreseen(request_of(geometry, TOKENS), geometry)
    trace.save(tmp_path / "t.npz", [request], geometry.moe_layers, {"geometry": geometry.as_record()})
    assert benchmark(lambda: trace.load(tmp_path / "t.npz")[0]) == [request]


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
