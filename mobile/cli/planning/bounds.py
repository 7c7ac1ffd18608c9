"""The bounds of each strategy under a memory budget: of link and compute, from sizes alone. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mobile.costs.cost_model import CostModel
from mobile.policies.limits import refuse_disk
from mobile.policies.strategy import BigLittle, HalfK, Strategy, strategies
from mobile.residency.residency import PREFILL_BUFFERS


@dataclass(frozen=True)
class Bound:
    """The bounds of one decode token at a fallback rate (None: the strategy has none).

    `nbytes` are the bytes over the link for one token. `link_tokens_per_s` is None if nothing is copied.
    `uniform_link_tokens_per_s` is a projection: the same for a strategy that keeps experts, if routing were uniform, so
    that a slot is as good as any other; None where nothing is kept or copied, or experts lie in memory.
    """

    fallback_rate: float | None
    nbytes: int
    link_tokens_per_s: float | None
    compute_tokens_per_s: float
    uniform_link_tokens_per_s: float | None = None


@dataclass(frozen=True)
class Row:
    """One strategy under the budget: its bounds, and the slots and device memory that it needs to work as intended."""

    strategy: str
    summary: str
    lossless: bool
    keeps: str
    needs_slots: int
    needs_nbytes: int
    budget_meets_needs: bool
    bounds: tuple[Bound, ...]


def bound(strategy: Strategy, cost: CostModel, rate: float | None) -> Bound:
    """Return the bounds of one decode token: of the link, without any cache, and of compute, without any waiting.

    With K experts a layer a token moves L K bytes(expert); a little pass L K/2 of them, and a fallback the rest.
    Experts that the CPU computes are not moved, and a fallback misses them again; the link's bound is then the lower
    one of link and CPU.
    """
    geometry = cost.geometry
    layers, full, little = geometry.moe_layers, geometry.top_k, geometry.little_k
    placement = None if strategy.on_cpu is None else strategy.on_cpu(cost)

    def part_of_cpu(missing: int) -> int:
        return 0 if placement is None else len(placement.on_cpu(0, [1] * missing))

    moved: float
    on_cpu: float
    if isinstance(strategy.gating, BigLittle):
        fallbacks = rate or 0.0
        here = part_of_cpu(little)
        again = full - little + here
        on_cpu = here + fallbacks * part_of_cpu(again)
        moved = layers * (little + fallbacks * again - on_cpu)
        asked_again = 1.0 if strategy.gating.replays_routers else fallbacks * strategy.prefetch_on_fallback
        nanoseconds = cost.resident_ns(little) + asked_again * cost.asking_ns + fallbacks * cost.resident_ns(full)
    else:
        chosen = little if isinstance(strategy.gating, HalfK) else full
        on_cpu = part_of_cpu(chosen)
        moved, nanoseconds = layers * (chosen - on_cpu), cost.resident_ns(chosen)
    nbytes = 0 if strategy.retain == "everything" else round(moved * geometry.expert_nbytes)
    link = cost.profile.link_gb_per_s * 1e9 / nbytes if nbytes else None
    if on_cpu:
        cpu = 1e9 / (layers * on_cpu * cost.cpu_expert_ns(1))
        link = cpu if link is None else min(link, cpu)
    return Bound(rate, nbytes, link, 1e9 / nanoseconds)


def strategy_rows(
    cost: CostModel,
    slots: int,
    fallback_rates: Sequence[float],
    *,
    on_disk: bool = False,
    chosen: Sequence[Strategy] = (),
) -> tuple[Row, ...]:
    """Return the `chosen` strategies, or else every installed one, with so many slots.

    `on_disk`: those that can have experts on a disk, with projections. Raise Refused if a chosen one cannot.
    """
    geometry, rows = cost.geometry, []
    for strategy in chosen or strategies().values():
        if on_disk and strategy.on_cpu is not None:
            if not chosen:
                continue
            refuse_disk(strategy)
        needs = strategy.min_slots(geometry)
        rates: Sequence[float | None] = fallback_rates if isinstance(strategy.gating, BigLittle) else (None,)
        bounds = tuple(bound(strategy, cost, rate) for rate in rates)
        if on_disk and strategy.retain == "some" and slots < geometry.total_experts:
            bounds = tuple(_if_uniform(each, slots / geometry.total_experts) for each in bounds)
        rows.append(
            Row(
                strategy=strategy.name,
                summary=strategy.summary,
                lossless=strategy.lossless,
                keeps=strategy.retain,
                needs_slots=needs,
                needs_nbytes=cost.profile.reserve_nbytes + geometry.device_nbytes(needs + PREFILL_BUFFERS),
                budget_meets_needs=slots >= needs,
                bounds=bounds,
            )
        )
    return tuple(rows)


def _if_uniform(each: Bound, resident: float) -> Bound:
    """Return the bound with its projection: a token finds the share `resident` of its experts in slots."""
    link = each.link_tokens_per_s
    return replace(each, uniform_link_tokens_per_s=None if link is None else link / (1 - resident))
