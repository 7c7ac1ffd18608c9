"""The plan of a model whose experts lie on a disk: host memory is divided, the processor computes. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mobile.cli.memory_plan import DiskPart, Host, Plan, divided
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry, slots_for
from mobile.costs.hardware import HardwareProfile, parse_nbytes
from mobile.errors import Refused
from mobile.machine.host import free_disk_nbytes, memory_shortage, share_of_free
from mobile.residency.residency import PREFILL_BUFFERS


@dataclass(frozen=True)
class HostBudget:
    """The host memory to divide, and how much of it is free (None: not known)."""

    nbytes: int
    free_nbytes: int | None


def host_budget(memory: str | None, host_memory: str | None, usable_nbytes: int | None) -> HostBudget:
    """Return the memory to divide: `memory`, else all of `host_memory`, else what a load takes of `usable_nbytes`.

    Raise Refused for a size that is none, and where none is given and this machine's is not known.
    """
    free = usable_nbytes if host_memory is None else parse_nbytes(host_memory)
    if memory is not None:
        return HostBudget(parse_nbytes(memory), free)
    budget = share_of_free(free) if host_memory is None else free
    if budget is None:
        raise Refused("How much memory is free here is not known; give --host-memory, like 16GiB.")
    return HostBudget(budget, free)


def on_processor(hardware: HardwareProfile, gb_per_s: float) -> HardwareProfile:
    """Return the profile with its processor as the device, and a link of that rate (decimal GB/s)."""
    return replace(hardware, link_gb_per_s=gb_per_s, memory_gb_per_s=hardware.cpu_gb_per_s, tflops=hardware.cpu_tflops)


def disk_part(
    geometry: Geometry, gb_per_s: float, rates: dict[int, float] | None, folder: Path | None, *, is_there: bool
) -> DiskPart:
    """Return the disk of a plan. `folder` is where the file of rows goes here, None on another machine.

    `rates` are as measured, by reads at once; `is_there` says that an earlier load has made the file.
    """
    return DiskPart(
        gb_per_s=gb_per_s,
        measured=rates,
        file_nbytes=geometry.total_experts * geometry.expert_nbytes,
        folder=None if folder is None else str(folder),
        free_nbytes=None if folder is None else free_disk_nbytes(folder),
        is_there=is_there,
    )


def plan_on_disk(
    model: str,
    geometry: Geometry,
    budget: HostBudget,
    hardware: HardwareProfile,
    disk: DiskPart,
    fallback_rates: Sequence[float] = (0.0, 1.0),
    weights_shortage: str | None = None,
) -> Plan:
    """Divide the host memory as `mobile.load` does with `link="disk"`; `hardware` is as `on_processor` makes it.

    `weights_shortage` says why the weights cannot be fetched. Raise Refused if the memory cannot hold dense weights,
    reserve and a token's experts.
    """
    slots = slots_for(geometry, budget.nbytes, hardware.reserve_nbytes, PREFILL_BUFFERS)
    cost = CostModel(hardware, geometry)
    needed = geometry.resident_nbytes + (slots + PREFILL_BUFFERS) * geometry.expert_nbytes
    because = memory_shortage(needed, budget.free_nbytes, "the dense weights and the slots")
    because = because or _shortage(disk) or weights_shortage
    host = Host(needed, budget.free_nbytes)
    return divided(model, cost, budget.nbytes, slots, host, because, fallback_rates, disk)


def _shortage(disk: DiskPart) -> str | None:
    """Return why the disk cannot hold the file of rows, or None if it can, or if that is not known."""
    if disk.is_there or disk.free_nbytes is None or disk.file_nbytes <= disk.free_nbytes:
        return None
    return (
        f"the experts take {disk.file_nbytes / 1e9:.1f} GB of disk and {disk.free_nbytes / 1e9:.1f} GB are free in "
        f"{disk.folder}; free some, or name another folder with --store"
    )
