"""Batch-1 virtual time of a recorded run, by replaying each item's trace. No torch."""

from __future__ import annotations

import re

from mobile.costs.geometry import Geometry, project, slots_for
from mobile.costs.hardware import HardwareProfile, parse_nbytes
from mobile.costs.memory import NEAR_MEMORY
from mobile.errors import OutOfReach, Refused
from mobile.ledger import Event
from mobile.policies.strategy import Strategy
from mobile.replay.replay import ReplaySetup
from mobile.replay.trace import Request, run_step, visits
from mobile.residency.residency import PREFILL_BUFFERS

GIB = 2**30


def is_memory(budget: str) -> bool:
    """Return whether a budget is a memory size, and not a number of slots by another name."""
    return budget not in ("all", "smallest") and not budget.endswith("%")


def percent_of(budget: str) -> float:
    """Return 25.0 of "25%". Raise Refused for what is no share of all experts."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", budget, re.ASCII)
    if match is None or not 0 < float(match[1]) <= 100:
        raise Refused(f"Cannot read the share {budget!r} of all experts; write it like 25%.")
    return float(match[1])


def holds(nbytes: int, total_nbytes: int) -> bool:
    """Return whether `nbytes` can be asked of a card that shows `total_nbytes`, which may be a little less."""
    return total_nbytes >= (1 - NEAR_MEMORY) * nbytes


def memory_on(budget: str, total_nbytes: int) -> int:
    """Return the bytes of a memory budget on a card that shows `total_nbytes`: all of them, where the budget is more.

    Raise OutOfReach for a card that shows too little (`NEAR_MEMORY`).
    """
    nbytes = parse_nbytes(budget)
    if not holds(nbytes, total_nbytes):
        raise OutOfReach(
            f"A budget of {budget} is more than the {total_nbytes / GIB:.2f} GiB of this GPU; give a smaller budget, "
            "or use a larger card."
        )
    return min(nbytes, total_nbytes)


def replay_setup(
    strategy: Strategy,
    native: Geometry,
    geometry: str | None,
    hardware: HardwareProfile,
    budget: str,
    *,
    rows: str = "as-is",
) -> ReplaySetup:
    """Return the setup that replays a strategy under a budget. Raise Refused for one that is too small.

    "smallest", or "all" where that is every expert, is what the strategy needs; "25%" is a quarter of all experts;
    anything else is a memory size. Times are those of the `native` sizes, or of `geometry` where one is named, with
    experts in the row format `rows`.
    """
    charged, layer_map = project(native, geometry, rows)
    if is_memory(budget):
        slots = slots_for(charged, parse_nbytes(budget), hardware.reserve_nbytes, PREFILL_BUFFERS)
    elif budget.endswith("%"):
        slots = max(charged.top_k, round(charged.total_experts * percent_of(budget) / 100))
    else:
        slots = strategy.min_slots(charged)
    return ReplaySetup(strategy, charged, layer_map, hardware, slots)


def timeline(setup: ReplaySetup, request: Request, tokens: int) -> list[Event]:
    """Return every event of a few decode tokens: from the token before the first fallback, or from the second token."""
    future = visits([request], setup.layer_map) if setup.strategy.needs_future else None
    residency = setup.residency(events=100_000, future=future)
    starts = [i for i, step in enumerate(request) if step.kind in ("full", "little")]
    fallback = next((i for i, step in enumerate(request) if step.kind == "big"), None)
    first = 1 if fallback is None else max(0, sum(i < fallback for i in starts) - 2)
    wanted = starts[first : first + tokens + 1]
    end = wanted[tokens] if len(wanted) > tokens else len(request)
    for step in request[: wanted[0]]:
        run_step(step, residency, setup.layer_map)
    begun = residency.link.now
    residency.ledger.events.clear()
    for step in request[wanted[0] : end]:
        run_step(step, residency, setup.layer_map)
    return [e._replace(start_ns=e.start_ns - begun, end_ns=e.end_ns - begun) for e in residency.ledger.events]
