"""Hit curves of a finished run's traces: the experts that a strategy misses, by the room there is for them.

`mobile plan` reads them (`mobile/costs/hit_curves.json`) to say how fast a model will be. No torch.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mobile import outputs
from mobile.cli.terminal import show
from mobile.costs import expected
from mobile.costs.geometry import Geometry, project
from mobile.costs.hardware import profile
from mobile.errors import Refused
from mobile.machine.host import host
from mobile.policies.strategy import Strategy, resolve
from mobile.replay import trace
from mobile.replay.replay import ReplaySetup
from mobile.replay.trace import Request, run_step
from suites.record import Record, RunFolder, load
from suites.run_files import read_plan

# Strategies of which a speed is expected: all that a plan may recommend. The routing of each is full K's, or that of
# mobile at its own gamma.
STRATEGIES = ("lru", "lfu", "cpu-hybrid", "mobile", "mobile+lfu", "mobile+lfu+cpu-hybrid")
ROOMS = (0.53, 0.65, 0.8, 1.0, 1.07, 1.15, 1.25, 1.4, 1.55, 1.7, 1.85, 2.0)
HARDWARE = "rtx4080-pcie4"  # whose speeds decide what a processor takes over, and which prefetches are in time


class Routing(NamedTuple):
    """What a run recorded of one model and task: requests of full K, and of mobile at its own gamma."""

    native: Geometry
    geometry: str | None
    task: str
    full: Sequence[Request]
    mobile: Sequence[Request]


def recorded(run: RunFolder) -> Iterable[Routing]:
    """Yield the routing of each model and task that was timed, of the items that `lru` was timed on.

    Raise Refused for a run without records of `lru` and `mobile`, ValueError or OSError for one that cannot be read.
    """
    found: dict[tuple[str, str], dict[str, Record]] = {}
    gamma = resolve("mobile").gamma
    for cell in read_plan(run.plan).cells:
        if cell.strategy not in ("lru", "mobile") or not run.record(cell.id).exists():
            continue
        record = load(run.record(cell.id))
        if record.config.get("generation") is not None and record.gamma in (None, gamma):
            found.setdefault((record.model, record.task), {})[record.strategy] = record
    both = {key: records for key, records in found.items() if len(records) == 2}
    if not both:
        raise Refused(f"{run.path} has no records of lru and of mobile on the same model and task; run the preset cpu.")
    for (_, task), records in sorted(both.items()):
        docs = [item.doc for item in records["lru"].items]
        by_strategy = {}
        for name, record in records.items():
            requests, about = trace.load(run.trace(record.config["generation"]))
            by_doc = dict(zip(about["docs"], requests, strict=True))
            by_strategy[name] = [by_doc[doc] for doc in docs if doc in by_doc]
        native = Geometry.from_record(about["geometry"])
        dressed = None if records["lru"].geometry == native.name else records["lru"].geometry
        yield Routing(native, dressed, task, by_strategy["lru"], by_strategy["mobile"])


def curve(strategy: Strategy, of: Routing, rooms: Sequence[float] = ROOMS) -> dict[str, Any]:
    """Return one curve as `mobile.costs.expected.Curve` has it, without its rooms."""
    charged, layer_map = project(of.native, of.geometry)
    two_passes = strategy.gamma is not None
    requests = of.mobile if two_passes else of.full
    steps: Counter[str] = Counter(step.kind for request in requests for step in request)
    if not steps["little" if two_passes else "full"]:
        raise Refused(f"Nothing was decoded on {of.task}; give a run with answers of several tokens.")
    missed: dict[str, list[float]] = {kind: [] for kind in (("little", "big") if two_passes else ("full",))}
    for at in rooms:
        slots = expected.slots_of(charged, at)
        counted = count_missed(ReplaySetup(strategy, charged, layer_map, profile(HARDWARE), slots), requests)
        for kind, shares in missed.items():
            experts = charged.moe_layers * (charged.little_k if kind == "little" else charged.top_k)
            shares.append(round(counted[kind] / (max(1, steps[kind]) * experts), 4))
    return {
        "strategy": strategy.name,
        "experts": charged.experts,
        "top_k": charged.top_k,
        "task": of.task,
        "fallback_rate": round(steps["big"] / steps["little"], 4) if two_passes else None,
        "missed": missed,
    }


def count_missed(on: ReplaySetup, requests: Iterable[Request]) -> Counter[str]:
    """Return by kind of pass the experts that were copied, and outside of big passes those that the CPU computed."""
    residency, missed = on.residency(), Counter[str]()
    counters = residency.ledger.counters
    for request in requests:
        for step in request:
            begun, on_cpu = residency.link.begun, counters.cpu_experts
            run_step(step, residency, on.layer_map)
            missed[step.kind] += residency.link.begun - begun
            if step.kind != "big":
                missed[step.kind] += counters.cpu_experts - on_cpu
        residency.end_token()
    return missed


def measure(run: RunFolder, rooms: Sequence[float] = ROOMS) -> dict[str, Any]:
    """Return the content of `hit_curves.json`, on all processors. Raise as `recorded` does."""
    with ProcessPoolExecutor(host().cpus_allowed or 1) as workers:
        made = list(workers.map(partial(_curves, rooms=rooms), recorded(run)))
    return {"rooms": list(rooms), "curves": [each for of_one in made for each in of_one]}


def _curves(of: Routing, rooms: Sequence[float]) -> list[dict[str, Any]]:
    """Return the curves of all strategies on one model and task."""
    return [curve(resolve(name), of, rooms) for name in STRATEGIES]


def write(data: dict[str, Any], path: Path) -> None:
    """Write the file, one curve a line."""
    rows = ",\n".join(json.dumps(each, separators=(",", ":")) for each in data["curves"])
    with outputs.open_atomic(path) as file:
        file.write(f'{{"rooms":{json.dumps(data["rooms"])},"curves":[\n{rows}\n]}}\n'.encode())


# --- the command ------------------------------------------------------------------------------------


def declare(verbs: Any) -> None:
    """Add the command to the others."""
    help_text = "measure on a finished run's traces how many experts are missed by the room for them, for `mobile plan`"
    sub = verbs.add_parser("hit-curves", help=help_text, description=help_text)
    sub.add_argument("run", type=Path, help="run folder, with its traces")
    sub.add_argument("--out", type=Path, default=expected.FILE, metavar="FILE", help="(default: that of mobile plan)")


def run(options: argparse.Namespace) -> int:
    """Measure and write the curves. Raise Refused, OSError."""
    try:
        data = measure(RunFolder(options.run))
    except Refused:
        raise
    except ValueError as error:
        raise Refused(f"{options.run} is no run folder ({error}); name one that python -m suites run made.") from error
    write(data, options.out)
    show.note(f"{len(data['curves'])} curves at {len(data['rooms'])} sizes written to {options.out}")
    return 0
