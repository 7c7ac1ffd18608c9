"""Sections on the virtual clock against the wall clock.

They hold the times that a calibrated profile predicts for timed cells, and how near to the link's rate these came.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from reports.data.compare import total
from reports.data.groups import memory
from reports.data.results import Results, strategy_and_rows
from reports.elements.numbers import percent
from reports.elements.page import Section, Table
from reports.tables.synthetic import fallback_rate, link_title
from suites.record import Record

TPOT_AIM = 0.05  # of TPOT
OWN = "predicted_at_own_rates"
LINK_AIM = 0.95  # of the most that a schedule can use of the link
CLOCK = (
    "The machine was calibrated at the start of the run: copies over the link, kernels, and decode steps with "
    "everything resident were timed, and a hardware profile was fitted to them, one for each speed of the link. Then "
    "the same scripts were replayed, with as many slots, under the same strategy, on the virtual clock of that "
    "profile. No number of a cell went into the profile it is predicted by. An error is predicted over measured, less "
    f"one; the aim is {TPOT_AIM:.0%} of TPOT. Where it is larger, projections of virtual time are that far off too."
)
DISK = (
    "Over a disk, the link's rate in a prediction is that at which rows were read right before and after each script, "
    "with nothing else to do, since a disk that others use has no one rate: here {low:.2f} to {high:.2f} GB/s. The "
    "column at its own rates takes the rate at which the rows of that very script came instead. Between the two "
    "columns lies what the disk did meanwhile; what is left in the second one is the processor: kernels beside reads, "
    "beside whatever else ran on this machine, and the engine's own code."
)
PACED = "The link of these cells is a thread that sleeps: their errors say that the path works, and nothing of a GPU."
LINK = (
    "Bytes that decode steps copied, over the time they took, against the rate of row copies that follow on one "
    "another, as it was calibrated. A fallback is timed from the moment its token is found unsure to the end of its "
    "last copy. No schedule keeps a link busy all the time: a layer's experts are known after its attention and its "
    "router, the last one to come is computed when no copy is left, and a fallback asks the routers first; plain "
    "on-demand loading computes every expert between copies. The bound is the share of the time that is left for "
    "copies, by the profile that was fitted to this machine, which counts the engine's own code and that of the "
    "model; the faster the link, the lower it is. It is the schedule that the clock plays: of fallbacks, on the same "
    "scripts with as many slots. "
    f"The aim is relative to it: {LINK_AIM:.0%} of the bound, for on-demand-overlap and for fallbacks. What the engine "
    "itself costs is measured elsewhere, against a bare loop."
)


def sections(results: Results) -> list[Section]:
    """Return the sections on the clock; none where no cell was predicted."""
    cells = [record for record in results.scripted if record.config.get("predicted")]
    unpredicted = tuple(_unpredicted(record) for record in results.scripted if record.config.get("unpredicted"))
    if not cells:
        return [Section("Virtual clock against wall clock", unpredicted)] if unpredicted else []
    paced = (PACED,) if any(record.scope == "cpu+paced" for record in cells) else ()
    found_sections = [
        Section(
            "Virtual clock against wall clock",
            (CLOCK, *_on_disk(cells), _summary(cells), *paced, *unpredicted),
            (errors_at_a_glance(cells), predicted_and_measured(cells)),
        )
    ]
    uses = link_use(cells)
    if uses.rows:
        found_sections.append(Section("How near the link", (LINK, *paced), (uses,)))
    sources = dict.fromkeys(source for record in cells for source in record.config["predicted"]["profile"]["sources"])
    found_sections.append(Section("The calibrated machine", tuple(sources), (profiles(cells),), level=3, folded=True))
    return found_sections


def _unpredicted(record: Record) -> str:
    where = f"{record.model}, {strategy_and_rows(record)}, {record.task}, {record.budget}, {link_title(record)}"
    return f"Measured and not predicted: {where} ({record.config['unpredicted']})"


def _on_disk(cells: Sequence[Record]) -> tuple[str, ...]:
    """Return a paragraph on the disk's rates, if cells were read from one."""
    rates = [rate for record in cells for rate in record.config.get("disk_gb_per_s", ())]
    if not rates:
        return ()
    return (DISK.format(low=min(rates), high=max(rates)),)


def errors_at_a_glance(cells: Sequence[Record]) -> Table:
    """Return a row for each way to predict: how many cells, and the size of their errors of TPOT."""
    rows = []
    beside = any(record.config.get("disk_gb_per_s") for record in cells)
    usual = "as measured beside the cell" if beside else "as calibrated"
    for rate, prediction in ((usual, "predicted"), ("at which the cell's rows came", OWN)):
        errors = [relative_error(record, prediction=prediction) for record in cells if record.config.get(prediction)]
        sizes = [abs(error) for error in errors if error is not None]
        if sizes:
            within = f"{sum(size <= TPOT_AIM for size in sizes)} of {len(sizes)}"
            rows.append((rate, percent(median(sizes)), percent(max(sizes)), within))
    head = ("the link's rate in the prediction", "median error", "worst", f"within {TPOT_AIM:.0%}")
    return Table("The virtual clock's error of TPOT", head, tuple(rows))


def relative_error(record: Record, field: str = "decode_ns", prediction: str = "predicted") -> float | None:
    """Return predicted over measured time less one; None where nothing was measured."""
    measured = total([record], field)
    return sum(record.config[prediction][field]) / measured - 1 if measured else None


def _summary(cells: Sequence[Record]) -> str:
    found = [(abs(value), record) for record in cells if (value := relative_error(record)) is not None]
    if not found:
        return "No cell decoded anything."
    sizes = [size for size, _ in found]
    worst, record = max(found, key=lambda pair: pair[0])
    return (
        f"TPOT of {len(found)} cells: the median error is {percent(median(sizes))}, the worst {percent(worst)} "
        f"({record.model}, {strategy_and_rows(record)}, {record.task}, {record.budget}, {link_title(record)}); "
        f"{sum(size <= TPOT_AIM for size in sizes)} lie within {TPOT_AIM:.0%}."
    )


def predicted_and_measured(cells: Sequence[Record]) -> Table:
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
            "at its own rates",
            "TTFT ms, predicted",
            "measured",
            "error",
            "MB/token, predicted",
            "measured",
        ),
        tuple(map(_error_row, cells)),
    )


def _error_row(record: Record) -> tuple[str, ...]:
    predicted, tokens, items = record.config["predicted"], total([record], "decode_tokens"), len(record.items)
    tpot = (sum(predicted["decode_ns"]) / tokens, total([record], "decode_ns") / tokens) if tokens else None
    ttft = (sum(predicted["ttft_ns"]) / items, total([record], "ttft_ns") / items) if items else None
    moved = (sum(predicted["decode_bytes"]) / tokens, total([record], "decode_bytes") / tokens) if tokens else None
    return (
        record.model,
        link_title(record),
        strategy_and_rows(record),
        record.task.removesuffix(" routing"),
        memory(record),
        percent(fallback_rate(record)) if record.gamma is not None else "-",
        *(("-", "-") if tpot is None else (f"{each / 1e6:,.3f}" for each in tpot)),
        _signed(relative_error(record)),
        _signed(relative_error(record, prediction=OWN) if record.config.get(OWN) else None),
        *(("-", "-") if ttft is None else (f"{each / 1e6:,.2f}" for each in ttft)),
        _signed(relative_error(record, "ttft_ns")),
        *(("-", "-") if moved is None else (f"{each / 1e6:,.3f}" for each in moved)),
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} %"


def row_copy_gb_per_s(record: Record) -> float:
    """Return the GB/s (decimal) of copies of this cell's rows, one after another: measured around it, or calibrated."""
    if rates := record.config.get("disk_gb_per_s"):
        return fmean(rates)
    profile, nbytes = record.config["predicted"]["profile"], record.config["expert_nbytes"]
    return nbytes / (profile["link_latency_seconds"] + nbytes / (profile["link_gb_per_s"] * 1e9)) / 1e9


def link_use(cells: Sequence[Record]) -> Table:
    """Return the GB/s of on-demand decode steps and of fallbacks, as a share of the link's row copies and its bound."""
    rows = []
    for record in cells:
        ns, nbytes, use = total([record], "decode_ns"), total([record], "decode_bytes"), record.config["fallback_use"]
        if record.strategy in ("on-demand", "on-demand-overlap") and ns:
            rows.append(_link_use_row(record, "decode", nbytes / ns, record.strategy == "on-demand-overlap"))
        if use and use["ns"]:
            rows.append(_link_use_row(record, "fallback", use["nbytes"] / use["ns"], True))
    head = (
        "geometry",
        "link",
        "strategy",
        "routing",
        "budget",
        "of",
        "GB/s",
        "row copies GB/s",
        "of the link",
        "us a layer without a copy",
        "bound",
        "of the bound",
        "aim",
    )
    return Table("Bytes over time", head, tuple(rows))


def _link_use_row(record: Record, part: str, gb_per_s: float, aimed: bool) -> tuple[str, ...]:
    """Return the row of decode steps ("decode") or fallbacks ("fallback"); the bound is unknown in older records."""
    copies = row_copy_gb_per_s(record)
    share, bounds = gb_per_s / copies, record.config.get("link_bound") or {}
    bound = bounds.get(part)
    of = "decode steps" if part == "decode" else f"{record.config['fallback_use']['passes']} fallbacks"
    return (
        record.model,
        link_title(record),
        strategy_and_rows(record),
        record.task.removesuffix(" routing"),
        memory(record),
        of,
        f"{gb_per_s:.3f}",
        f"{copies:.3f}",
        percent(share),
        f"{bounds['layer_ns'] / 1e3:,.1f}" if bound and part == "decode" else "-",
        percent(bound) if bound else "-",
        percent(share / bound) if bound else "-",
        ("met" if share >= LINK_AIM * bound else "not met") if aimed and bound else "-",
    )


def profiles(cells: Sequence[Record]) -> Table:
    """Return the numbers of each profile that was fitted."""
    predicted = [(link_title(record), record.config["predicted"]["profile"]) for record in cells]
    found = {(link, *profile["sources"]): (link, profile) for link, profile in predicted}
    # Of a host that runs ahead of its device; a layer's and a step's own code is then the host's.
    ahead = any(profile.get("host_launch_seconds", 0.0) for _, profile in found.values())

    def micro(profile: dict[str, Any], *names: str) -> str:
        return f"{sum(profile.get(name, 0.0) for name in names) * 1e6:,.1f}"

    rows = tuple(
        (
            link,
            f"{profile['link_gb_per_s']:.3f}",
            f"{profile['link_latency_seconds'] * 1e6:.2f}",
            f"{profile['memory_gb_per_s']:,.1f}",
            f"{profile['launch_seconds'] * 1e6:.2f}",
            *(micro(profile, f"host_{name}_seconds") for name in ("launch", "copy", "read") if ahead),
            micro(profile, "layer_seconds", "host_layer_seconds"),
            micro(profile, "step_seconds", "host_step_seconds"),
            f"{profile['tflops']:.3g}",
        )
        for link, profile in found.values()
    )
    head = (
        "link",
        "GB/s",
        "us a copy",
        "memory GB/s",
        "us a launch",
        *(("host, us a launch", "host, us a copy", "host, us a read") if ahead else ()),
        "us a layer beyond",
        "us a step beyond",
        "TFLOP/s",
    )
    return Table("Profiles", head, rows)
