"""The plan of a model: the division of a memory budget among its parts, and what follows from it. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mobile.cli.planning.advice import Expected, Recommendation
from mobile.cli.planning.bounds import Row, strategy_rows
from mobile.costs.bounds import Ceilings, ceilings
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile
from mobile.costs.memory import Division, Reserve, divide
from mobile.machine.host import memory_shortage
from mobile.residency.residency import PREFILL_BUFFERS


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
class WeightsPart:
    """The files of the weights that are still to be fetched: their bytes, and those free in the hub's cache."""

    missing_nbytes: int
    free_nbytes: int


@dataclass(frozen=True)
class Host:
    """The bytes of host memory that the parts `of` a model need, and those that are there (None: not known)."""

    needed_nbytes: int
    available_nbytes: int | None
    of: str = "the experts"

    @property
    def fits(self) -> bool | None:
        """Return whether they suffice, None if that is not known."""
        return None if self.available_nbytes is None else self.needed_nbytes <= self.available_nbytes

    @property
    def shortage(self) -> str | None:
        """Return why it does not suffice, None if it does or if that is not known."""
        return memory_shortage(self.needed_nbytes, self.available_nbytes, self.of)


@dataclass(frozen=True)
class Plan:
    """A division of a memory budget. Bytes on the device add up to at most `memory_nbytes`.

    `fits` is about the device; `runs` also about the host's memory and disk, and `because` says why not, `remedy` what
    to do about the host's memory. With experts on a `disk` the device is the processor, and the memory is the host's.
    `checkpoint` is None unless it is quantised, `weights` unless files are to be fetched. `refused` has for strategies
    that were asked for why a load refuses them. `expected` are speeds to expect and `recommendation` is drawn from
    them, None where the model does not run. `assumed` says what of the card was not measured, None where all of it was
    stated or calibrated.
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
    reserve: Reserve
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
    weights: WeightsPart | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    expected: tuple[Expected, ...] = ()
    recommendation: Recommendation | None = None
    remedy: str | None = None
    assumed: str | None = None


def division_of_slots(geometry: Geometry, slots: int, hardware: HardwareProfile) -> Division:
    """Return the division of the budget that holds so many slots, at most one for each expert."""
    slots, reserve = min(slots, geometry.total_experts), Reserve.of_profile(hardware.reserve_nbytes)
    nbytes = reserve.nbytes + geometry.device_nbytes(slots + PREFILL_BUFFERS)
    return Division.of(geometry, nbytes, reserve, PREFILL_BUFFERS, slots)


def plan(
    model: str,
    geometry: Geometry,
    memory_nbytes: int,
    hardware: HardwareProfile,
    host_nbytes: int | None,
    fallback_rates: Sequence[float] = (0.0, 1.0),
) -> Plan:
    """Divide the budget of `memory_nbytes`. Raise Refused if it cannot hold dense weights and a token's experts."""
    host = Host(geometry.experts_nbytes, host_nbytes)
    parts = divide(geometry, memory_nbytes, Reserve.of_profile(hardware.reserve_nbytes), PREFILL_BUFFERS)
    return divided(model, CostModel(hardware, geometry), parts, host, host.shortage, fallback_rates)


def divided(
    model: str,
    cost: CostModel,
    parts: Division,
    host: Host,
    because: str | None,
    fallback_rates: Sequence[float],
    disk: DiskPart | None = None,
) -> Plan:
    """Return the plan of a divided budget; `because` says why the model does not run, if so."""
    geometry, hardware = cost.geometry, cost.profile
    return Plan(
        runs=because is None,
        because=because,
        fits=True,
        model=model,
        hardware=hardware.name,
        memory_nbytes=parts.memory_nbytes,
        geometry=geometry,
        resident_nbytes=parts.dense_nbytes,
        reserve_nbytes=parts.reserve.nbytes,
        reserve=parts.reserve,
        staging_nbytes=parts.staging_nbytes,
        slots=parts.slots,
        slots_nbytes=parts.slots_nbytes,
        host_needed_nbytes=host.needed_nbytes,
        host_available_nbytes=host.available_nbytes,
        host_fits=host.fits,
        strategies=strategy_rows(cost, parts.slots, fallback_rates, on_disk=disk is not None),
        ceilings=ceilings(cost, fallback_rates),
        disk=disk,
    )
