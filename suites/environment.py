"""Where a record was made: machine, packages, code. Unknown is None."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from mobile.gpu import gpus
from mobile.host import host, package

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval", "datasets", "rich")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu() -> dict[str, Any] | None:
    """Name, driver and link of the first GPU; None without one."""
    found = gpus()
    if not found:
        return None
    first = found[0]
    return {
        "name": first.name,
        "driver": first.driver,
        "link_generation": first.link_now.generation,
        "link_width": first.link_now.width,
        "sm_clock_mhz": first.sm_clock_mhz,
    }


@cache
def environment() -> dict[str, Any]:
    """A JSON-ready description of this machine and checkout."""
    status = _git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": host().cpu,
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "packages": {name: package(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }
