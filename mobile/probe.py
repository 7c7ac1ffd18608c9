"""What this machine is: host memory and limits, GPUs, the link under load. Unknown is None, never 0."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

MIB = 2**20
Limit = int | Literal["unlimited"] | None
NO_LIMIT = 2**60  # cgroup v1 writes "no limit" as the largest page-aligned int64
ROOT = Path("/")


@dataclass(frozen=True)
class Software:
    """Versions of what the engine runs on; `problem` says why this Transformers is not supported."""

    python: str
    torch: str | None
    torch_cuda: str | None
    transformers: str | None
    triton: str | None
    pynvml: str | None
    problem: str | None


@dataclass(frozen=True)
class Host:
    """This process's share of the machine. Bytes; a cgroup's usage is without the page cache it can give back."""

    cpu: str | None
    cpus_allowed: int | None
    memory_total_nbytes: int | None
    memory_available_nbytes: int | None
    container_limit_nbytes: Limit
    container_used_nbytes: int | None
    swap_total_nbytes: int | None
    swap_free_nbytes: int | None
    memlock_nbytes: Limit

    @property
    def usable_nbytes(self) -> int | None:
        """What can still be allocated here: the machine's available memory, or the container's where that is less."""
        rooms = [self.memory_available_nbytes]
        if isinstance(self.container_limit_nbytes, int):
            rooms.append(self.container_limit_nbytes - (self.container_used_nbytes or 0))
        known = [room for room in rooms if room is not None]
        return min(known) if known else None


@dataclass(frozen=True)
class LinkState:
    """A PCIe link's generation and width (lanes)."""

    generation: int | None
    width: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it; `link_max` is what card and machine can do together."""

    name: str
    uuid: str | None
    driver: str | None
    memory_total_nbytes: int | None
    memory_free_nbytes: int | None
    compute_capability: str | None
    link_now: LinkState
    link_max: LinkState


@dataclass(frozen=True)
class LinkRates:
    """Host-to-device copies, measured, in decimal GB/s; the link's state was read while page-locked copies ran.

    `registers` says whether the driver page-locked a block of ordinary memory where it lay, as the host store needs.
    """

    pinned_gb_per_s: float | None
    pageable_gb_per_s: float | None
    under_load: LinkState
    registers: bool


UNKNOWN_LINK = LinkState(None, None)


def package(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def software() -> Software:
    """Versions here. Imports torch and Transformers."""
    import torch

    from mobile import compat
    from mobile.refusal import Refused

    problem = None
    try:
        compat.check_version()
    except Refused as refused:
        problem = str(refused)
    return Software(
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        transformers=package("transformers"),
        triton=package("triton"),
        pynvml=package("nvidia-ml-py"),
        problem=problem,
    )


# --- host -------------------------------------------------------------------------------------------


def host(root: Path = ROOT) -> Host:
    """Memory, limits and CPUs of this process, read from `root`'s /proc and /sys. No torch."""
    meminfo = _meminfo(root)
    limit, used = container_memory(root)
    return Host(
        cpu=_cpu(root),
        cpus_allowed=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_total_nbytes=meminfo.get("MemTotal"),
        memory_available_nbytes=meminfo.get("MemAvailable"),
        container_limit_nbytes=limit,
        container_used_nbytes=used,
        swap_total_nbytes=meminfo.get("SwapTotal"),
        swap_free_nbytes=meminfo.get("SwapFree"),
        memlock_nbytes=_memlock(),
    )


def _memlock() -> Limit:
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else soft


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _meminfo(root: Path) -> dict[str, int]:
    lines = (_read(root / "proc/meminfo") or "").splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _cpu(root: Path) -> str | None:
    lines = (_read(root / "proc/cpuinfo") or "").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def container_memory(root: Path = ROOT) -> tuple[Limit, int | None]:
    """The tightest cgroup memory limit above this process (v2 or v1) and the use counted against it."""
    found: list[tuple[int, int | None]] = []
    known = False
    for folder, limit_file, usage_file, cache_line in _memory_cgroups(root):
        text = _read(folder / limit_file)
        if text is None:
            continue
        known = True
        word = text.strip()
        if word != "max" and int(word) < NO_LIMIT:
            usage, statistic = _read(folder / usage_file), _read(folder / "memory.stat") or ""
            given_back = dict(line.split() for line in statistic.splitlines()).get(cache_line, "0")
            found.append((int(word), None if usage is None else max(0, int(usage) - int(given_back))))
    if found:
        return min(found, key=lambda pair: pair[0])
    return ("unlimited" if known else None), None


def _memory_cgroups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """This process's memory cgroups from the innermost outwards, with the names of their files."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / inside.strip("/")
        for one in (folder, *folder.parents):
            yield (one, *files)
            if one == top:
                break


def memcpy_gb_per_s(nbytes: int = 256 * MIB, repeats: int = 5) -> float | None:
    """Bytes copied per second within host memory, the median of some copies with torch's threads; None if it fails."""
    import torch

    try:
        source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    except RuntimeError:
        return None
    return statistics.median(nbytes / _seconds(lambda: target.copy_(source)) for _ in range(repeats)) / 1e9


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# --- GPUs -------------------------------------------------------------------------------------------


@contextmanager
def nvml() -> Iterator[Any]:
    """pynvml, started; None where there is no package, no driver or no permission."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _ask(lib: Any, question: str, *about: Any) -> Any:
    """What NVML answers, or None: no library, no such function in this version, or nothing to say for this card."""
    try:
        answer = getattr(lib, f"nvml{question}")(*about)
    except Exception:  # AttributeError, or NVMLError, which is defined in the package that may be absent
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def gpus() -> list[Gpu]:
    """Every NVIDIA GPU the driver shows, or what torch alone knows of them where NVML is absent."""
    with nvml() as lib:
        count = _ask(lib, "DeviceGetCount")
        if count:
            handles = (_ask(lib, "DeviceGetHandleByIndex", index) for index in range(count))
            return [_gpu(lib, handle) for handle in handles if handle is not None]
    return _gpus_of_torch()


def _gpu(lib: Any, handle: Any) -> Gpu:
    memory = _ask(lib, "DeviceGetMemoryInfo", handle)
    capability = _ask(lib, "DeviceGetCudaComputeCapability", handle)
    return Gpu(
        name=_ask(lib, "DeviceGetName", handle) or "unnamed GPU",
        uuid=_ask(lib, "DeviceGetUUID", handle),
        driver=_ask(lib, "SystemGetDriverVersion"),
        memory_total_nbytes=None if memory is None else int(memory.total),
        memory_free_nbytes=None if memory is None else int(memory.free),
        compute_capability=None if capability is None else ".".join(map(str, capability)),
        link_now=_link(lib, handle),
        link_max=LinkState(
            _ask(lib, "DeviceGetMaxPcieLinkGeneration", handle), _ask(lib, "DeviceGetMaxPcieLinkWidth", handle)
        ),
    )


def _link(lib: Any, handle: Any) -> LinkState:
    return LinkState(
        _ask(lib, "DeviceGetCurrPcieLinkGeneration", handle), _ask(lib, "DeviceGetCurrPcieLinkWidth", handle)
    )


def _gpus_of_torch() -> list[Gpu]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        found.append(
            Gpu(
                name=known.name, uuid=_uuid(known), driver=None, memory_total_nbytes=int(known.total_memory),
                memory_free_nbytes=int(torch.cuda.mem_get_info(index)[0]),
                compute_capability=f"{known.major}.{known.minor}", link_now=UNKNOWN_LINK, link_max=UNKNOWN_LINK,
            )
        )  # fmt: skip
    return found


def _uuid(properties: Any) -> str | None:
    uuid = getattr(properties, "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def cuda_uuid(index: int = 0) -> str | None:
    """The driver's name for torch's CUDA device: the two count differently under CUDA_VISIBLE_DEVICES."""
    import torch

    return _uuid(torch.cuda.get_device_properties(index)) if torch.cuda.is_available() else None


def link_rates(index: int = 0, nbytes: int = 256 * MIB, copies: int = 20) -> LinkRates | None:
    """Measure torch's CUDA device `index`: copies of `nbytes` from page-locked and from ordinary memory.

    The link is read between queueing the page-locked copies and waiting for them, since an idle card reports a
    slower link than it has. None without CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        return None
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
                handle = _ask(lib, "DeviceGetHandleByUUID", cuda_uuid(index))
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
        rates = [nbytes / _seconds(lambda: target.copy_(pageable)) for _ in range(3)]
        registers = _registers(pageable)
    return LinkRates(pinned_rate, statistics.median(rates) / 1e9, under_load, registers)


def _registers(block: Any) -> bool:
    """Whether the driver page-locks this memory where it lies."""
    import torch

    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0:
        runtime.cudaHostUnregister(block.data_ptr())
        return True
    with suppress(RuntimeError):  # the failure stays behind as CUDA's last error, and the next call would report it
        torch.zeros(1, device="cuda")
    return False
