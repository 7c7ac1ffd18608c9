"""A plan's disk, where experts lie on one: host memory is divided, and the processor computes. Nothing is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mobile.cli.planning.memory import DiskPart
from mobile.cli.planning.sizes import Sizes
from mobile.cli.terminal import show
from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile, parse_gb_per_s, parse_nbytes
from mobile.errors import Refused
from mobile.machine.host import free_disk_nbytes, share_of_free

MEASURE = "measure"


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


def rows_shortage(disk: DiskPart) -> str | None:
    """Return why the disk cannot hold the file of rows, or None if it can, or if that is not known."""
    if disk.is_there or disk.free_nbytes is None or disk.file_nbytes <= disk.free_nbytes:
        return None
    return (
        f"the experts take {disk.file_nbytes / 1e9:.1f} GB of disk and {disk.free_nbytes / 1e9:.1f} GB are free in "
        f"{disk.folder}; free some, or name another folder with --store"
    )


# --- the disk that is asked for ------------------------------------------------------------------------


@dataclass(frozen=True)
class AskedDisk:
    """The disk of --disk: its rate (decimal GB/s), None to measure it, and the folder, None on another machine."""

    gb_per_s: float | None
    folder: Path | None

    def part(self, found: Sizes) -> DiskPart:
        """Return the disk as a plan has it; measures it if asked to. Raise Refused if that cannot be done."""
        rate, rates = self.gb_per_s, None
        if rate is None:
            from mobile.machine.disk import disk

            assert self.folder is not None
            show.waiting(f"measuring the disk under {self.folder} ...")
            measured = disk(self.folder, found.paged.expert_nbytes)
            rate, rates = measured.link_gb_per_s, measured.gb_per_s
            if rate is None:
                raise Refused(f"The disk cannot be measured: {measured.problem}")
        path = found.rows_path(self.folder) if self.folder is not None and found.rows_path is not None else None
        is_there = path is not None and path.exists()
        return disk_part(found.paged, rate, rates, self.folder, is_there=is_there)


def asked_disk(disk: str | None, store: str | None) -> AskedDisk | None:
    """Return the disk of --disk and --store; None where experts lie in memory. Raise Refused for what is none.

    A folder is looked at where the disk is measured, and where one is named; else the rate is of another machine.
    """
    if disk is None:
        if store is not None:
            raise Refused("--store is a place for experts on a disk; add --disk measure, or a rate like 3.5GB/s.")
        return None
    rate = None if disk == MEASURE else parse_gb_per_s(disk)
    if rate is not None and store is None:
        return AskedDisk(rate, None)
    show.waiting("importing PyTorch ...")
    from mobile.runtime.attach_plan import AttachOptions, folder_of

    return AskedDisk(rate, folder_of(AttachOptions(link="disk", store=store)))
