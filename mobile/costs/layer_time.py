"""The time of a decode layer's experts that are loaded on demand, over an idle link. Arithmetic only, no torch."""

from __future__ import annotations

from typing import NamedTuple

from mobile.costs.cost_model import CostModel


class LayerTime(NamedTuple):
    """The nanoseconds of a piece of work, those of them that were stall, and how far the device is then behind."""

    ns: int
    stalled: int
    behind: int


def loads_in_turn(cost: CostModel, resident: int, copies: int, *, overlap: bool = True) -> LayerTime:
    """Return what one token's experts take once the host has read which they are: `resident` ones, and so many loads.

    Compute runs on the resident experts meanwhile, and then waits for each copy and runs on it. With `overlap` all are
    submitted at once, else each is when it is needed.
    """
    ns, load_ns, host_ns, begin_ns = cost.expert_ns(1), cost.load_ns, cost.host.expert, cost.host.copy
    # 1. The resident experts, beside copies that the host began before.
    host = copies * begin_ns if overlap else 0
    now = host + resident * max(ns, host_ns) if resident else 0
    ended, stalled = begin_ns, 0
    host += resident * host_ns
    # 2. One copy after another.
    for _ in range(copies):
        if not overlap:
            host += begin_ns
            ended = max(now, host)
        ended += load_ns
        if ended > now:
            stalled += ended - now
            now = ended
        now = max(now, host) + ns
        host += host_ns
        now = max(now, host)
    return LayerTime(now, stalled, now - host)


def following_ns(ns: int, host_ns: int, behind: int) -> int:
    """Return the time of work that follows, launched in `host_ns` by a host that the device is `behind`."""
    return max(ns, host_ns - behind)
