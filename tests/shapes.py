"""A preset of shapes narrow enough for a test, and a Python that lacks what a bare GPU machine lacks.

Such a machine has a checkout of this repository, torch, Transformers and pytest; the project is not installed there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRESET = """
minutes = 2
link = "cuda"
hardware = ["auto"]
seeds = [0]
prompt_tokens = 6
warmup_tokens = 2
decode_tokens = 10
repeats = 2
budgets = ["smallest"]
layers = 2
shrink = 16

[[runs]]
routing = "recorded"
links = [25]
strategies = ["on-demand", "on-demand-overlap", "static-half", "mobile"]

[[runs]]
routing = "recorded"
links = [25]
strategies = ["mobile"]
rates = [0.0, 0.5]

[[runs]]
routing = "zipf 1.0"
links = ["native"]
strategies = ["lru"]
budgets = ["8GiB"]

[[models]]
name = "olmoe-1b-7b"
geometry = "olmoe-1b-7b"
family = "olmoe"
path = "models/olmoe-tiny"
"""
CELLS = 7
ABSENT = (  # there: packages of this project's extras and tests, what only comes with them, and the project installed
    "lm_eval",
    "lm-eval",
    "datasets",
    "scipy",
    "sklearn",
    "scikit-learn",
    "pandas",
    "matplotlib",
    "accelerate",
    "nox",
    "pynvml",
    "nvidia-ml-py",
    "distributed",
    "psutil",
    "pytest_benchmark",
    "pytest-benchmark",
    "hypothesis",
    "statsmodels",
    "importlinter",
    "import-linter",
    "mobile-moe",
)
BARE = f"""
import importlib.machinery, importlib.metadata, sys
ABSENT = {ABSENT!r}

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
discover = importlib.metadata.Distribution.discover

def present(**sought):
    return (one for one in discover(**sought) if one.name not in ABSENT)

importlib.metadata.Distribution.discover = present
"""


def bare(folder: Path) -> dict[str, str]:
    """An environment in which every Python starts without the packages that a bare GPU machine lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(BARE)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def suites(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "suites", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
