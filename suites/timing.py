"""Batch-1 virtual time of a recorded run, by replaying each item's trace. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mobile.cost import CostModel
from mobile.geometry import Geometry, dress, slots_for
from mobile.hardware import HardwareProfile, parse_nbytes
from mobile.ledger import Counters, Event, Ledger
from mobile.link import VirtualLink
from mobile.policy import Visit
from mobile.pool import SlotPool
from mobile.residency import STAGING, Residency
from mobile.strategy import Strategy
from mobile.trace import Request, replay, run, visits


@dataclass(frozen=True)
class Bench:
    """What a trace is charged on: a strategy, a geometry worn by the recorded model, a card, a number of slots."""

    strategy: Strategy
    geometry: Geometry
    stands_for: tuple[tuple[int, ...], ...]
    hardware: HardwareProfile
    slots: int

    def residency(self, events: int = 0, future: tuple[Visit, ...] | None = None) -> Residency:
        """A cold engine without a model behind it; its ledger keeps the newest `events`."""
        ledger = Ledger(events)
        cost = CostModel(self.hardware, self.geometry)
        link = VirtualLink(cost.load_ns, self.geometry.expert_nbytes, ledger, lambda key, slot: made.arrived(key, slot))
        made = Residency(
            self.strategy, SlotPool(self.slots), link, cost, ledger, future=future, stands_for=self.stands_for
        )
        made.preload_all()
        return made


def bench(strategy: Strategy, own: Geometry, geometry: str, hardware: HardwareProfile, budget: str) -> Bench:
    """A bench for a budget: "smallest", or "all" where that is every expert, is what the strategy needs."""
    worn, stands_for = dress(own, geometry)
    if budget in ("all", "smallest"):
        slots = strategy.needs(worn)
    else:
        slots = slots_for(worn, parse_nbytes(budget), hardware.reserve_nbytes, STAGING)
    return Bench(strategy, worn, stands_for, hardware, slots)


def time_requests(on: Bench, requests: Sequence[Request]) -> tuple[list[Counters], Ledger]:
    """What each request takes, in order on one engine that starts cold and stays warm; and the totals."""
    residency = on.residency(future=visits(requests, on.stands_for) if on.strategy.foresight else None)
    return replay(requests, residency, on.stands_for), residency.ledger


def timeline(on: Bench, request: Request, tokens: int) -> list[Event]:
    """Every event of a few decode tokens: from the token before the first fallback, or from the second token."""
    future = visits([request], on.stands_for) if on.strategy.foresight else None
    residency = on.residency(events=100_000, future=future)
    starts = [i for i, step in enumerate(request) if step.kind in ("full", "little")]
    fallback = next((i for i, step in enumerate(request) if step.kind == "big"), None)
    first = 1 if fallback is None else max(0, sum(i < fallback for i in starts) - 2)
    wanted = starts[first : first + tokens + 1]
    end = wanted[tokens] if len(wanted) > tokens else len(request)
    for step in request[: wanted[0]]:
        run(step, residency, on.stands_for)
    begun = residency.link.now
    residency.ledger.events.clear()
    for step in request[wanted[0] : end]:
        run(step, residency, on.stands_for)
    return [e._replace(start_ns=e.start_ns - begun, end_ns=e.end_ns - begun) for e in residency.ledger.events]
