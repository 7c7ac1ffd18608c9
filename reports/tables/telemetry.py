"""Table of a GPU's telemetry while cells were timed: power, clocks, temperature, and bytes over the link."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from reports.data.compare import name
from reports.data.results import Results
from reports.elements.numbers import percent
from reports.elements.page import Table
from suites.record import Record

HEAD = (
    "strategy",
    "model",
    "power W",
    "J/token",
    "SM clock MHz, least",
    "hottest °C",
    "link",
    "clocks held down",
    "link MB/s: card",
    "ledger",
)


def by_strategy(results: Results) -> Table:
    """Return one row a strategy, model and budget with telemetry; a dash where the GPU reported nothing."""
    watched: dict[tuple, list[Record]] = {}
    for record in results.records:
        if record.environment.get("telemetry") and not record.config["swept"]:
            watched.setdefault((record.model, name(record), record.budget), []).append(record)
    rows = tuple((f"{strategy}, {budget}", model, *_row(group)) for (model, strategy, budget), group in watched.items())
    return Table("What the card did while cells were timed", HEAD, rows)


def _row(group: list[Record]) -> tuple[str, ...]:
    seen = [record.environment["telemetry"] for record in group]
    energy = [told["energy_joules"] for told in seen]
    tokens = sum(record.counters["tokens"] for record in group)
    held = {cause: fmean((told["clock_limits"] or {}).get(cause, 0) for told in seen) for cause in _causes(seen)}
    seconds = sum(record.counters["seconds"] for record in group if record.counters.get("seconds"))
    moved = sum(record.counters["bytes_loaded"] for record in group)
    return (
        _of(seen, "power_milliwatts", "mean", fmean, 1e-3),
        "-" if None in energy or not tokens else f"{sum(energy) / tokens:.2f}",
        _of(seen, "sm_clock_mhz", "min", min),
        _of(seen, "temperature_celsius", "max", max),
        f"{_of(seen, 'link_generation', 'min', min)} x{_of(seen, 'link_width', 'min', min)}",
        ", ".join(f"{cause} {percent(part)}" for cause, part in held.items() if part) or "never",
        _of(seen, "link_received_kb_per_s", "mean", fmean, 1e-3),
        f"{moved / seconds / 1e6:,.0f}" if seconds else "-",
    )


def _causes(seen: list[dict[str, Any]]) -> list[str]:
    return sorted({cause for told in seen for cause in told.get("clock_limits") or ()})


def _of(
    seen: list[dict[str, Any]], what: str, which: str, reduce: Callable[[list[float]], float], unit: float = 1
) -> str:
    """Write one quantity's statistic over the cells' summaries; a dash where a GPU did not report it."""
    told = [summary[what][which] for summary in seen if summary.get(what)]
    return f"{reduce(told) * unit:,.0f}" if told and len(told) == len(seen) else "-"
