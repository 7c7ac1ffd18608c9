"""A run small enough to be killed fifty times: two live runs of two items, six cells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from suites.record import load

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).parent.parent
PRESET = """
minutes = 1
tasks = ["object_counting"]
items = 2
seeds = [0]
hardware = ["rtx4080-pcie4"]
budgets = ["smallest", "7GiB", "8GiB"]
strategies = ["static-half", "mobile"]
gammas = []

[[models]]
name = "olmoe-tiny"
path = "models/olmoe-tiny"
geometry = "olmoe-1b-7b"
weights = "shipped-tiny"
"""
CELLS = 6


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(PRESET)
    return path


def command(preset: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "suites", "run", "--preset", str(preset), "--out", str(out), *more]


def run(preset: Path, out: Path, *more: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(preset, out, *more), cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def undisturbed(tiny_preset, tmp_path_factory) -> Path:
    """The folder of a run that nothing befell."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(tiny_preset, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CELLS} of {CELLS} cells have records" in done.stdout
    return out


@pytest.fixture
def answered(undisturbed, tmp_path) -> Path:
    """The same, with its live runs only: every cell is still to be timed."""
    shutil.copytree(undisturbed, tmp_path / "run", ignore=lambda _, names: {"records"} & set(names))
    return tmp_path / "run"


def working(parent: int) -> list[psutil.Process]:
    """The processes that do jobs for this one; none if it is gone."""
    import psutil  # here, since a bare GPU machine reads this file and need not have it

    try:
        return [one for one in psutil.Process(parent).children(recursive=True) if "suites.run.worker" in one.cmdline()]
    except psutil.Error:  # one of them has just ended
        return []


def facts(path: Path) -> dict:
    """A record without what may differ between two runs of the same cell."""
    record = load(path)
    kept = {**vars(record), "items": [vars(item) for item in record.items]}
    return {name: value for name, value in kept.items() if name not in ("wall_seconds", "environment")}


def records(run: Path) -> dict[str, dict]:
    return {path.name: facts(path) for path in (run / "records").glob("*.json")}
