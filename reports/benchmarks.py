"""Two files of pytest-benchmark: compared only where one GPU made both, or one kind of processor where there is none.

pytest-benchmark keys its results by system and Python, so that two cards would share a baseline.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SHOWN = "median,iqr,min,rounds"


class UnlikeMachines(ValueError):
    """Two results whose times say nothing of each other."""


def identity(machine_info: dict[str, Any]) -> dict[str, Any]:
    """What times depend on most. Raises UnlikeMachines where the GPU was not asked for: unknown is not none."""
    if "gpu" not in machine_info:
        raise UnlikeMachines("A result does not say which GPU made it; make it with: nox -s bench")
    if machine_info["gpu"] is not None:
        return {"GPU": machine_info["gpu"]["name"], "UUID": machine_info["gpu"]["uuid"]}
    cpu = machine_info["cpu"]
    return {"GPU": None, "processor": cpu.get("brand_raw"), "cores": cpu.get("count")}


def same(base: dict[str, Any], head: dict[str, Any]) -> None:
    """Raises UnlikeMachines unless both machine_info are of one machine."""
    one, other = identity(base), identity(head)
    if one != other:
        raise UnlikeMachines(
            f"The base was made on {_said(one)} and the head on {_said(other)}; run both on one machine."
        )


def _said(identity: dict[str, Any]) -> str:
    return ", ".join(f"{what} {value}" for what, value in identity.items())


def same_machine(base: Path, head: Path) -> None:
    """Raises UnlikeMachines for files that are not of one machine, or no such files."""
    infos = []
    for path in (base, head):
        try:
            infos.append(json.loads(path.read_text(encoding="utf-8"))["machine_info"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnlikeMachines(
                f"{path} is no result of pytest-benchmark ({error}); make one: nox -s bench"
            ) from error
    same(*infos)


def compare(base: Path, head: Path) -> int:
    """Print pytest-benchmark's own table of both; its exit code."""
    words = (
        "compare",
        base.absolute(),
        head.absolute(),
        "--group-by=fullname",
        f"--columns={SHOWN}",
        "--sort=fullname",
    )
    return subprocess.run([sys.executable, "-m", "pytest_benchmark", *words]).returncode
