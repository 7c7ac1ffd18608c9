"""What no run of the method can pass: closed forms to hold a measured speed against. Arithmetic only, no torch.

`Geometry.on_demand_ceiling` gives the tokens per second that these multiply.
"""

from __future__ import annotations


def loading_speedup(fallback_rate: float) -> float:
    """Times faster than on-demand if all decode time is loading and every prefetch is perfect: 2 / (1 + r).

    `fallback_rate` r is the share of tokens that run again with all K experts, 0 to 1: each of them loads K experts
    a layer and the others K/2. Raises ValueError outside of that range.
    """
    return speedup(loading_share=1.0, fallback_rate=fallback_rate, fallback_cost=0.5)


def speedup(loading_share: float, fallback_rate: float, fallback_cost: float) -> float:
    """Times faster than on-demand: 1 / (1 - f/2 + r phi).

    `loading_share` f is the share of on-demand decode time that grows with the experts loaded, `fallback_rate` r
    the share of tokens that fall back, both 0 to 1, and `fallback_cost` phi what one fallback adds, in on-demand
    steps: 0.5 if it only loads the other half, 1 if it runs a whole step. Raises ValueError outside of these ranges.
    """
    for name, share in (("loading_share", loading_share), ("fallback_rate", fallback_rate)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share between 0 and 1, not {share}.")
    if not fallback_cost >= 0:
        raise ValueError(f"fallback_cost is a number of on-demand steps, 0 or more, not {fallback_cost}.")
    return 1 / (1 - loading_share / 2 + fallback_rate * fallback_cost)


def highest_fallback_rate(wanted: float, loading_share: float, fallback_cost: float) -> float | None:
    """The fallback rate at which `speedup` is `wanted` times: a run above it cannot reach it.

    None where no rate can, because the cap without any fallback, 1 / (1 - f/2), is lower. 1 at most.
    """
    left = 1 / wanted - 1 / speedup(loading_share, 0.0, fallback_cost)
    if left < 0:
        return None
    return 1.0 if fallback_cost == 0 else min(1.0, left / fallback_cost)
