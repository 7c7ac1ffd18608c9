"""Where a record was made: machine, packages, code. Unknown is None."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm-eval", "datasets", "rich")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _gpu() -> dict[str, Any] | None:
    """Name, driver and link of the first GPU, read through NVML; None without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver or no permission: all of them mean that nothing is known
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "name": pynvml.nvmlDeviceGetName(handle),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "link_generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "link_width": pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        }
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


@cache
def environment() -> dict[str, Any]:
    """A JSON-ready description of this machine and checkout."""
    status = _git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "packages": {package: _version(package) for package in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }
