"""Tables of synthetic cells (real geometries, synthetic weights): speed by link, and by fallback rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports import verdict
from reports.data.compare import hit_rate, speedup, strategy_name, tokens_per_s, total
from reports.data.groups import ON_DEMAND, memory
from reports.data.results import AS_IS, rows_of
from reports.elements.numbers import percent, ratio
from reports.elements.page import Table
from reports.stats.intervals import Interval
from suites.record import Record

RECORDED = "recorded routing"
ROW = ("strategy", "budget", "TPOT ms", "tokens/s", *(f"over {b}" for b in ON_DEMAND), "fallbacks", "MB/token", "hits")


def link_title(record: Record) -> str:
    """Return the link a cell was timed over, for a heading."""
    asked = record.config["link_gb_per_s"]
    return "link as it is" if asked is None else f"link at {asked:g} GB/s"


def on_recorded_routing(records: Sequence[Record]) -> list[Record]:
    """Return the cells on the shipped models' routing with its own fallbacks, without the points of a sweep."""
    return [record for record in records if record.task == RECORDED and not record.config["swept"]]


def links(records: list[Record]) -> list[str]:
    """Return the distinct links of the cells, in order."""
    return list(dict.fromkeys(map(link_title, records)))


def baseline_cell(records: list[Record], cell: Record, baseline: str) -> list[Record]:
    """Return the baseline's cell of the same routing over the same link, as a list of one or none."""
    found = [r for r in records if r.strategy == baseline and r.task == cell.task and link_title(r) == link_title(cell)]
    return found[:1]


def speedup_over(records: list[Record], record: Record, baseline: str) -> Interval | None:
    """Return the speedup of a cell over a baseline, paired by repeat; None if that was not run."""
    reference = baseline_cell(records, record, baseline)
    return speedup([record], reference) if reference else None


def by_link(records: list[Record], link: str) -> Table:
    """Return the speed of every strategy over one link, on the shipped models' routing."""
    chosen = [r for r in on_recorded_routing(records) if link_title(r) == link]
    head = (
        *ROW,
        "ceiling tokens/s",
        "of the ceiling",
        "copies GB/s",
        "TTFT ms",
        "slots",
    )
    return Table(f"Decode speed, {link}", head, tuple(_row(records, record) for record in chosen))


def _row(records: list[Record], record: Record) -> tuple[str, ...]:
    """Return the columns of `ROW`, then those against the link, and the slots."""
    tokens, rate = total([record], "decode_tokens"), tokens_per_s([record])
    ceiling, copies = record.ceiling_tokens_per_s, record.config["link_measured_gb_per_s"]
    return (
        strategy_name(record),
        memory(record),
        "-" if rate is None else f"{1000 / rate:.2f}",
        "-" if rate is None else f"{rate:.2f}",
        *(
            "1" if record.strategy == baseline else ratio(speedup_over(records, record, baseline))
            for baseline in ON_DEMAND
        ),
        percent(total([record], "fallbacks") / tokens) if record.gamma is not None and tokens else "-",
        f"{total([record], 'decode_bytes') / tokens / 1e6:,.3f}" if tokens else "-",
        percent(hit_rate([record])),
        "-" if ceiling is None else f"{ceiling:.2f}",
        percent(rate / ceiling) if rate and ceiling else "-",
        "-" if copies is None else f"{copies:.2f}",
        f"{total([record], 'ttft_ns') / 1e6 / len(record.items):,.1f}",
        "-" if record.slots is None else f"{record.slots:,}",
    )


def by_routing(records: list[Record]) -> Table:
    """Return the speed of every strategy on routing drawn from a distribution."""
    rows = []
    for record in [r for r in records if r.task != RECORDED]:
        *columns, slots = _row(records, record)
        rows.append((record.task.removesuffix(" routing"), link_title(record), *columns[: len(ROW)], slots))
    return Table("Routing drawn from a distribution", ("routing", "link", *ROW, "slots"), tuple(rows))


def fallback_sweep(records: list[Record]) -> list[Record]:
    """Return MoBiLE's cells of the sweep over fallback rates, ascending."""
    return sorted((r for r in records if r.config["swept"] and r.gamma is not None), key=fallback_rate)


def fallback_rate(record: Record) -> float:
    """Return the share of counted decode steps that fell back."""
    return total([record], "fallbacks") / max(1, total([record], "decode_tokens"))


def by_fallback_rate(records: list[Record]) -> Table:
    """Return MoBiLE's speedup by fallback rate, beside 2 / (1 + r), the speedup if loading took all of the time."""
    rows = tuple(
        (
            percent(record.config["fallback_asked"]),
            percent(fallback_rate(record)),
            link_title(record),
            memory(record),
            *(ratio(speedup_over(records, record, baseline)) for baseline in ON_DEMAND),
            f"{2 / (1 + fallback_rate(record)):.2f}x",
            percent(hit_rate([record])),
        )
        for record in fallback_sweep(records)
    )
    head = ("fallbacks asked", "fell back", "link", "budget", *(f"over {b}" for b in ON_DEMAND), "2 / (1 + r)", "hits")
    note = (
        "2 / (1 + r) is for loading that takes all of the time, nothing kept between tokens and every prefetch in "
        "time; what a row has beyond it is cache."
    )
    return Table("MoBiLE against its fallback rate", head, rows, note)


def over_plain(records: list[Record], record: Record, rows: str = AS_IS) -> Interval | None:
    """Return the speedup of a cell over on-demand-overlap on such rows, paired by repeat; None if that was not run."""
    return speedup_over([other for other in records if rows_of(other) == rows], record, "on-demand-overlap")


def by_rows(records: list[Record]) -> Table:
    """Return the cells of one geometry on recorded routing by budget and row format, fastest first in each budget."""
    cells = on_recorded_routing(records)
    budgets = dict.fromkeys(record.budget for record in cells if record.budget != "smallest")
    head = (
        "memory",
        "strategy",
        "rows",
        "over on-demand-overlap",
        "the same, on its own rows",
        "TPOT ms",
        "MB/token",
        "fallbacks",
        "slots",
    )
    found = []
    for budget in budgets:
        # What keeps nothing between tokens needs its few slots whatever the budget.
        here = [r for r in cells if r.budget == budget or r.strategy in ON_DEMAND]
        for record in sorted(here, key=lambda r: -(tokens_per_s([r]) or 0)):
            tokens, rate = total([record], "decode_tokens"), tokens_per_s([record])
            found.append(
                (
                    memory(record) if record.budget == budget else budget,
                    strategy_name(record),
                    rows_of(record),
                    ratio(over_plain(records, record)),
                    ratio(over_plain(records, record, rows_of(record))),
                    "-" if rate is None else f"{1000 / rate:.2f}",
                    f"{total([record], 'decode_bytes') / tokens / 1e6:,.1f}" if tokens else "-",
                    percent(fallback_rate(record)) if record.gamma is not None else "-",
                    "-" if record.slots is None else f"{record.slots:,}",
                )
            )
    title = records[0].model if records else "-"
    return Table(f"{title} over the disk, measured, by strategy and rows", head, tuple(found))


def verdicts(records: list[Record], claim: dict[str, Any], trusted: bool) -> Table:
    """Return the verdicts on synthetic cells beside the published band; none of them can be REPRODUCED."""
    rows = []
    for record in [r for r in on_recorded_routing(records) if r.strategy == "mobile"]:
        for baseline in ON_DEMAND:
            measured = speedup_over(records, record, baseline)
            stamp = verdict.stamp_of([record], baseline_cell(records, record, baseline))
            outcome = verdict.speedup_verdict(measured, claim["low"], claim["high"], stamp, trusted)
            here = f"over {baseline}, {memory(record)}, {link_title(record)}"
            band = f"{claim['low']:.2f}x to {claim['high']:.2f}x"
            rows.append(("speedup", band, record.model, here, ratio(measured), outcome, str(stamp)))
    head = ("claim", "published", "model", "here", "value", "verdict", "scope")
    return Table("Verdicts on synthetic weights", head, tuple(rows))


def families(records: list[Record]) -> Table:
    """Return one row a geometry and link: MoBiLE at its fewest slots, with the shipped model's own fallbacks."""
    rows = []
    for record in [r for r in on_recorded_routing(records) if r.strategy == "mobile"]:
        if record.budget == "smallest":
            rate = tokens_per_s([record])
            rows.append(
                (
                    record.model,
                    link_title(record),
                    *(
                        ratio(speedup_over([r for r in records if r.model == record.model], record, b))
                        for b in ON_DEMAND
                    ),
                    "-" if rate is None else f"{1000 / rate:.2f}",
                    percent(fallback_rate(record)),
                    record.scope,
                    f"{record.config['moe_layers']} of {record.config['real_moe_layers']}",
                )
            )
    head = (
        "geometry",
        "link",
        *(f"over {b}" for b in ON_DEMAND),
        "MoBiLE's TPOT ms",
        "fallbacks",
        "scope",
        "MoE layers made",
    )
    return Table("Geometries and links at a glance", head, tuple(rows))
