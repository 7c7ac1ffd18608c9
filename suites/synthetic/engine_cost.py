"""The engine's cost a layer, everything resident: against a bare loop over the same products, and against stock.

The bare loop is the engine's own kernel on the engine's own slots, told beforehand which experts each layer runs:
nothing is asked, looked up or waited for. No engine can do that, since a layer's experts are known only when its router
has run; so a second loop reads them, a wait for the device a layer, and what that adds is the bound on any engine.
Stock Transformers stands beside, though it says little of an engine: its eager experts wait for the device many times
a layer.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mobile.kernels import group
from mobile.links.registry import real_time_link
from mobile.live_model import compat
from mobile.machine.measure.steps import EVERYTHING
from mobile.machine.measure.timing import idle
from mobile.runtime.engine import Engine
from mobile.runtime.forward_pass import ForwardPass
from mobile.store import unpacked
from suites.synthetic.models import Synthetic

IMPLEMENTATIONS = ("eager", "grouped_mm")  # of Transformers' experts: one by one, as our kernel does, and grouped
BLOCKS = 40  # in each, everything that is compared runs twice, in one order and then in the other
WARM_UP = 5  # blocks that are not counted


@dataclass(frozen=True)
class EngineCost:
    """Seconds of a decode step of `layers` MoE layers, everything resident: medians over ABBA blocks.

    `layer_seconds` is the median over blocks of (ours - stock) / layers, between its quartiles.
    """

    stock: str
    layers: int
    blocks: int
    stock_seconds: float
    ours_seconds: float
    layer_seconds: float
    low_seconds: float
    high_seconds: float


@dataclass(frozen=True)
class BareCost:
    """Seconds of one token's routed experts in `layers` layers, everything resident: medians over ABBA blocks.

    `bare_seconds` are of the bare loop, `read_seconds` of one that reads each router's choice first, `ours_seconds` of
    the engine's `run_experts`. `layer_seconds` is the median over blocks of (ours - bare) / layers, between its
    quartiles, and `bound_seconds` that of (read - bare) / layers.
    """

    layers: int
    blocks: int
    bare_seconds: float
    read_seconds: float
    ours_seconds: float
    layer_seconds: float
    low_seconds: float
    high_seconds: float
    bound_seconds: float


def engine_cost(made: Synthetic, implementation: str, blocks: int = BLOCKS) -> EngineCost:
    """Time decode steps of the model under the engine and of a plain copy in turn, with everything on the device."""
    theirs = copy.deepcopy(made.model)
    for number, layer in enumerate(compat.moe_layers(theirs)):
        for name, view in made.store.views(number).items():
            weight = unpacked(view).to(made.device, copy=True).contiguous()
            setattr(layer.experts, name, nn.Parameter(weight, requires_grad=False))
    theirs.set_experts_implementation(implementation)
    with made.attached(EVERYTHING, slots=made.geometry.total_experts, link=real_time_link(made.device.type)):
        steps = {"stock": _Steps(theirs, made.device).run, "ours": _Steps(made.model, made.device).run}
        found = in_blocks(steps, made.device, blocks)
    low, middle, high = _a_layer(found["ours"], found["stock"], made.geometry.moe_layers)
    return EngineCost(
        stock=implementation,
        layers=made.geometry.moe_layers,
        blocks=blocks,
        stock_seconds=statistics.median(found["stock"]),
        ours_seconds=statistics.median(found["ours"]),
        layer_seconds=middle,
        low_seconds=low,
        high_seconds=high,
    )


class _Steps:
    """A decode step of a model, to be run again and again at the same place of a sequence."""

    @torch.no_grad()
    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.token = model, torch.tensor([[7]], device=device)
        self.cache = compat.cache_of(model(torch.arange(3, 19, device=device)[None], use_cache=True))
        self.going_on = compat.going_on(model, self.cache)

    @torch.no_grad()
    def run(self) -> None:
        """Run the step once; its place in the cache is free again."""
        self.model(self.token, logits_to_keep=1, **self.going_on)
        self.cache.crop(-1)


def bare_cost(made: Synthetic, blocks: int = BLOCKS) -> BareCost:
    """Time `run_experts` of the engine and the bare loops in turn, with everything on the device."""
    with made.attached(EVERYTHING, slots=made.geometry.total_experts, link=real_time_link(made.device.type)) as engine:
        routed = Routed(engine, made)
        found = in_blocks({"bare": routed.bare, "read": routed.read, "ours": routed.ours}, made.device, blocks)
    layers = made.geometry.moe_layers
    low, middle, high = _a_layer(found["ours"], found["bare"], layers)
    return BareCost(
        layers=layers,
        blocks=blocks,
        bare_seconds=statistics.median(found["bare"]),
        read_seconds=statistics.median(found["read"]),
        ours_seconds=statistics.median(found["ours"]),
        layer_seconds=middle,
        low_seconds=low,
        high_seconds=high,
        bound_seconds=_a_layer(found["read"], found["bare"], layers)[1],
    )


class Routed:
    """One token's routed experts in every layer, from one input and one choice a layer, computed in three ways.

    `bare`, `read` and `ours` return each layer's output (1, H), the same in all three.
    """

    def __init__(self, engine: Engine, made: Synthetic) -> None:
        geometry, device, dtype = made.geometry, made.device, made.layout.weight_dtype
        self.engine, self.kernel = engine, engine.plan.kernel
        self.modules = [layer.experts for layer in made.layers]
        self.views = made.layout.views(engine.slot_rows, made.layout.scratch(device))
        random = torch.Generator().manual_seed(0)
        layers, width = range(geometry.moe_layers), made.model.config.hidden_size
        self.hidden = torch.randn(1, width, generator=random).to(device, dtype)
        chosen = [torch.randperm(geometry.experts, generator=random)[None, : geometry.top_k] for _ in layers]
        self.index = [one.to(device) for one in chosen]
        weight = torch.rand(1, geometry.top_k, generator=random)
        self.weights = (weight / weight.sum()).to(device, dtype)
        self.groups = [group(one, geometry.experts) for one in self.index]
        slot = engine.residency.pool.slot
        self.waves = [
            [[(at, slot((layer, expert))) for at, expert in enumerate(self.groups[layer].experts)]] for layer in layers
        ]
        self.one_token = torch.ones(1, 1, dtype=torch.bool, device="cpu")  # where a decode step has it

    def bare(self) -> list[torch.Tensor]:
        """Compute the layers, knowing what each runs."""
        return [self._computed(layer) for layer in range(len(self.modules))]

    def read(self) -> list[torch.Tensor]:
        """Compute the layers, having read which experts each runs: one wait for the device a layer."""
        outputs = []
        for layer, index in enumerate(self.index):
            index.tolist()
            outputs.append(self._computed(layer))
        return outputs

    def _computed(self, layer: int) -> torch.Tensor:
        module, groups, waves = self.modules[layer], self.groups[layer], self.waves[layer]
        return self.kernel(module, self.hidden, self.weights, groups, waves, self.views)

    def ours(self) -> list[torch.Tensor]:
        """Compute the layers by the engine, as one decode pass."""
        return self.engine.step(self._pass)

    def _pass(self) -> list[torch.Tensor]:
        with self.engine.passing(ForwardPass("full", self.one_token)):
            return [
                self.engine.run_experts(layer, self.hidden, index, self.weights)
                for layer, index in enumerate(self.index)
            ]


@torch.no_grad()
def in_blocks(ways: Mapping[str, Callable[[], Any]], device: torch.device, blocks: int) -> dict[str, list[float]]:
    """Return by way the seconds of each block: of a run in the given order and one in the opposite order, the shorter.

    The shorter one, since what else a machine does makes few runs longer by more than the differences that are sought.
    The device is idle before and after each run.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(WARM_UP + blocks):
        taken = {name: [_seconds(ways[name], device)] for name in ways}
        for name in reversed(list(ways)):
            taken[name].append(_seconds(ways[name], device))
        if block >= WARM_UP:
            for name, seconds in taken.items():
                found[name].append(min(seconds))
    return found


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    idle(device)
    begun = time.perf_counter()
    run()
    idle(device)
    return time.perf_counter() - begun


def _a_layer(ours: Sequence[float], theirs: Sequence[float], layers: int) -> tuple[float, float, float]:
    """Return the quartiles over blocks of the difference a layer, in seconds."""
    low, middle, high = statistics.quantiles(
        [(mine - other) / layers for mine, other in zip(ours, theirs, strict=True)], n=4
    )
    return low, middle, high
