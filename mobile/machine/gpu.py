"""The GPUs of this machine, and the rates of the link to them. An unknown value is None, never 0."""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MIB = 2**20
SM_CLOCK = 1  # nvmlClockType_t


@dataclass(frozen=True)
class LinkState:
    """A PCIe link's generation and width (lanes)."""

    generation: int | None
    width: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it; `link_max` is the best that card and machine together allow."""

    name: str
    uuid: str | None
    driver: str | None
    memory_total_nbytes: int | None
    memory_free_nbytes: int | None
    compute_capability: str | None
    link_now: LinkState
    link_max: LinkState
    sm_clock_mhz: int | None


@dataclass(frozen=True)
class LinkRates:
    """Measured rates of host-to-device copies, in decimal GB/s, and the link's state while page-locked copies ran.

    `registers` says whether the driver page-locked a block of ordinary memory in place, as the host store needs.
    """

    pinned_gb_per_s: float | None
    pageable_gb_per_s: float | None
    under_load: LinkState
    registers: bool


UNKNOWN_LINK = LinkState(None, None)


@contextmanager
def nvml() -> Iterator[Any]:
    """Yield pynvml, initialised, or None if there is no package, no driver or no permission."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def ask(lib: Any, question: str, *about: Any) -> Any:
    """Return NVML's answer, or None: no library, no such function in this version, or not supported by this card."""
    if lib is None or not hasattr(lib, f"nvml{question}"):
        return None
    try:
        answer = getattr(lib, f"nvml{question}")(*about)
    except lib.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def gpus() -> list[Gpu]:
    """Return every NVIDIA GPU that the driver shows, or those that torch knows where NVML is absent."""
    return gpus_of_driver() or _gpus_of_torch()


def gpus_of_driver() -> list[Gpu]:
    """Return every NVIDIA GPU that NVML shows. Imports no torch."""
    with nvml() as lib:
        count = ask(lib, "DeviceGetCount") or 0
        handles = [ask(lib, "DeviceGetHandleByIndex", index) for index in range(count)]
        return [_gpu(lib, handle) for handle in handles if handle is not None]


def _gpu(lib: Any, handle: Any) -> Gpu:
    memory = ask(lib, "DeviceGetMemoryInfo", handle)
    capability = ask(lib, "DeviceGetCudaComputeCapability", handle)
    return Gpu(
        name=ask(lib, "DeviceGetName", handle) or "unnamed GPU",
        uuid=ask(lib, "DeviceGetUUID", handle),
        driver=ask(lib, "SystemGetDriverVersion"),
        memory_total_nbytes=None if memory is None else int(memory.total),
        memory_free_nbytes=None if memory is None else int(memory.free),
        compute_capability=None if capability is None else ".".join(map(str, capability)),
        link_now=_link(lib, handle),
        link_max=LinkState(
            ask(lib, "DeviceGetMaxPcieLinkGeneration", handle), ask(lib, "DeviceGetMaxPcieLinkWidth", handle)
        ),
        sm_clock_mhz=ask(lib, "DeviceGetClockInfo", handle, SM_CLOCK),
    )


def _link(lib: Any, handle: Any) -> LinkState:
    return LinkState(
        ask(lib, "DeviceGetCurrPcieLinkGeneration", handle), ask(lib, "DeviceGetCurrPcieLinkWidth", handle)
    )


def _gpus_of_torch() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            Gpu(
                name=properties.name,
                uuid=_uuid(properties),
                driver=None,
                memory_total_nbytes=int(properties.total_memory),
                memory_free_nbytes=int(torch.cuda.mem_get_info(index)[0]),
                compute_capability=f"{properties.major}.{properties.minor}",
                link_now=UNKNOWN_LINK,
                link_max=UNKNOWN_LINK,
                sm_clock_mhz=None,
            )
        )
    return devices


def _uuid(properties: Any) -> str | None:
    uuid = getattr(properties, "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def cuda_uuid(index: int | None = None) -> str | None:
    """Return the driver's UUID of torch's CUDA device `index` (None: the current one); None without CUDA.

    An index would not do: driver and torch count differently under CUDA_VISIBLE_DEVICES.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    return _uuid(torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index))


def link_rates(index: int | None = None, nbytes: int = 256 * MIB, copies: int = 20) -> LinkRates | None:
    """Time copies of `nbytes` to torch's CUDA device `index` (None: the current one), page-locked and pageable.

    The link is read between queueing the page-locked copies and waiting for them, since an idle card reports a
    slower link than it has. None without CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if index is None else index
    with torch.cuda.device(index):
        target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        pageable = torch.ones(nbytes, dtype=torch.uint8)
        under_load = UNKNOWN_LINK
        try:
            pinned = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            pinned_rate = None
        else:
            with nvml() as lib:
                handle = ask(lib, "DeviceGetHandleByUUID", cuda_uuid(index))
                target.copy_(pinned)
                torch.cuda.synchronize()
                begun = time.perf_counter()
                for _ in range(copies):
                    target.copy_(pinned, non_blocking=True)
                if handle is not None:
                    under_load = _link(lib, handle)
                torch.cuda.synchronize()
                pinned_rate = copies * nbytes / (time.perf_counter() - begun) / 1e9
        target.copy_(pageable)
        torch.cuda.synchronize()
        pageable_seconds = statistics.median(timeit.repeat(lambda: target.copy_(pageable), number=1, repeat=3))
        registers = _registers(pageable, target.device)
    return LinkRates(pinned_rate, nbytes / pageable_seconds / 1e9, under_load, registers)


def _registers(block: Any, device: Any) -> bool:
    """Return whether the driver page-locks this memory in place."""
    from mobile.links.page_lock import register, unregister

    if register(block, device) is not None:
        return False
    unregister(block.data_ptr(), device)
    return True
