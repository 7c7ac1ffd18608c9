"""A description of where a record was made: machine, packages, code. Unknown is None."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from mobile.machine.gpu import cuda_uuid, gpus, gpus_of_driver
from mobile.machine.host import host, package

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval", "datasets", "rich")


def _git(*arguments: str) -> str | None:
    """Ask git about this tree. It takes no lock: one that a killed run left would keep the user from committing."""
    words = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(
            words,
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu() -> dict[str, Any] | None:
    """Return name, driver and link of the GPU that torch uses; None without one.

    Torch is asked only where it is loaded, since importing it takes longer than timing a cell. Elsewhere it is the
    driver's first, which torch may count otherwise.
    """
    loaded = "torch" in sys.modules
    found = gpus() if loaded else gpus_of_driver()
    if not found:
        return None
    uuid = cuda_uuid() if loaded and len(found) > 1 else None
    gpu = next((one for one in found if uuid is not None and one.uuid == uuid), found[0])
    return {
        "name": gpu.name,
        "driver": gpu.driver,
        "link_generation": gpu.link_now.generation,
        "link_width": gpu.link_now.width,
        "sm_clock_mhz": gpu.sm_clock_mhz,
    }


def fingerprint(seen: dict[str, Any]) -> str:
    """Return a hash of what time and numbers depend on: alike on two machines that are alike, whatever their names."""
    gpu = seen["gpu"] and {name: seen["gpu"][name] for name in ("name", "driver")}
    parts = [gpu, *(seen[name] for name in ("cpu", "cores", "python", "packages"))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def environment() -> dict[str, Any]:
    """Return a JSON-ready description of this machine and checkout, and the day (UTC) of its first call."""
    status = _git("status", "--porcelain")
    seen = {
        "host": platform.node() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": host().cpu,
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "packages": {name: package(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }
    return {**seen, "fingerprint": fingerprint(seen), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
