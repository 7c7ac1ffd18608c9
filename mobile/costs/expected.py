"""Decode speeds to expect: time per token from the share of experts that are not in slots, as measured in routing.

The shares come from traces of the small models that this project trains and ships (`hit_curves.json`, which
`python -m suites hit-curves` writes). On another model they are a projection. Arithmetic only, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from pathlib import Path

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.costs.layer_time import following_ns, loads_in_turn

FILE = Path(__file__).with_name("hit_curves.json")
Split = Callable[[int], int]  # how many of so many missing experts the processor computes


@dataclass(frozen=True)
class Curve:
    """What one strategy missed on the routing of one model and task, by the room there was.

    `missed` has, for each kind of pass ("full", or "little" and "big"), at each of the `rooms` the share of the pass's
    experts that were not in slots; of a big pass, those that were copied. `fallback_rate` is None without little
    passes. `experts` and `top_k` are the router's.
    """

    strategy: str
    experts: int
    top_k: int
    task: str
    fallback_rate: float | None
    rooms: Sequence[float]
    missed: Mapping[str, Sequence[float]]

    def share(self, kind: str, room: float) -> float:
        """Return the share of a pass's experts that is missed, between two measured rooms on a straight line.

        Without any room all are missed.
        """
        rooms, shares = (0.0, *self.rooms), (1.0, *self.missed[kind])
        above = next((at for at, each in enumerate(rooms) if each >= room), len(rooms) - 1)
        if above == 0 or room >= rooms[above]:
            return shares[above]
        part = (room - rooms[above - 1]) / (rooms[above] - rooms[above - 1])
        return shares[above - 1] + part * (shares[above] - shares[above - 1])


@dataclass(frozen=True)
class Speed:
    """Decode tokens a second to expect of a strategy: over all curves' tokens together, and the band of single curves.

    `fallback_rate` is the mean that was measured, or the one asked for; None where no token falls back.
    """

    strategy: str
    tokens_per_s: float
    low: float
    high: float
    fallback_rate: float | None


def room(geometry: Geometry, slots: int) -> float:
    """Return the room of so many slots, on a scale that means the same for every router.

    0 to 1 is the part of one token's experts that have a slot, 1 to 2 the part of all others.
    """
    one_token = geometry.moe_layers * geometry.top_k
    if slots <= one_token:
        return slots / one_token
    return 1 + (slots - one_token) / (geometry.total_experts - one_token)


def slots_of(geometry: Geometry, at: float) -> int:
    """Return the number of slots that are the room `at`: the inverse of `room`, and one layer's experts at least."""
    one_token = geometry.moe_layers * geometry.top_k
    slots = at * one_token if at <= 1 else one_token + (at - 1) * (geometry.total_experts - one_token)
    return max(geometry.top_k, round(slots))


@cache
def curves() -> tuple[Curve, ...]:
    """Return all measured curves."""
    data = json.loads(FILE.read_text("utf-8"))
    return tuple(Curve(rooms=data["rooms"], **each) for each in data["curves"])


def curves_for(geometry: Geometry, strategy: str) -> tuple[Curve, ...]:
    """Return a strategy's curves of routers of the same experts and top-k, or of all where there is none like it."""
    mine = [curve for curve in curves() if curve.strategy == strategy]
    alike = [curve for curve in mine if (curve.experts, curve.top_k) == (geometry.experts, geometry.top_k)]
    return tuple(alike or mine)


def has_own_curves(geometry: Geometry) -> bool:
    """Return whether routing was measured under a router of as many experts and the same top-k."""
    return any((curve.experts, curve.top_k) == (geometry.experts, geometry.top_k) for curve in curves())


def expect(
    cost: CostModel,
    strategy: str,
    slots: int,
    split: Split | None = None,
    fallback_rate: float | None = None,
    among: Sequence[Curve] | None = None,
) -> Speed | None:
    """Return the speed to expect of a strategy with so many slots; None where its routing was not measured.

    `split` says how many of a layer's missing experts the processor computes. `fallback_rate` replaces the measured
    one. `among` are other curves than those of `curves_for`.
    """
    chosen = curves_for(cost.geometry, strategy) if among is None else among
    if not chosen:
        return None
    at, rates, times = room(cost.geometry, slots), [], []
    for curve in chosen:
        missed = {kind: curve.share(kind, at) for kind in curve.missed}
        rate = curve.fallback_rate if fallback_rate is None else fallback_rate
        rates.append(curve.fallback_rate if curve.fallback_rate is None else rate)
        times.append(token_ns(cost, missed, rate or 0.0, split))
    known = [rate for rate in rates if rate is not None]
    return Speed(
        strategy,
        tokens_per_s=1e9 * len(times) / sum(times),
        low=1e9 / max(times),
        high=1e9 / min(times),
        fallback_rate=sum(known) / len(known) if known else None,
    )


def token_ns(cost: CostModel, missed: Mapping[str, float], fallback_rate: float, split: Split | None = None) -> float:
    """Return the nanoseconds of one decode token, in which each pass misses a share of its experts.

    A layer's experts miss independently of one another. Of those that miss, the processor computes `split`, and the
    others are copied in turn (`loads_in_turn`). The copies of a big pass are asked for at its start, so that a whole
    pass takes as long as its copies or its products, whichever ends last.
    """
    geometry, host, layers = cost.geometry, cost.host, cost.geometry.moe_layers
    dense_ns, head_ns = cost.dense_ns(1), cost.head_ns(1)

    def layer(experts: int, missing: int) -> tuple[int, int]:
        on_cpu = split(missing) if split is not None and missing else 0
        taken = loads_in_turn(cost, experts - missing, missing - on_cpu)
        of_cpu = on_cpu * cost.cpu_expert_ns(1) if on_cpu else 0
        return (of_cpu, 0) if of_cpu > taken.ns else (taken.ns, taken.behind)  # the host waits for its processor

    def pass_ns(experts: int, share: float) -> float:
        routed = following = last = 0.0
        for missing in range(experts + 1):
            chance = comb(experts, missing) * share**missing * (1 - share) ** (experts - missing)
            ns, behind = layer(experts, missing)
            routed += chance * ns
            following += chance * following_ns(dense_ns, host.dense, behind)
            last += chance * following_ns(head_ns, host.head, behind)
        first = max(dense_ns, host.dense)
        return first + layers * routed + (layers - 1) * following + last + (layers + 1) * host.read

    if "full" in missed:
        return pass_ns(geometry.top_k, missed["full"])
    resident_ns = cost.resident_ns(geometry.top_k)
    copies_ns = layers * geometry.top_k * missed["big"] * cost.load_ns
    big_ns = cost.asking_ns + host.read + max(resident_ns, copies_ns + (resident_ns - head_ns) / layers + head_ns)
    return pass_ns(geometry.little_k, missed["little"]) + fallback_rate * big_ns
