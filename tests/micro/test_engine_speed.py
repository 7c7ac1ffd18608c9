"""The engine's cost in a decode step at a real layer's shapes, with everything resident. `nox -s bench`."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import mobile
from mobile.runtime.forward_pass import ForwardPass
from suites.synthetic import engine_cost, models

LAYERS = 2


@pytest.fixture(scope="module")
def model():
    """Two layers of OLMoE-1B-7B: hidden 2,048, 64 experts of width 1,024, top 8, in bf16, 1.7 GB."""
    torch.manual_seed(0)
    config = OlmoeConfig(num_hidden_layers=LAYERS, vocab_size=1024, num_experts=64, num_experts_per_tok=8)
    assert (config.hidden_size, config.intermediate_size) == (2048, 2048)
    config.intermediate_size = 1024
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def step_of(model):
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> None:
        model(torch.tensor([[7]]), past_key_values=cache)
        cache.crop(-1)

    return step


@pytest.mark.parametrize("strategy", ["resident", "lru"])
@pytest.mark.parametrize("stock", ["eager", "grouped_mm"])
def test_decode_step_over_the_stock_model(benchmark, model, stock, strategy):
    """Steps of the stock model and of ours in turn, so that a busy machine slows both; all experts fit."""
    ours = mobile.attach(copy.deepcopy(model), strategy, slots=64 * LAYERS)
    model.set_experts_implementation(stock)
    steps = {"stock": step_of(model), "ours": step_of(ours)}
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}

    def both() -> None:
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)

    benchmark.pedantic(both, rounds=60, iterations=1, warmup_rounds=5)
    pairs = sorted(ours / theirs for ours, theirs in zip(seconds["ours"][5:], seconds["stock"][5:], strict=True))
    benchmark.extra_info["over_stock"] = round(pairs[len(pairs) // 2], 3)
    benchmark.extra_info["quartiles"] = [round(pairs[len(pairs) // 4], 3), round(pairs[3 * len(pairs) // 4], 3)]


def test_router_probe_of_a_layer(benchmark, model):
    """Asking a router again on a recorded input: what a fallback's prediction costs a layer."""
    mobile.attach(model, "mobile", slots=64 * LAYERS, gamma=0.0)
    try:
        engine, running = model.mobile, ForwardPass("little", torch.ones(1, 1, dtype=torch.bool))
        with torch.no_grad(), engine.passing(running):
            model.mobile.layers[0].router(torch.randn(1, 2048, dtype=torch.bfloat16))
        args, kwargs = running.router_inputs[0]
        with torch.no_grad():
            benchmark(lambda: engine.layers[0].route(args, kwargs))
    finally:
        mobile.detach(model)


@pytest.mark.parametrize("shrink", [16, 8])
def test_run_experts_over_a_bare_loop(benchmark, shrink):
    """The engine's own time a layer beside the same kernel told what runs, and of it the bound, one read a layer.

    Widths are divided, since products of the real ones take so long on a CPU that the difference drowns in them.
    """
    made = models.make("olmoe-1b-7b", layers=LAYERS, shrink=shrink, device="cpu")
    everything = {"slots": made.geometry.total_experts, "link": "paced"}
    with torch.no_grad(), made.attached(engine_cost.EVERYTHING, **everything) as engine:
        routed = engine_cost.Routed(engine, made)
        benchmark.pedantic(routed.ours, rounds=60, iterations=1, warmup_rounds=5)
    cost = engine_cost.bare_cost(made, blocks=60)
    told = {
        "engine": cost.layer_seconds,
        "low": cost.low_seconds,
        "high": cost.high_seconds,
        "bound": cost.bound_seconds,
    }
    benchmark.extra_info["us_a_layer"] = {name: round(seconds * 1e6, 1) for name, seconds in told.items()}
