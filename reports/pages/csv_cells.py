"""The table of all cells as CSV, one row a cell, for a spreadsheet or a data frame."""

from __future__ import annotations

from typing import Any

from reports.data.compare import count, hit_rate, tokens_per_s, total
from reports.data.results import Results, family
from reports.elements.page import Table
from reports.verdict import machine
from suites.record import Record

FIELDS = (
    "id",
    "scope",
    "weights",
    "model",
    "geometry",
    "task",
    "strategy",
    "gamma",
    "lossless",
    "hardware",
    "budget",
    "slots",
    "seed",
)
SCRIPT = ("link_gb_per_s", "link_measured_gb_per_s", "fallback_asked", "moe_layers", "real_moe_layers")


def csv_of(results: Results) -> Table:
    """Return all cells, controls too, at full precision; an unknown value is empty."""
    records = results.all_records
    counters = sorted({name for record in records for name in record.counters})
    derived = [_derived(record) | (_script(record) if results.synthetic else {}) for record in records]
    head = (*FIELDS, *derived[0], *counters)
    rows = tuple(
        tuple(_text(v) for v in (*(getattr(r, f) for f in FIELDS), *d.values(), *(r.counters.get(c) for c in counters)))
        for r, d in zip(records, derived, strict=True)
    )
    return Table("Cells", head, rows)


def _derived(record: Record) -> dict[str, Any]:
    return {
        "family": family(record),
        "training_seed": record.config.get("training_seed"),
        "control": record.config.get("control"),
        "swept": record.config.get("swept"),
        "items": count([record]),
        "correct": None if all(item.correct is None for item in record.items) else total([record], "correct"),
        "item_decode_tokens": total([record], "decode_tokens"),
        "item_decode_ns": total([record], "decode_ns"),
        "item_ttft_ns": total([record], "ttft_ns"),
        "tokens_per_s": tokens_per_s([record]),
        "decode_hit_rate": hit_rate([record]),
        "ceiling_tokens_per_s": record.ceiling_tokens_per_s,
        "wall_seconds": record.wall_seconds,
        "machine": machine(record),
    }


def _script(record: Record) -> dict[str, Any]:
    """Return the columns that only synthetic cells fill."""
    return {name: record.config.get(name) for name in SCRIPT}


def _text(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
