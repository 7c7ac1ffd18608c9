"""The timelines of a run as one Chrome trace, for ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from typing import Any

from reports.data.compare import strategy_name
from reports.data.results import Results

ROWS = {"load": 1, "prefetch": 1, "compute": 2, "stall": 2, "cpu": 3}
THREADS = {1: "link", 2: "GPU", 3: "CPU"}


def trace(results: Results) -> str:
    """Return the trace as JSON: a process a strategy on each model's first task, with rows for link, GPU and CPU."""
    events: list[dict[str, Any]] = []
    records = [
        record
        for model in results.models
        for record in results.select(model=model, task=results.tasks(model)[0])
        if record.timeline and not record.config["swept"]
    ]
    for process, record in enumerate(records, 1):
        events.append(_named("process_name", process, 0, f"{record.model} {record.task} {strategy_name(record)}"))
        events += [
            _named("thread_name", process, thread, THREADS[thread])
            for thread in sorted({ROWS[event[0]] for event in record.timeline})
        ]
        events += [
            {"ph": "X", "pid": process, "tid": ROWS[kind], "name": label, "ts": start / 1e3, "dur": (end - start) / 1e3}
            for kind, start, end, label in record.timeline
        ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def _named(kind: str, process: int, thread: int, label: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": label}}
