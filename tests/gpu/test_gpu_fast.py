"""What a decode step asks of a real card: where it waits, what it launches, and whether the CPU computes beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import greedy
from test_cuda_link import ids, wide
from torch.profiler import ProfilerActivity, profile

import mobile
from baselines.cpu_hybrid import CPU_HYBRID
from baselines.lru import LRU
from baselines.next_gate import NEXT_GATE
from baselines.on_demand import ON_DEMAND_OVERLAP
from baselines.static_half import STATIC_HALF
from mobile import transfer
from mobile.costs.hardware import profile as hardware
from mobile.policies.big_little import MOBILE

FEW = 24  # slots, so that steps load experts
NEVER = replace(hardware("rtx4080-pcie4"), cpu_gb_per_s=1e-6)
ALWAYS = replace(hardware("rtx4080-pcie4"), cpu_gb_per_s=float("inf"), cpu_tflops=float("inf"))


def begun(model: Any) -> Any:
    """A cache after a prompt, with two decode steps behind it, so that what is made once is made."""
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
        for token in (5, 9):
            model(torch.tensor([[token]], device="cuda"), past_key_values=cache)
    torch.cuda.synchronize()
    return cache


@contextmanager
def syncs() -> Iterator[list[str]]:
    """What PyTorch says of calls that wait for the device, and one entry for each event that was waited for."""
    found: list[str] = []
    wait = transfer.wait

    def waited(reading: Any) -> None:
        found.append("transfer")
        wait(reading)

    with warnings.catch_warnings(record=True) as said, pytest.MonkeyPatch.context() as patched:
        patched.setattr(transfer, "wait", waited)
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [str(one.message) for one in said if "synchroniz" in str(one.message)]


@pytest.mark.parametrize(
    ("strategy", "passes", "between"),
    [
        (LRU, 1, 0),
        (ON_DEMAND_OVERLAP, 1, 0),
        (STATIC_HALF, 1, 0),
        (NEXT_GATE, 1, 0),
        (CPU_HYBRID, 1, 0),
        (MOBILE, 2, 2),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_decode_step_waits_once_a_layer_and_pytorch_knows_of_no_other_wait(strategy, passes, between):
    model = wide()
    token = torch.tensor([[7]], device="cuda")
    stock_cache = begun(model)
    with syncs() as of_stock, torch.no_grad():
        model(token, past_key_values=stock_cache)
    mobile.attach(model, strategy, slots=FEW, **({"gamma": 1.1} if strategy is MOBILE else {}))
    cache = begun(model)
    with syncs() as found, torch.no_grad():
        model(token, past_key_values=cache)
    layers = len(model.mobile.layers)
    assert found.count("transfer") <= layers * passes + between
    assert [each for each in found if each != "transfer"] == [], "a wait that is not counted"
    assert len(of_stock) > 5 * layers, "the stock model waits for every expert: otherwise PyTorch tells nothing"


def kernels(run: Any) -> int:
    """The kernels that a call launches, as the profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    launches = ("cudaLaunchKernel", "cuLaunchKernel")  # and what is called as these and Ex, or ExC
    return sum(event.count for event in found.key_averages() if event.key.startswith(launches))


def test_an_expert_takes_six_launches_and_a_layer_no_more_beside_them():
    """And those of a product that a library splits in two; copies of rows are none."""
    model = wide()
    token, launched = torch.tensor([[7]], device="cuda"), {}
    for strategy in (LRU, STATIC_HALF):
        mobile.attach(model, strategy, slots=128)
        cache = begun(model)
        layers, k = len(model.mobile.layers), model.mobile.layers[0].top_k

        @torch.no_grad()
        def step(cache: Any = cache) -> None:
            model(token, past_key_values=cache)

        launched[strategy.name] = kernels(step)
        mobile.detach(model)
    expert = (launched["lru"] - launched["static-half"]) / (layers * (k - k // 2))
    print(f"{launched['lru']} launches a step, {expert:.2f} an expert")
    assert 6 <= expert <= 8


@pytest.mark.parametrize("card", [hardware("rtx4080-pcie4"), ALWAYS, NEVER], ids=["some", "all", "none"])
def test_what_the_cpu_computes_is_the_stock_models_up_to_rounding(card):
    model = wide(dtype=torch.float32)
    reference = greedy(model, ids(), 8)
    mobile.attach(model, replace_placement(card), slots=FEW, poison=True)
    ours = greedy(model, ids(), 8)
    stats = model.mobile.stats()
    assert (ours[1][0] - reference[1][0]).abs().max() <= 1e-3 * reference[1][0].abs().max()
    assert (stats["cpu_experts"] > 0) is (card is not NEVER) or card not in (ALWAYS, NEVER)


def replace_placement(card: Any) -> Any:
    """The strategy with its placement weighed by a profile, whatever the link was measured to be."""
    from baselines.cpu_hybrid import EarliestEnd
    from mobile.costs.cost_model import CostModel

    return replace(CPU_HYBRID, on_cpu=lambda cost: EarliestEnd(CostModel(card, cost.geometry)))


def test_copies_and_launches_go_on_while_the_cpu_computes():
    """Half of a step's missing experts each: the CPU's thread and the link are busy at the same time."""
    from mobile.kernels import host_experts

    class Halves:
        def __init__(self, cost: Any) -> None:
            pass

        def on_cpu(self, layer: int, counts: Any) -> list[int]:
            return list(range(len(counts) // 2))

    model = wide()
    mobile.attach(model, replace(CPU_HYBRID, on_cpu=Halves), slots=FEW)
    spans, compute = [], host_experts.expert_output

    def noting(*arguments: Any) -> torch.Tensor:
        start = model.mobile.link.now
        output = compute(*arguments)
        spans.append((start, model.mobile.link.now))
        return output

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host_experts, "expert_output", noting)
        greedy(model, ids(), 16)
    torch.cuda.synchronize()
    copies = [(e.start_ns, e.end_ns) for e in model.mobile.ledger.events if e.what in ("load", "prefetch")]
    both = sum(max(0, min(end, until) - max(start, since)) for start, end in spans for since, until in copies)
    print(f"{both / 1e6:.2f} ms of {sum(b - a for a, b in spans) / 1e6:.2f} ms on the CPU beside a copy")
    assert both > 0
    assert model.mobile.stats()["cpu_experts"] > 0


def test_experts_are_placed_by_the_rate_that_the_link_was_measured_at():
    model = wide()
    mobile.attach(model, CPU_HYBRID, slots=FEW)
    link, cost = model.mobile.link, model.mobile._cost
    assert link.gb_per_s == link.channel.native_gb_per_s
    assert cost.load_ns > model.mobile.store.layout.nbytes / link.gb_per_s
    assert model.mobile.residency.cost is cost
