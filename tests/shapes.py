"""A preset of shapes narrow enough for a test, and the commands of the suite in a process of their own."""

from __future__ import annotations

import subprocess
import sys

from tests.bare_machine import ROOT, bare

__all__ = ["CELLS", "PRESET", "ROOT", "bare", "suites"]
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


def suites(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "suites", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
