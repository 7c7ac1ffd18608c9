"""Disk peers: the programs that a user would run instead on a model larger than memory, measured under one memory cap.

A checkpoint of the same geometry is written to disk in the layout that the program reads, dropped from the page cache,
and read by the program in a process of its own, `disk_peer_process`, capped where the system lets us. Weights are
random and so is routing: no script can be played into somebody else's engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mobile.costs.hardware import parse_nbytes
from mobile.errors import Refused
from mobile.machine.host import package
from suites.synthetic import disk_checkpoint, models
from suites.synthetic.memory_cap import MemoryCap, capped
from suites.synthetic.reference_cells import DISK_PEERS, ReferenceCell

PROCESS_NBYTES = 512 * 2**20  # of the cap: an assumption of what a process with torch allocates beside the weights
LONGEST_SECONDS = 900  # of one program, its loading included
ROUTING = "random weights' own, near uniform"
PACKAGES: dict[str, dict[str, str]] = {  # beyond Transformers: module, and what pip calls it
    "disk_offload": {"accelerate": "accelerate"},
    "mmap": {},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
}
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Measured:
    """What a program took: `fields` for the record's config, and by repeat what `disk_peer_process.timed` returns."""

    fields: dict[str, Any]
    repeats: list[dict[str, Any]]


def fields_of(cell: ReferenceCell) -> dict[str, Any]:
    """Return the fields of a peer's config that are known before it runs."""
    return {
        "routing": ROUTING,
        "memory_nbytes": parse_nbytes(cell.memory),
        "memory_cap": None,
        "memory_peak_nbytes": None,
        "allocated_nbytes": None,
        "checkpoint_nbytes": None,
        "file_system": None,
        "threads": None,
        "load_seconds": None,
        "load_read_nbytes": None,
        "prefill_read_nbytes": None,
        "decode_read_nbytes": None,
        "versions": {name: package(name) for name in PACKAGES[DISK_PEERS[cell.what]].values()},
    }


def measure_peer(cell: ReferenceCell, folder: Path) -> Measured:
    """Write the checkpoint into a new folder below `folder`, run the program on it, and remove both.

    Raise Refused in one sentence where the program or the room for its checkpoint is missing, or it ends too early.
    """
    program = DISK_PEERS[cell.what]
    for module, name in PACKAGES[program].items():
        if find_spec(module) is None:
            raise Refused(f"{name} is not installed, and {cell.what} needs it: pip install {name}.")
    config = models.config_of(cell.model.geometry, cell.layers, cell.shrink)
    place = folder / f"checkpoint-{cell.id}"
    shutil.rmtree(place, ignore_errors=True)  # a run that was killed may have left it
    place.mkdir(parents=True)
    try:
        file = place / ("model.gguf" if program == "llama.cpp" else "model.safetensors")
        if program == "llama.cpp":
            disk_checkpoint.write_gguf(file, config, cell.seed)
        else:
            disk_checkpoint.write_stock(place, config, cell.seed)
        disk_checkpoint.forget_all(place)
        with capped(parse_nbytes(cell.memory), f"mobile-peer-{os.getpid()}") as cap:
            found = _run(cell, program, file, cap)
            repeats = found.pop("repeats")
            read = {name: [one[name] for one in repeats] for name in ("prefill_read_nbytes", "decode_read_nbytes")}
            return Measured(
                {
                    **found,
                    **read,
                    "memory_cap": cap.how,
                    "memory_peak_nbytes": cap.peak_nbytes(),
                    "checkpoint_nbytes": file.stat().st_size,
                    "file_system": disk_checkpoint.file_system_of(place),
                },
                repeats,
            )
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run(cell: ReferenceCell, program: str, file: Path, cap: MemoryCap) -> dict[str, Any]:
    """Return what the program's process measured. Raise Refused if it ended without an answer, and say why."""
    answer, log = file.parent / "answer.json", file.parent / "log.txt"
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = {
        "program": program,
        "folder": str(file.parent),
        "file": str(file),
        "answer": str(answer),
        "members": cap.members,
        "weights_nbytes": max(0, cap.nbytes - PROCESS_NBYTES),
        "prompt_tokens": cell.prompt_tokens,
        "decode_tokens": cell.decode_tokens,
        "repeats": cell.repeats,
        "threads": threads,
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "suites.synthetic.disk_peer_process"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONOPTIMIZE": ""},
        )
        assert child.stdin is not None
        with child:
            try:
                child.stdin.write(json.dumps(job) + "\n")
                child.stdin.flush()  # and stays open: the process ends when this one does
                code = child.wait(LONGEST_SECONDS)
            except BrokenPipeError:
                code = child.wait(LONGEST_SECONDS)
            except subprocess.TimeoutExpired:
                raise Refused(f"{cell.what} took longer than {LONGEST_SECONDS} seconds with {cell.memory}.") from None
            finally:
                child.kill()
    if code or not answer.is_file():
        raise Refused(_ending(cell, code, cap, log))
    return {**json.loads(answer.read_text(encoding="utf-8")), "threads": threads}


def _ending(cell: ReferenceCell, code: int, cap: MemoryCap, log: Path) -> str:
    """Return why the process left no answer, in a sentence."""
    if cap.kills():
        return f"{cell.what} was killed: it needs more than {cell.memory} of memory ({cap.how})."
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if code > 0 and lines else f"exit code {code}"
    return f"{cell.what} ended without an answer, {cap.how}: {last}."
