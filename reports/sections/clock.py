"""Sections on the virtual clock against the wall clock.

They hold the times that a calibrated profile predicts for timed cells, and how near to the link's rate these came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from reports.data.compare import name, total
from reports.data.results import Results
from reports.elements.numbers import percent
from reports.elements.page import Section, Table
from reports.tables.shapes import link_of, rate_of
from suites.record import Record

AIM = 0.05  # of TPOT
NEAR = 0.95  # of the link
CLOCK = (
    "The machine was calibrated at the start of the run: copies over the link, kernels, and decode steps with "
    "everything resident were timed, and a hardware profile was fitted to them, one for each speed of the link. Then "
    "the same model played the same scripts, with as many slots, under the same strategy, on the virtual clock of that "
    "profile. No number of a cell went into the profile it is predicted by. Both clocks are read of the first repeat, "
    "which starts from cold slots. An error is predicted over measured, less one; the aim is "
    f"{AIM:.0%} of TPOT. Where an error is larger, projections of virtual time are that far off too."
)
PACED = "The link of these cells is a thread that sleeps: their errors say that the path works, and nothing of a GPU."
LINK = (
    "Bytes that decode steps copied, over the time they took, against the rate of row copies that follow on one "
    "another, as it was calibrated. Plain on-demand loading takes turns with compute and cannot reach it. A fallback "
    f"is timed from the moment its token is found unsure to the end of its last copy. The aim is {NEAR:.0%} for "
    "on-demand-overlap and for fallbacks."
)


def sections(results: Results) -> list[Section]:
    """Return the sections on the clock; none where no cell was predicted."""
    cells = [record for record in results.shapes if record.config.get("predicted")]
    told = tuple(_unpredicted(record) for record in results.shapes if record.config.get("unpredicted"))
    if not cells:
        return [Section("Virtual clock against wall clock", told)] if told else []
    paced = (PACED,) if any(record.scope == "cpu+paced" for record in cells) else ()
    made = [Section("Virtual clock against wall clock", (CLOCK, _summary(cells), *paced, *told), (errors(cells),))]
    near = closeness(cells)
    if near.rows:
        made.append(Section("How near the link", (LINK, *paced), (near,)))
    sources = dict.fromkeys(source for record in cells for source in record.config["predicted"]["profile"]["sources"])
    made.append(Section("The calibrated machine", tuple(sources), (profiles(cells),), level=3, folded=True))
    return made


def _unpredicted(record: Record) -> str:
    where = f"{record.model}, {name(record)}, {record.task}, {record.budget}, {link_of(record)}"
    return f"Measured and not predicted: {where} ({record.config['unpredicted']})"


def error(record: Record, what: str = "decode_ns") -> float | None:
    """Return predicted over measured time less one, of the predicted repeats; None where nothing was measured."""
    measured = total([_foretold(record)], what)
    return sum(record.config["predicted"][what]) / measured - 1 if measured else None


def _foretold(record: Record) -> Record:
    """Return the record with only the repeats that were predicted, which are the first."""
    return replace(record, items=record.items[: len(record.config["predicted"]["decode_ns"])])


def _summary(cells: Sequence[Record]) -> str:
    found = [(abs(value), record) for record in cells if (value := error(record)) is not None]
    if not found:
        return "No cell decoded anything."
    sizes = [size for size, _ in found]
    worst, record = max(found, key=lambda pair: pair[0])
    return (
        f"TPOT of {len(found)} cells: the median error is {percent(median(sizes))}, the worst {percent(worst)} "
        f"({record.model}, {name(record)}, {record.task}, {record.budget}, {link_of(record)}); "
        f"{sum(size <= AIM for size in sizes)} lie within {AIM:.0%}."
    )


def errors(cells: Sequence[Record]) -> Table:
    """Return TPOT, TTFT and bytes a token of every cell, predicted and measured."""
    return Table(
        "Predicted and measured",
        (
            "geometry",
            "link",
            "strategy",
            "routing",
            "budget",
            "fallbacks",
            "TPOT ms, predicted",
            "measured",
            "error",
            "TTFT ms, predicted",
            "measured",
            "error",
            "MB/token, predicted",
            "measured",
        ),
        tuple(map(_errors, cells)),
    )


def _errors(record: Record) -> tuple[str, ...]:
    record = _foretold(record)
    said, tokens, items = record.config["predicted"], total([record], "decode_tokens"), len(record.items)
    tpot = (sum(said["decode_ns"]) / tokens, total([record], "decode_ns") / tokens) if tokens else None
    ttft = (sum(said["ttft_ns"]) / items, total([record], "ttft_ns") / items) if items else None
    moved = (sum(said["decode_bytes"]) / tokens, total([record], "decode_bytes") / tokens) if tokens else None
    return (
        record.model,
        link_of(record),
        name(record),
        record.task.removesuffix(" routing"),
        record.budget,
        percent(rate_of(record)) if record.gamma is not None else "-",
        *(("-", "-") if tpot is None else (f"{each / 1e6:,.3f}" for each in tpot)),
        _signed(error(record)),
        *(("-", "-") if ttft is None else (f"{each / 1e6:,.2f}" for each in ttft)),
        _signed(error(record, "ttft_ns")),
        *(("-", "-") if moved is None else (f"{each / 1e6:,.3f}" for each in moved)),
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


def row_copy_gb_per_s(record: Record) -> float:
    """Return the GB/s (decimal) of copies of this cell's rows, one after another, by the calibrated profile."""
    card, nbytes = record.config["predicted"]["profile"], record.config["expert_nbytes"]
    return nbytes / (card["link_latency_seconds"] + nbytes / (card["link_gb_per_s"] * 1e9)) / 1e9


def closeness(cells: Sequence[Record]) -> Table:
    """Return the GB/s of on-demand decode steps and of fallbacks, as a share of the link's row copies."""
    rows = []
    for record in cells:
        ns, nbytes, use = total([record], "decode_ns"), total([record], "decode_bytes"), record.config["fallback_use"]
        if record.strategy in ("on-demand", "on-demand-overlap") and ns:
            rows.append(_near(record, "decode steps", nbytes / ns, record.strategy == "on-demand-overlap"))
        if use and use["ns"]:
            rows.append(_near(record, f"{use['passes']} fallbacks", use["nbytes"] / use["ns"], True))
    head = ("geometry", "link", "strategy", "routing", "budget", "of", "GB/s", "row copies GB/s", "of the link", "aim")
    return Table("Bytes over time", head, tuple(rows))


def _near(record: Record, of: str, gb_per_s: float, aimed: bool) -> tuple[str, ...]:
    copies = row_copy_gb_per_s(record)
    share = gb_per_s / copies
    return (
        record.model,
        link_of(record),
        name(record),
        record.task.removesuffix(" routing"),
        record.budget,
        of,
        f"{gb_per_s:.3f}",
        f"{copies:.3f}",
        percent(share),
        ("met" if share >= NEAR else "not met") if aimed else "-",
    )


def profiles(cells: Sequence[Record]) -> Table:
    """Return the numbers of each profile that was fitted."""
    said = [(link_of(record), record.config["predicted"]["profile"]) for record in cells]
    found = {(link, *card["sources"]): (link, card) for link, card in said}
    rows = tuple(
        (
            link,
            f"{card['link_gb_per_s']:.3f}",
            f"{card['link_latency_seconds'] * 1e6:.2f}",
            f"{card['memory_gb_per_s']:,.1f}",
            f"{card['launch_seconds'] * 1e6:.2f}",
            f"{card['layer_seconds'] * 1e6:,.1f}",
            f"{card['step_seconds'] * 1e6:,.1f}",
            f"{card['tflops']:.3g}",
        )
        for link, card in found.values()
    )
    head = (
        "link",
        "GB/s",
        "us a copy",
        "memory GB/s",
        "us a launch",
        "us a layer beyond",
        "us a step beyond",
        "TFLOP/s",
    )
    return Table("Profiles", head, rows)
