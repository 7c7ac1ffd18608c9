"""Table of a GPU's telemetry while cells were timed: power, clocks, temperature, and bytes over the link."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from reports.data.compare import strategy_name
from reports.data.groups import memory
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
    for record in results.scored:
        if record.environment.get("telemetry") and not record.config["swept"]:
            watched.setdefault((record.model, strategy_name(record), memory(record)), []).append(record)
    rows = tuple((f"{strategy}, {budget}", model, *_row(group)) for (model, strategy, budget), group in watched.items())
    return Table("What the card did while cells were timed", HEAD, rows)


def _row(group: list[Record]) -> tuple[str, ...]:
    summaries = [record.environment["telemetry"] for record in group]
    energy = [summary["energy_joules"] for summary in summaries]
    tokens = sum(record.counters["tokens"] for record in group)
    clock_limits = {
        cause: fmean((summary["clock_limits"] or {}).get(cause, 0) for summary in summaries)
        for cause in _causes(summaries)
    }
    seconds = sum(record.counters["seconds"] for record in group if record.counters.get("seconds"))
    moved = sum(record.counters["bytes_loaded"] for record in group)
    return (
        _statistic(summaries, "power_milliwatts", "mean", fmean, 1e-3),
        "-" if None in energy or not tokens else f"{sum(energy) / tokens:.2f}",
        _statistic(summaries, "sm_clock_mhz", "min", min),
        _statistic(summaries, "temperature_celsius", "max", max),
        f"{_statistic(summaries, 'link_generation', 'min', min)} x{_statistic(summaries, 'link_width', 'min', min)}",
        ", ".join(f"{cause} {percent(share)}" for cause, share in clock_limits.items() if share) or "never",
        _statistic(summaries, "link_received_kb_per_s", "mean", fmean, 1e-3),
        f"{moved / seconds / 1e6:,.0f}" if seconds else "-",
    )


def _causes(summaries: list[dict[str, Any]]) -> list[str]:
    return sorted({cause for summary in summaries for cause in summary.get("clock_limits") or ()})


def _statistic(
    summaries: list[dict[str, Any]],
    quantity: str,
    statistic: str,
    reduce: Callable[[list[float]], float],
    unit: float = 1,
) -> str:
    """Write one quantity's statistic over the cells' summaries; a dash where a GPU did not report it."""
    values = [summary[quantity][statistic] for summary in summaries if summary.get(quantity)]
    return f"{reduce(values) * unit:,.0f}" if values and len(values) == len(summaries) else "-"
