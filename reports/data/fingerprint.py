"""Fingerprints of cells: the facts that must repeat exactly.

These are tokens, scores and counters, and for the virtual clock the times.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from reports.data.compare import paired_items, strategy_name, total
from reports.data.results import AS_IS, Results, rows_of
from suites.record import Record

VIRTUAL, DISK = "cpu+virtual", "cpu+disk"
SETTLED = ("prompt_tokens", "tokens", "fallbacks")  # counters that a script fixes, however fast copies come
TIMES = ("decode_ns", "ttft_ns")


def label(record: Record) -> str:
    """Return a cell's label: equal for the same cell of two runs, whose ids differ with the code."""
    device = "processor" if record.scope == DISK else record.hardware
    parts: tuple[str, ...] = (record.model, record.task, strategy_name(record), device, record.budget)
    parts += (f"seed {record.seed}",)
    if record.config.get("kind") == "shape":
        link, rate = record.config["link_gb_per_s"], record.config["fallback_asked"]
        parts += (f"{record.scope} {'native' if link is None else f'{link:g} GB/s'}",)
        parts += () if rate is None else (f"fallback {rate:g}",)
    parts += () if rows_of(record) == AS_IS else (f"rows {rows_of(record)}",)
    if record.config.get("kind") == "signals":
        parts += ("signals",)
    if record.config.get("kind") == "accuracy":
        parts += (f"accuracy round {record.config['round']}",)
    return " / ".join((*parts, *((str(record.config["control"]),) if record.config.get("control") else ())))


def fingerprint(record: Record) -> dict[str, Any]:
    """Return the exact facts of a cell, JSON-ready; counters that are 0 are left out.

    They are the same on every machine unless the arithmetic of its model differs. Over a disk, whether a prefetch is
    late depends on the machine, so that only what a script fixes is among them.
    """
    outputs: list[Any] = [[item.doc, item.prompt_sha256, item.output, item.correct] for item in record.items]
    if record.config.get("kind") == "accuracy":
        outputs = [record.config["prompts"], record.config["right"], record.config["gatings"], record.config["ended"]]
    kept = {
        "items": len(record.items),
        "outputs": hashlib.sha256(json.dumps(outputs).encode()).hexdigest()[:32],
        "correct": total([record], "correct"),
        "counters": {
            name: value
            for name, value in record.counters.items()
            if isinstance(value, int) and value and (record.scope != DISK or name in SETTLED)
        },
    }
    if record.scope == VIRTUAL:
        kept |= {f: total([record], f) for f in TIMES}
    return kept


def fingerprints(results: Results) -> dict[str, dict[str, Any]]:
    """Return the fingerprint of every cell by its label, in the order of the plan.

    References have none: they are other programs, which need not be installed.
    """
    return {label(record): fingerprint(record) for record in results.all_records if record not in results.references}


def changed_outputs(record: Record, other: Record) -> tuple[int, int]:
    """Return (items whose text differs, items that both have) of two cells."""
    pairs = [pair for group in paired_items([record], [other]) for pair in group]
    return sum(a.output != b.output for a, b in pairs), len(pairs)
