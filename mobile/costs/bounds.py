"""Upper bounds of MoBiLE's speed: closed forms to compare a measured speed with. Arithmetic only, no torch.

`Geometry.on_demand_ceiling` gives the tokens per second that these multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mobile.costs.cost_model import CostModel
from mobile.costs.layer_time import following_ns


@dataclass(frozen=True)
class Ceilings:
    """The bounds of MoBiLE's speedup over on-demand loading without overlap, for one geometry on one profile.

    `on_demand_tokens_per_s` is the link's bandwidth over the bytes of a token's experts, `loading_share` f and
    `fallback_cost` phi are the arguments of `speedup`, `break_even` the fallback rate at which the speedup is 1, and
    `speedups` gives, by fallback rate, `loading_speedup` and `speedup`.
    """

    on_demand_tokens_per_s: float
    loading_share: float
    fallback_cost: float
    break_even: float | None
    speedups: tuple[tuple[float, float, float], ...]


def ceilings(cost: CostModel, fallback_rates: Sequence[float]) -> Ceilings | None:
    """Return the closed forms with f and phi of the cost model; None where half of the top-k is not a whole number.

    f is the time of a token's K copies and products a layer in that of its whole step. A fallback costs the routers'
    replay, the copies of the other half, and a full-K compute pass: phi is that in steps. The host launches beside the
    copies of the layer before, of which two are counted on. Raise ValueError for a rate outside of 0 to 1.
    """
    geometry, host = cost.geometry, cost.host
    layers, top_k, half = geometry.moe_layers, geometry.top_k, geometry.top_k // 2
    if top_k % 2:
        return None

    def beside_copies(ns: int, host_ns: int) -> int:
        return following_ns(ns, host_ns, 2 * cost.load_ns)

    expert = cost.load_ns + cost.expert_ns(1)
    rest = max(cost.dense_ns(1), host.dense) + (layers - 1) * beside_copies(cost.dense_ns(1), host.dense)
    rest += beside_copies(cost.head_ns(1), host.head) + (layers + 1) * host.read
    step = rest + layers * (host.copy + top_k * expert)
    resident = max(half * cost.expert_ns(1), half * host.expert + host.copy)
    again = cost.asking_ns + host.read + rest + layers * (resident + half * expert)
    share, fallback = layers * top_k * expert / step, again / step
    return Ceilings(
        on_demand_tokens_per_s=geometry.on_demand_ceiling(cost.profile.link_gb_per_s),
        loading_share=share,
        fallback_cost=fallback,
        break_even=highest_fallback_rate(1.0, share, fallback),
        speedups=tuple((rate, loading_speedup(rate), speedup(share, rate, fallback)) for rate in fallback_rates),
    )


def loading_speedup(fallback_rate: float) -> float:
    """Return the speedup over on-demand if all decode time is loading and every prefetch is right: 2 / (1 + r).

    `fallback_rate` r is the share of tokens that run again with all K experts, 0 to 1: each of them loads K experts
    a layer and the others K/2. Raise ValueError outside of that range.
    """
    return speedup(loading_share=1.0, fallback_rate=fallback_rate, fallback_cost=0.5)


def speedup(loading_share: float, fallback_rate: float, fallback_cost: float) -> float:
    """Return the speedup over on-demand: 1 / (1 - f/2 + r phi).

    `loading_share` f is the share of on-demand decode time that grows with the experts loaded, `fallback_rate` r
    the share of tokens that fall back, both 0 to 1, and `fallback_cost` phi what one fallback adds, in on-demand
    steps: 0.5 if it only loads the other half, 1 if it runs a whole step. Raise ValueError outside of these ranges.
    """
    for name, share in (("loading_share", loading_share), ("fallback_rate", fallback_rate)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share between 0 and 1, not {share}.")
    if not fallback_cost >= 0:
        raise ValueError(f"fallback_cost is a number of on-demand steps, 0 or more, not {fallback_cost}.")
    return 1 / (1 - loading_share / 2 + fallback_rate * fallback_cost)


def highest_fallback_rate(wanted: float, loading_share: float, fallback_cost: float) -> float | None:
    """Return the fallback rate at which `speedup` is `wanted` times: a run above it cannot reach it.

    None where no rate can, because the cap without any fallback, 1 / (1 - f/2), is lower. 1 at most.
    """
    left = 1 / wanted - 1 / speedup(loading_share, 0.0, fallback_cost)
    if left < 0:
        return None
    return 1.0 if fallback_cost == 0 else min(1.0, left / fallback_cost)
