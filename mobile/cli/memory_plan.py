"""The division of a memory budget among a model's parts, and the bounds of each strategy under it. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mobile.costs.bounds import Ceilings, ceilings
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry, slots_for
from mobile.costs.hardware import HardwareProfile
from mobile.errors import Refused
from mobile.machine.host import memory_shortage
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


@dataclass(frozen=True)
class DiskPart:
    """The disk that experts lie on: its rate (decimal GB/s), and the file of rows that it must hold.

    `measured` are its rates by reads at once, None where the rate was given. `folder` is where the file goes on this
    machine and `free_nbytes` the room there, None on another; `is_there` says that an earlier load has made it.
    """

    gb_per_s: float
    measured: dict[int, float] | None
    file_nbytes: int
    folder: str | None
    free_nbytes: int | None
    is_there: bool


@dataclass(frozen=True)
class CheckpointPart:
    """The files of a quantised checkpoint: their bytes, and those that are still to be fetched.

    `quantised` is the method. `unkept` says why rows do not keep that, so that the experts are dequantised; None where
    they do, or where other rows were asked for.
    """

    nbytes: int
    missing_nbytes: int
    quantised: str
    unkept: str | None


@dataclass(frozen=True)
class Plan:
    """A division of a memory budget. Bytes on the device add up to at most `memory_nbytes`.

    `fits` is about the device; `runs` also about the host's memory and disk, and `because` says why not. With experts
    on a `disk` the device is the processor, and the memory is the host's. `checkpoint` is
    None unless it is quantised.
    """

    runs: bool
    because: str | None
    fits: bool
    model: str
    hardware: str
    memory_nbytes: int
    geometry: Geometry
    resident_nbytes: int
    reserve_nbytes: int
    staging_nbytes: int
    slots: int
    slots_nbytes: int
    host_needed_nbytes: int
    host_available_nbytes: int | None
    host_fits: bool | None
    strategies: tuple[Row, ...]
    ceilings: Ceilings | None
    disk: DiskPart | None = None
    projected: bool = True
    checkpoint: CheckpointPart | None = None


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
        asking_ns = max(cost.router_replay_ns, cost.host.router_replay)
        nanoseconds = cost.resident_ns(little) + asked_again * asking_ns + fallbacks * cost.resident_ns(full)
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


def plan(
    model: str,
    geometry: Geometry,
    memory_nbytes: int,
    hardware: HardwareProfile,
    host_nbytes: int | None,
    fallback_rates: Sequence[float] = (0.0, 1.0),
    disk_shortage: str | None = None,
) -> Plan:
    """Divide the budget of `memory_nbytes`. Raise Refused if it cannot hold dense weights and a token's experts."""
    slots = slots_for(geometry, memory_nbytes, hardware.reserve_nbytes, PREFILL_BUFFERS)
    cost = CostModel(hardware, geometry)
    host_needed = geometry.total_experts * geometry.expert_nbytes
    because = memory_shortage(host_needed, host_nbytes) or disk_shortage
    return divided(model, cost, memory_nbytes, slots, Host(host_needed, host_nbytes), because, fallback_rates)


@dataclass(frozen=True)
class Host:
    """The bytes of host memory that a model needs, and those that are there (None: not known)."""

    needed_nbytes: int
    available_nbytes: int | None

    @property
    def fits(self) -> bool | None:
        """Return whether they suffice, None if that is not known."""
        return None if self.available_nbytes is None else self.needed_nbytes <= self.available_nbytes


def divided(
    model: str,
    cost: CostModel,
    memory_nbytes: int,
    slots: int,
    host: Host,
    because: str | None,
    fallback_rates: Sequence[float],
    disk: DiskPart | None = None,
) -> Plan:
    """Return the plan of a budget that leaves so many slots; `because` says why the model does not run, if so."""
    geometry, hardware = cost.geometry, cost.profile
    return Plan(
        runs=because is None,
        because=because,
        fits=True,
        model=model,
        hardware=hardware.name,
        memory_nbytes=memory_nbytes,
        geometry=geometry,
        resident_nbytes=geometry.resident_nbytes,
        reserve_nbytes=hardware.reserve_nbytes,
        staging_nbytes=PREFILL_BUFFERS * geometry.expert_nbytes,
        slots=slots,
        slots_nbytes=slots * geometry.expert_nbytes,
        host_needed_nbytes=host.needed_nbytes,
        host_available_nbytes=host.available_nbytes,
        host_fits=host.fits,
        strategies=strategy_rows(cost, slots, fallback_rates, on_disk=disk is not None),
        ceilings=ceilings(cost, fallback_rates),
        disk=disk,
    )


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
            raise Refused(
                f"Strategy {strategy.name} computes experts where they lie, which a disk cannot; keep them in memory."
            )
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
                needs_nbytes=cost.profile.reserve_nbytes
                + geometry.resident_nbytes
                + (needs + PREFILL_BUFFERS) * geometry.expert_nbytes,
                budget_meets_needs=slots >= needs,
                bounds=bounds,
            )
        )
    return tuple(rows)


def _if_uniform(each: Bound, resident: float) -> Bound:
    """Return the bound with its projection: a token finds the share `resident` of its experts in slots."""
    link = each.link_tokens_per_s
    return replace(each, uniform_link_tokens_per_s=None if link is None else link / (1 - resident))
