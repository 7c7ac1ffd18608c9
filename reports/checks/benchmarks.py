"""Comparison of two files of pytest-benchmark, only where one GPU made both (or one processor, without a GPU).

pytest-benchmark keys its results by system and Python, so that two cards would share a baseline.
"""

from __future__ import annotations

import json
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

from reports.elements.escapes import visible
from suites.strict_json import read_bytes

SHOWN = "median,iqr,min,rounds"
AGAIN = "make it again with: nox -s bench"


class UnlikeMachines(ValueError):
    """Two results whose times say nothing of each other."""


def identity(machine_info: Any) -> dict[str, Any]:
    """Return the facts of a machine that times depend on most. Raise UnlikeMachines where one of them is unknown."""
    if not isinstance(machine_info, dict) or "gpu" not in machine_info:
        raise UnlikeMachines(f"A result does not say which GPU made it; {AGAIN}")
    if machine_info["gpu"] is not None:
        return _known_facts({"GPU": "name", "UUID": "uuid"}, machine_info["gpu"])
    return {"GPU": None, **_known_facts({"processor": "brand_raw", "cores": "count"}, machine_info.get("cpu"))}


def _known_facts(names: dict[str, str], facts: Any) -> dict[str, Any]:
    """Return facts by our names, given pytest-benchmark's. Raise UnlikeMachines where one is missing."""
    found = {ours: facts.get(theirs) if isinstance(facts, dict) else None for ours, theirs in names.items()}
    for name, value in found.items():
        if not isinstance(value, str | int) or not value:
            raise UnlikeMachines(f"A result does not say the {name} of the machine that made it; {AGAIN}")
    return found


def same(base: Any, head: Any) -> None:
    """Raise UnlikeMachines unless both machine_info are of one machine."""
    one, other = identity(base), identity(head)
    if one != other:
        raise UnlikeMachines(
            f"The base was made on {_in_words(one)} and the head on {_in_words(other)}; run both on one machine."
        )


def _in_words(identity: dict[str, Any]) -> str:
    return ", ".join(f"{what} {str(value)[:80]}" for what, value in identity.items())


def same_machine(base: Path, head: Path) -> None:
    """Raise UnlikeMachines unless both files are results of one machine."""
    infos = []
    for path in (base, head):
        try:
            data = json.loads(read_bytes(path))
            infos.append(data["machine_info"])
            _check_results(data["benchmarks"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UnlikeMachines(
                f"{path} is no result of pytest-benchmark ({error}); make one: nox -s bench"
            ) from error
    same(*infos)


def _check_results(benchmarks: Any) -> None:
    """Raise ValueError, KeyError or TypeError unless there is a result and each is complete; no table may drop one."""
    if not isinstance(benchmarks, list) or not benchmarks:
        raise ValueError("it holds no benchmark")
    for one in benchmarks:
        shown = [one["stats"][column] for column in SHOWN.split(",")]
        if not isinstance(one["fullname"], str) or not all(isinstance(n, int | float) and isfinite(n) for n in shown):
            raise ValueError("a benchmark has no name, or a number that is none")


def compare(base: Path, head: Path) -> int:
    """Print pytest-benchmark's own table of both files and return 0. Raise UnlikeMachines where it cannot make one."""
    words = (
        "compare",
        base.absolute(),
        head.absolute(),
        "--group-by=fullname",
        f"--columns={SHOWN}",
        "--sort=fullname",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", *words], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UnlikeMachines(f"pytest-benchmark cannot compare {base} with {head} ({last}); {AGAIN}")
    print(visible(done.stdout), end="")
    return 0
