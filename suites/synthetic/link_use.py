"""The share of the link that a cell used, and the most that its schedule allows. No torch.

A fallback's use, from a token found unsure to the end of the last copy for it, is read from a ledger after the run, so
that nothing is added to a decode step: the span of each copy, which on a GPU is that of its CUDA events, and how many
had begun when each pass did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mobile.costs.cost_model import CostModel
from mobile.costs.layer_time import following_ns, loads_in_turn
from mobile.ledger import Event, Ledger, Mark
from mobile.policies.strategy import FullK, Strategy
from mobile.replay.replay import ReplaySetup
from mobile.replay.trace import run_step
from suites.synthetic.script import Script, steps_of
from suites.typed_json import Count

COPIES = ("load", "prefetch")  # events of a ledger
MOST_EVENTS = 5_000_000  # of a cell's scripts: a ledger that lost a copy says nothing


@dataclass(frozen=True)
class LinkUse:
    """Fallbacks that copied something, the nanoseconds they took until the last copy had ended, and bytes copied."""

    passes: Count
    ns: Count
    nbytes: Count


@dataclass(frozen=True)
class LinkBound:
    """The largest share of the link that the schedule of a cell allows, in decode steps and in fallbacks.

    None where nobody can say: a cache decides how much is copied, or no fallback copied anything. `layer_ns` is how
    long a layer has no copy to make.
    """

    decode: float | None
    fallback: float | None
    layer_ns: Count


def link_bound(strategy: Strategy, cost: CostModel, on_clock: LinkUse | None) -> LinkBound:
    """Return the bounds on the link's use by the cost model, whose link is the one that was there.

    1. Which experts a layer needs is known after its attention and its router, which the host reads before it begins a
       copy, so none is under way in its dense part, nor in the token's head; and the last expert to come is computed
       when no copy is left, with those before it where products take longer than copies. Without overlap every expert
       is computed while nothing is copied. The host launches a dense part beside the copies of the layer before, but a
       token's first. This is of a strategy that copies all K experts of every layer.
    2. A fallback asks all routers before its first copy, and later ones may wait for a slot: `on_clock` is how
       fallbacks of the same scripts, with as many slots, use the link of the cost model (`fallbacks_on_clock`).
    """
    geometry, host, load = cost.geometry, cost.host, cost.load_ns
    experts = loads_in_turn(cost, 0, geometry.top_k, overlap=strategy.overlap)
    dense = following_ns(cost.dense_ns(1), host.dense, experts.behind)
    layer_ns = dense + host.read + experts.ns - geometry.top_k * load
    copying = geometry.moe_layers * geometry.top_k * load
    of_token = max(cost.dense_ns(1), host.dense) - dense
    of_token += following_ns(cost.head_ns(1), host.head, experts.behind) + host.read
    decode = copying / (copying + geometry.moe_layers * layer_ns + of_token)
    copies_all = strategy.retain == "nothing" and isinstance(strategy.gating, FullK)
    fallback = None
    if on_clock is not None and on_clock.ns:
        fallback = on_clock.nbytes / geometry.expert_nbytes * load / on_clock.ns
    return LinkBound(decode if copies_all else None, fallback, layer_ns)


def fallbacks_on_clock(scripts: Sequence[Script], setup: ReplaySetup, *, cold: bool) -> LinkUse:
    """Return how fallbacks use the link where the scripts are replayed on the virtual clock.

    `cold` says whether each script begins with cold slots, or goes on with those of the one before.
    """
    uses = []
    for together in [[script] for script in scripts] if cold else [scripts]:
        residency = setup.residency(events=MOST_EVENTS)
        for script in together:
            for step in steps_of(script, setup.strategy):
                run_step(step, residency, setup.layer_map)
            residency.end_token()
        uses.append(fallback_use(residency.ledger, setup.geometry.expert_nbytes))
    return LinkUse(*(sum(getattr(use, name) for use in uses if use) for name in ("passes", "ns", "nbytes")))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of these (start, end) spans lasts, in their unit."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def copying_ns(events: Iterable[Event]) -> int:
    """Return the nanoseconds in which any copy of a ledger's events was made."""
    return round(covered((event.start_ns, event.end_ns) for event in events if event.what in COPIES))


def fallback_use(ledger: Ledger, row_nbytes: int) -> LinkUse | None:
    """Return the use of all fallbacks in the ledger; None where it no longer holds every copy."""
    copies = [event for event in ledger.events if event.what in COPIES]
    if len(copies) != ledger.counters.loads:
        return None
    taken = list(_fallbacks(list(ledger.marks), copies))
    return LinkUse(len(taken), sum(ns for ns, _ in taken), sum(count for _, count in taken) * row_nbytes)


def _fallbacks(marks: list[Mark], copies: list[Event]) -> Iterator[tuple[int, int]]:
    """Yield, for each fallback that copied, the nanoseconds to the end of its last copy, and how many it made."""
    passes = [mark for mark in marks if mark.what != "big"]  # which goes on with what its fallback began
    for mark, following in pairwise([*passes, Mark("end", 0, len(copies))]):
        began_here = copies[mark.begun : following.begun]
        if mark.what == "fallback" and began_here:
            yield max(copy.end_ns for copy in began_here) - mark.ns, len(began_here)
