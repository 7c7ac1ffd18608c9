"""Versions, CPU, host memory and limits of this process. An unknown value is None, never 0."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import timeit
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

MIB = 2**20
Limit = int | Literal["unlimited"] | None
NO_LIMIT = 2**60  # cgroup v1 writes "no limit" as the largest page-aligned int64; anything so large is none
ROOT = Path("/")
FREE_SHARE = 0.8  # of the memory that is free: the rest is for what comes to be needed later


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
        """Bytes that can still be allocated: the machine's available memory, or the container's if that is less."""
        available = [self.memory_available_nbytes]
        if isinstance(self.container_limit_nbytes, int):
            available.append(self.container_limit_nbytes - (self.container_used_nbytes or 0))
        return min((nbytes for nbytes in available if nbytes is not None), default=None)


def package(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def software() -> Software:
    """Return the installed versions. Imports torch and Transformers."""
    import torch

    from mobile.errors import Refused
    from mobile.live_model import compat

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


def host(root: Path = ROOT) -> Host:
    """Return memory, limits and CPUs of this process, read from `root`'s /proc and /sys. Imports no torch."""
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


def share_of_free(usable_nbytes: int | None) -> int | None:
    """Return the bytes that a model with its experts on disk may take where no budget is given; None if not known."""
    return None if usable_nbytes is None else int(FREE_SHARE * usable_nbytes)


def process_nbytes(root: Path = ROOT) -> int | None:
    """Return the bytes of memory that this process takes now; None if the system does not say."""
    words = (_read(root / "proc/self/statm") or "").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 else None


def nearest_folder(folder: Path) -> Path:
    """Return the folder, absolute, or its nearest parent that is there."""
    whole = folder.absolute()
    return next(place for place in (whole, *whole.parents) if os.path.isdir(place))


def free_disk_nbytes(folder: Path) -> int:
    """Return the bytes that are free on the disk of a folder that is there, or will be made."""
    return shutil.disk_usage(nearest_folder(folder)).free


def memory_shortage(nbytes: int, usable_nbytes: int | None, of: str = "the experts") -> str | None:
    """Return why `usable_nbytes` of host memory cannot hold `nbytes`, or None if it can or if that is not known."""
    if usable_nbytes is None or nbytes <= usable_nbytes:
        return None
    return f"{of} take {_gib(nbytes)} of host memory and {_gib(usable_nbytes)} are free"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**30:.2g} GiB"


def _memlock() -> Limit:
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else soft


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _meminfo(root: Path) -> dict[str, int]:
    lines = (_read(root / "proc/meminfo") or "").splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _cpu(root: Path) -> str | None:
    lines = (_read(root / "proc/cpuinfo") or "").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def container_memory(root: Path = ROOT) -> tuple[Limit, int | None]:
    """Return the tightest cgroup memory limit above this process (v2 or v1) and the bytes counted against it."""
    limits: list[tuple[int, int | None]] = []
    readable = False
    for folder, limit_file, usage_file, prefix in _memory_cgroups(root):
        text = _read(folder / limit_file)
        if text is None:
            continue
        readable = True
        word = text.strip()
        if word != "max" and int(word) < NO_LIMIT:
            usage, lines = _read(folder / usage_file), (_read(folder / "memory.stat") or "").splitlines()
            cache = (f"{prefix}active_file", f"{prefix}inactive_file")
            reclaimable = sum(int(value) for name, value in map(str.split, lines) if name in cache)
            limits.append((int(word), None if usage is None else max(0, int(usage) - reclaimable)))
    if limits:
        return min(limits, key=lambda pair: pair[0])
    return ("unlimited" if readable else None), None


def _memory_cgroups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield this process's memory cgroups from the innermost outwards.

    Each is its folder, the names of its limit's and its usage's file, and the prefix of the fields in its memory.stat.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = top / inside.strip("/")
        for cgroup in (folder, *folder.parents):
            yield (cgroup, *files)
            if cgroup == top:
                break


def memcpy_gb_per_s(nbytes: int = 256 * MIB, repeats: int = 5) -> float | None:
    """Return the rate of copies within host memory with torch's threads, the median of `repeats`; None if it fails."""
    import torch

    try:
        source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    except RuntimeError:
        return None
    return nbytes / statistics.median(timeit.repeat(lambda: target.copy_(source), number=1, repeat=repeats)) / 1e9
