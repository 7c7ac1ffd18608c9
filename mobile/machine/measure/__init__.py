"""The measurements that `mobile.machine.fit_profile` fits a profile to: copies, kernels and decode steps.

Everything goes the engine's own way: rows over its channel, experts through its kernel, steps through an attached
model. On a GPU the rows lie in registered memory. Without one, the link is a thread that copies within host memory, so
that the same code runs anywhere; or, where a folder is given, the disk link, and rows are read from a file there. It
takes less than a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mobile.machine.fit_profile import Measurements
from mobile.machine.gpu import gpus
from mobile.machine.host import host, process_nbytes, software
from mobile.machine.measure.ahead import launch_seconds, read_seconds
from mobile.machine.measure.copies import Pace, time_beginning, time_copies
from mobile.machine.measure.disk_copies import DiskCopies, time_disk_copies
from mobile.machine.measure.kernels import matmul_tflops, time_host_experts, time_kernels
from mobile.machine.measure.sizes import Sizes, sizes_for
from mobile.machine.measure.steps import time_steps

Say = Callable[[str], None]


def measure(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    *,
    folder: Path | None = None,
    say: Say = lambda what: None,
) -> Measurements:
    """Time everything that a profile holds; `say` is called with a name for each part before it is timed.

    With a `folder` the link is the disk's, from a file of rows there, gone afterwards; `device` is then the CPU. The
    link is as it is; `relinked` times another. Raise Refused as the link does.
    """
    sizes = sizes or sizes_for(device, on_disk=folder is not None)
    about, taken, total = _machine(device)
    say("copies over the link")
    disk = time_disk_copies(folder, dtype, sizes) if folder else None
    link = _link_fields(disk) if disk else {"copies": time_copies(device, dtype, sizes)}
    if disk:  # memory is then divided among what this machine has free, and this process is in it already
        link |= {"taken_about": "what this process took before it held a model"}
        taken = process_nbytes() or 0
    say("kernels")
    matrices, experts = time_kernels(device, dtype, sizes)
    tflops = matmul_tflops(device, dtype, sizes)
    cpu_experts, cpu_tflops = experts, tflops
    if device.type != "cpu":
        say("experts on the processor")
        cpu = torch.device("cpu")
        cpu_experts, cpu_tflops = time_host_experts(dtype, sizes), matmul_tflops(cpu, dtype, sizes_for(cpu))
    host: dict[str, Any] = {}
    if device.type == "cuda":
        say("launches")
        host = {
            "host_launch_seconds": launch_seconds(device, dtype, sizes),
            "host_copy_seconds": time_beginning(device, dtype, sizes),
            "host_read_seconds": read_seconds(device, sizes),
        }
    say("decode steps")
    layer, depths = time_steps(device, dtype, sizes)
    if disk:  # nearly always a row is on its way while something is computed
        slower = max(1.0, disk.kernels_beside)
        matrices, experts, cpu_experts = (
            tuple(timing._replace(seconds=timing.seconds * slower) for timing in timings)
            for timings in (matrices, experts, cpu_experts)
        )
        depths = tuple(depth._replace(seconds=depth.seconds * slower) for depth in depths)
    return Measurements(
        device=about.partition(",")[0],
        about=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {about}, {str(dtype).removeprefix('torch.')}",
        kernels=(*matrices, *experts),
        cpu_kernels=cpu_experts,
        depths=depths,
        layer=layer,
        tflops=tflops,
        cpu_tflops=cpu_tflops,
        memory_nbytes=total,
        taken_nbytes=taken,
        **host,
        **link,
    )


def relinked(
    measured: Measurements,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    *,
    link_gb_per_s: float | None = None,
    pace: Pace | None = None,
) -> Measurements:
    """Return the measurements of the same machine with another link: copies alone, and beginning them, are timed again.

    `link_gb_per_s` throttles a CUDA link, `pace` a paced one, as they do in `attach`. Raise Refused as the link does.
    """
    sizes = sizes or sizes_for(device)
    copies = time_copies(device, dtype, sizes, link_gb_per_s=link_gb_per_s, pace=pace)
    if device.type != "cuda":
        return replace(measured, copies=copies)
    beginning = time_beginning(device, dtype, sizes, link_gb_per_s=link_gb_per_s)
    return replace(measured, copies=copies, host_copy_seconds=beginning)


def _link_fields(disk: DiskCopies) -> dict[str, Any]:
    """Return the fields of Measurements that are about the link, of a disk."""
    note = (
        f"kernels and steps: beside rows that are read, {disk.kernels_beside:.2f} times what they take alone; left out "
        f"is that rows beside kernels take {disk.rows_beside:.2f} times as long"
    )
    return {"copies": disk.timings, "link_about": disk.about, "notes": (note,)}


def _machine(device: torch.device) -> tuple[str, int, int]:
    """Return a description of the device, the bytes of its memory that others have taken, and all bytes of it."""
    versions = software()
    if device.type == "cuda":
        torch.zeros(1, device=device)  # makes the CUDA context, which counts as taken
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        driver = next((gpu.driver for gpu in gpus() if gpu.name == name), None)
        about = f"{name}, driver {driver or 'unknown'}, torch {versions.torch}, CUDA {versions.torch_cuda}"
        return about, total - free - torch.cuda.memory_reserved(device), total
    memory = host()
    total = memory.memory_total_nbytes or 2**30
    if isinstance(memory.container_limit_nbytes, int):
        total = min(total, memory.container_limit_nbytes)
    cpu = (memory.cpu or "processor").replace(",", " ")
    about = f"{cpu}, {torch.get_num_threads()} thread(s), torch {versions.torch}"
    return about, total - (memory.usable_nbytes or total), total
