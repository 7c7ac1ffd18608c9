"""The clock's two timelines against a card that is simulated launch by launch, behind the link that drives a real one.

The simulated card is another program than the clock: it knows kernels, streams and events, and nothing of experts. The
residency and the link in front of it are those of a live run over CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from random import Random

import pytest

from mobile.costs.cost_model import DENSE_LAUNCHES, EXPERT_LAUNCHES, HEAD_LAUNCHES, CostModel
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import HardwareProfile, profile
from mobile.ledger import Ledger
from mobile.links import stream
from mobile.links.stream import StreamLink
from mobile.policies.big_little import MOBILE
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import Strategy, strategies
from mobile.replay.replay import ReplaySetup, time_requests
from mobile.replay.trace import Step
from mobile.residency.residency import Residency

CARD = profile("rtx4080-pcie4")
LAYERS, TOKENS = 6, 12


@dataclass
class SimulatedCard:
    """A host, a compute stream and a copy stream, each a time up to which it is busy, in nanoseconds. A channel."""

    card: HardwareProfile
    load_ns: int
    host: int = 0
    computing: int = 0
    copying: int = 0

    def __post_init__(self) -> None:
        self.ready: dict[int, int] = {}
        self.readers: dict[int, int] = {}

    def launch(self, kernels: int, ns: int) -> None:
        """Launch kernels that take `ns` together, each once the host has come to it and the one before is over."""
        for _ in range(kernels):
            self.host += round(self.card.host_launch_seconds * 1e9)
            self.computing = max(self.computing, self.host) + ns // kernels

    def synchronize(self) -> None:
        self.host = max(self.host, self.computing)

    def read(self) -> None:
        self.synchronize()
        self.host += round(self.card.host_read_seconds * 1e9)

    def begin(self, key, slot: int) -> None:
        self.host += round(self.card.host_copy_seconds * 1e9)
        self.copying = max(self.copying, self.host, self.readers.get(slot, 0)) + self.load_ns
        self.ready[slot] = self.copying

    def ended(self, slot: int) -> bool:
        return self.ready[slot] <= self.host

    def finish(self, slot: int) -> None:
        self.host = max(self.host, self.ready[slot])

    def fence(self, slot: int) -> None:
        self.computing = max(self.computing, self.ready[slot])

    def used(self, slots) -> None:
        self.readers.update(dict.fromkeys(slots, self.computing))

    def join(self) -> None:
        self.copying = max(self.copying, self.computing)

    def follow(self) -> None: ...

    def stalled_ns(self) -> int:
        return 0

    def span(self, slot: int) -> tuple[int, int]:
        return self.ready[slot] - self.load_ns, self.ready[slot]


def steps_of(strategy: Strategy, geometry: Geometry, seed: int) -> list[Step]:
    """Tokens whose experts repeat in part, as routing does, and of MoBiLE's every third falls back."""
    rng, steps = Random(seed), []
    favourites = [rng.sample(range(geometry.experts), 2 * geometry.top_k) for _ in range(geometry.moe_layers)]

    def chosen() -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(rng.sample(some, geometry.top_k))) for some in favourites)

    for token in range(TOKENS):
        big = chosen()
        if strategy is not MOBILE:
            steps.append(Step("full", 1, big))
            continue
        steps.append(Step("little", 1, tuple(each[: geometry.little_k] for each in big), confidence=0.5))
        if token % 3 == 0:
            steps.append(Step("big", 1, big, confidence=0.5, predicted=big))
    return steps


def simulated_ns(monkeypatch, strategy: Strategy, geometry: Geometry, slots: int, card: HardwareProfile, steps) -> int:
    """Return the nanoseconds of the steps on the simulated card, over the link that CUDA's channel has."""
    cost = CostModel(card, geometry)
    device = SimulatedCard(card, cost.load_ns)
    monkeypatch.setattr(stream.time, "perf_counter_ns", lambda: device.host)
    ledger = Ledger(0)
    link = StreamLink(device, geometry.expert_nbytes, ledger, lambda key, slot: residency.arrived(key, slot))
    residency = Residency(strategy, PolicyContext.of(cost, slots), link, cost, ledger)
    residency.preload_all()
    for step in steps:
        if step.kind == "big":
            device.launch(3 * geometry.moe_layers, cost.router_replay_ns)
            device.read()
            residency.fallback([(layer, e) for layer, experts in enumerate(step.predicted) for e in experts])
        residency.begin(step.kind, 1)
        for layer, experts in enumerate(step.experts):
            device.launch(DENSE_LAUNCHES, cost.dense_ns(1))
            device.read()  # the routing
            for wave in residency.layer(layer, experts, (1,) * len(experts)):
                for _ in wave:
                    device.launch(EXPERT_LAUNCHES, cost.expert_ns(1))
        device.launch(HEAD_LAUNCHES, cost.head_ns(1))
        device.read()  # the token
        residency.finish()
    return device.host


def clock_ns(strategy: Strategy, geometry: Geometry, slots: int, card: HardwareProfile, steps) -> int:
    alone = tuple((layer,) for layer in range(geometry.moe_layers))
    return time_requests(ReplaySetup(strategy, geometry, alone, card, slots), [steps])[1].counters.decode_ns


NAMES = ("on-demand", "on-demand-overlap", "lru", "static-half", "resident", "mobile")
CASES = [(name, family) for name, family in product(NAMES, sorted(GEOMETRIES))]


def made(name: str, family: str) -> tuple[Strategy, Geometry, int, list[Step]]:
    strategy = strategies()[name]
    geometry = replace(GEOMETRIES[family], moe_layers=LAYERS)
    slots = geometry.total_experts if strategy.retain == "everything" else LAYERS * geometry.top_k + geometry.top_k
    return strategy, geometry, slots, steps_of(strategy, geometry, seed=len(name))


@pytest.mark.parametrize("rate", [12.0, 25.0, 55.0])
@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_clock_is_what_a_card_takes_whose_host_runs_ahead(monkeypatch, name, family, rate):
    strategy, geometry, slots, steps = made(name, family)
    card = replace(CARD, link_gb_per_s=rate)
    real = simulated_ns(monkeypatch, strategy, geometry, slots, card, steps)
    assert clock_ns(strategy, geometry, slots, card, steps) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("family", sorted(GEOMETRIES))
def test_one_timeline_would_say_too_much_the_more_the_faster_the_link_is(monkeypatch, family):
    """Launches are added to the device's time, as one timeline has them: the error that the host's own takes out."""
    strategy, geometry, slots, steps = made("on-demand-overlap", family)
    errors = []
    for rate in (12.0, 25.0, 55.0):
        card = replace(CARD, link_gb_per_s=rate)
        together = card.launch_seconds + card.host_launch_seconds
        one = replace(
            card, launch_seconds=together, host_launch_seconds=0.0, host_copy_seconds=0.0, host_read_seconds=0.0
        )
        real = simulated_ns(monkeypatch, strategy, geometry, slots, card, steps)
        errors.append(clock_ns(strategy, geometry, slots, one, steps) / real - 1)
    assert 0.005 < errors[0] < errors[1] < errors[2]
    assert errors[2] > 0.03
