"""A memory cap: a cgroup for one process, which counts what it allocates and what it reads through the page cache.

Without one, a reader of a memory-mapped file would keep in the page cache whatever it had once read, and no memory
would be short. Root can make such a group, under version 1 and 2 alike, where the system lets it. No torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mobile.errors import one_line

ROOT = Path("/")
PATIENCE_SECONDS = 5  # until a group whose process has ended is empty


@dataclass(frozen=True)
class MemoryCap:
    """A cap of `nbytes` on one process; `how` says what was capped, or why nothing was.

    `group` is the folder of the cgroup, None without one.
    """

    nbytes: int
    how: str
    group: Path | None = None

    @property
    def is_kept(self) -> bool:
        """Return whether the process cannot have more."""
        return self.group is not None

    @property
    def members(self) -> str | None:
        """Return the file into which a process writes its number, to be capped; None without a group."""
        return str(self.group / "cgroup.procs") if self.group else None

    def peak_nbytes(self) -> int | None:
        """Return the most bytes at once, page cache included; None where the system does not tell."""
        return self._number("memory.peak", "memory.max_usage_in_bytes")

    def kills(self) -> int | None:
        """Return how many processes were killed because they needed more; None where the system does not tell."""
        if self.group is None:
            return None
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                for line in (self.group / name).read_text(encoding="utf-8").splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return None

    def _number(self, *names: str) -> int | None:
        for name in names if self.group else ():
            with suppress(OSError, ValueError):
                return int((self.group / name).read_text(encoding="utf-8"))  # type: ignore[operator]
        return None


@contextmanager
def capped(nbytes: int, name: str, root: Path = ROOT) -> Iterator[MemoryCap]:
    """Make a group of that name for a process, and remove it after the block; where none can be made, say why.

    The group lies under that of this process, so that whatever bounds this one bounds it, too; under version 2, where
    a group with processes can have none below it, beside it.
    """
    try:
        parent, version = _parent(root)
        group = parent / name
        group.mkdir(exist_ok=True)
    except OSError as error:
        yield MemoryCap(nbytes, f"not capped: no memory cgroup can be made here ({one_line(error)})")
        return
    try:
        try:
            _limit(group, version, nbytes)
        except OSError as error:
            yield MemoryCap(nbytes, f"not capped: the memory cgroup takes no limit ({one_line(error)})")
        else:
            yield MemoryCap(nbytes, f"memory cgroup v{version} of {nbytes} bytes, page cache included", group)
    finally:
        _remove(group)


def _parent(root: Path) -> tuple[Path, int]:
    """Return the group to make ours in, and the version of cgroups. Raise OSError where there is none."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, inside = line.split(":", 2)
        if "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            own = top / inside.strip("/")
            return (own if own.is_dir() else top), 1  # a container may not see its own
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        if line.startswith("0::"):
            top = root / "sys/fs/cgroup"
            own = top / line[3:].strip("/")
            for folder in (own, *own.parents):
                control = folder / "cgroup.subtree_control"
                if control.is_file() and "memory" in control.read_text(encoding="utf-8").split():
                    return folder, 2
                if folder == top:
                    break
    raise FileNotFoundError("this system counts no memory by groups")


def _limit(group: Path, version: int, nbytes: int) -> None:
    """Set the limit, and where the system counts swap let no more than that lie in both. Raise OSError."""
    if version == 1:
        (group / "memory.limit_in_bytes").write_text(str(nbytes), encoding="utf-8")
        swap, most = group / "memory.memsw.limit_in_bytes", nbytes
    else:
        (group / "memory.max").write_text(str(nbytes), encoding="utf-8")
        swap, most = group / "memory.swap.max", 0
    if swap.is_file():
        swap.write_text(str(most), encoding="utf-8")


def _remove(group: Path) -> None:
    """Remove the group once its process has left it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            os.rmdir(group)
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > end:
                return
            time.sleep(0.02)
