"""Sections on the reference cells of a synthetic run: plain Transformers, and the engine's own cost a layer."""

from __future__ import annotations

from reports.data.compare import strategy_name, tokens_per_s, total
from reports.data.results import Results
from reports.elements.page import Section, Table
from reports.tables.synthetic import fallback_rate, on_recorded_routing
from suites.record import Record

AIM_SECONDS = 60e-6  # of the engine's own time a MoE layer, beyond what no engine can do without
PLAIN = (
    "What a user would otherwise do, in the same run on synthetic weights of the same sizes: plain Transformers with "
    "everything on the device, where it fits, and with device_map offload, where accelerate moves whole layers, all of "
    "their experts, over pageable memory. Our rows are over the link as it is, on the shipped models' routing. Plain "
    "rows run random routing, which changes no byte that they move."
)
BARE = (
    "The engine's `run_experts` for one token, and a bare loop: the same kernel on the same slots, all of it "
    "resident, told beforehand which experts each layer runs. Both in one process, in turn, forwards and then "
    "backwards, of which the shorter time counts; the median over such blocks of the difference a layer, between its "
    "quartiles, is the engine's own time a layer. No engine does without one wait for the device a layer, which reads "
    "what the router chose: the bare loop with that read, less without, is the bound. The launches of a layer's "
    f"products are in both. The aim is relative to it: at most {AIM_SECONDS * 1e6:.0f} microseconds a layer beyond the "
    "bound."
)
STOCK = (
    "Whole decode steps of the engine and of the stock model, on the same weights, everything resident, in blocks of "
    "stock, ours, ours, stock, the shorter of two. No aim is set against stock: on a GPU eager experts wait for the "
    "device many times a layer, and a difference from them says little of an engine. Where it is below nothing, the "
    "engine's way to the same products is the shorter one."
)
PEERS = (
    "The same question over a disk: a checkpoint of the same sizes on the same disk, read by a program in a process of "
    "its own, on all processors, with the memory of the process and the page cache capped together where the system "
    "lets us. Their routers are random, so that no expert is likelier than another: our row on uniform routing is the "
    "like of theirs, and computes on one processor. Pages move in theirs, also under accelerate, which maps the file "
    "of a module anew each time it runs; single experts move in ours. Ours has no cap, only so many slots, "
    "and reads past the page cache. Bytes are what the disk read for the process."
)
COST = "engine against stock"
ON_DISK = "cpu+disk"
OURS = ("on-demand-overlap", "lru", "mobile")


def sections(results: Results) -> list[Section]:
    """Return the sections on reference cells; none where there are no such cells."""
    if not results.references:
        return []
    found = [
        Section("Beside plain Transformers", (PLAIN,), (plain_transformers(results),)),
        Section("Beside what a user would run instead from a disk", (PEERS,), (disk_peers(results),)),
        Section("What the engine costs a layer", *_engine(results.references)),
    ]
    return [section for section in found if any(table.rows for table in section.tables)]


def _engine(references: tuple[Record, ...]) -> tuple[tuple[str, ...], tuple[Table, ...]]:
    """Return paragraphs and tables on the engine's cost; older records lack those on the bare loop."""
    bare, stock = bare_cost(references), engine_cost(references)
    return ((BARE, STOCK), (bare, stock)) if bare.rows else ((STOCK,), (stock,))


def plain_transformers(results: Results) -> Table:
    """Return, by geometry, the rows of plain Transformers, then the engine's."""
    rows = []
    for model in dict.fromkeys(record.model for record in results.references if record.scope != ON_DISK):
        rows += [_stock_row(r) for r in results.references if r.model == model and r.strategy != COST]
        rows += [_engine_row(r) for r in on_recorded_routing(results.synthetic) if r.model == model and _comparable(r)]
    head = ("geometry", "MoE layers", "what", "device memory", "fallbacks", "TPOT ms", "tokens/s", "TTFT ms", "how")
    return Table("The same sizes with plain Transformers, and here", head, tuple(rows))


def disk_peers(results: Results) -> Table:
    """Return, by geometry, the programs that read from a disk, fastest first, the engine's strategies among them."""
    rows = []
    for model in dict.fromkeys(record.model for record in results.references if record.scope == ON_DISK):
        theirs = [r for r in results.references if r.model == model and r.strategy != COST]
        ours = [r for r in results.synthetic if r.model == model and r.strategy in OURS and not r.config["swept"]]
        ranked = sorted((*theirs, *ours), key=lambda record: -((tokens_per_s([record]) if record.items else 0) or 0))
        rows += [_disk_row(record) for record in ranked]
    head = ("geometry", "MoE layers", "what", "routing", "memory", "TPOT ms", "tokens/s", "MB/token", "how")
    return Table("From the same disk", head, tuple(rows))


def _disk_row(record: Record) -> tuple[str, ...]:
    config, tokens = record.config, total([record], "decode_tokens") if record.items else 0
    theirs = config["kind"] == "beside"
    memory = f"{record.budget}, {config['memory_cap'] or 'not run'}" if theirs else f"{record.slots:,} slots"
    return (
        record.model,
        _layers(record),
        record.strategy if theirs else f"ours: {strategy_name(record)}",
        "uniform" if theirs else record.task.removesuffix(" routing"),
        memory if theirs or record.budget == "smallest" else f"{memory}, as {record.budget} of the whole model",
        *_times(record)[:2],
        f"{total([record], 'decode_bytes') / tokens / 1e6:,.1f}" if tokens else "-",
        (config["refused"] or config["stock"] or "-") if theirs else "single experts move",
    )


def _comparable(record: Record) -> bool:
    return record.config["link_gb_per_s"] is None and record.strategy in OURS


def _layers(record: Record) -> str:
    return f"{record.config['moe_layers']} of {record.config['real_moe_layers']}"


def _times(record: Record) -> tuple[str, str, str]:
    rate = tokens_per_s([record]) if record.items else None
    if not rate:
        return "-", "-", "-"
    return f"{1000 / rate:,.2f}", f"{rate:,.2f}", f"{total([record], 'ttft_ns') / 1e6 / len(record.items):,.1f}"


def _stock_row(record: Record) -> tuple[str, ...]:
    how = record.config["refused"] or record.config["stock"] or "-"
    return (record.model, _layers(record), record.strategy, record.budget, "-", *_times(record), how)


def _engine_row(record: Record) -> tuple[str, ...]:
    rate = f"{fallback_rate(record):.1%}" if record.gamma is not None else "-"
    return (
        record.model,
        _layers(record),
        strategy_name(record),
        record.budget,
        rate,
        *_times(record),
        "single experts move",
    )


def bare_cost(references: tuple[Record, ...]) -> Table:
    """Return the engine's time a layer beyond a bare loop's, the bound, and whether the aim relative to it was met."""
    rows = []
    for record in references:
        if (cost := record.config.get("bare")) is not None:
            beyond = cost["layer_seconds"] - cost["bound_seconds"]
            rows.append(
                (
                    record.model,
                    str(cost["layers"]),
                    *(f"{cost[f'{which}_seconds'] * 1e3:,.3f}" for which in ("bare", "read", "ours")),
                    f"{cost['layer_seconds'] * 1e6:,.1f}",
                    f"{cost['low_seconds'] * 1e6:,.1f} to {cost['high_seconds'] * 1e6:,.1f}",
                    f"{cost['bound_seconds'] * 1e6:,.1f}",
                    f"{beyond * 1e6:,.1f}",
                    "met" if beyond <= AIM_SECONDS else "not met",
                )
            )
    head = (
        "geometry",
        "layers",
        "bare loop ms",
        "with a read a layer ms",
        "run_experts ms",
        "engine us a layer",
        "quartiles",
        "bound us a layer",
        "beyond the bound",
        "aim",
    )
    return Table("Everything resident: the engine against a bare loop", head, tuple(rows))


def engine_cost(references: tuple[Record, ...]) -> Table:
    """Return the engine's step time against each expert implementation of Transformers, or why one was refused."""
    rows: list[tuple[str, ...]] = []
    for record in (r for r in references if r.strategy == COST):
        if record.config["refused"]:
            rows.append((record.model, "-", "-", "-", "-", "-", record.config["refused"]))
        for cost in record.config["engine"] or ():
            rows.append(
                (
                    record.model,
                    cost["stock"],
                    str(cost["layers"]),
                    *(f"{cost[f'{which}_seconds'] * 1e3:,.3f}" for which in ("stock", "ours")),
                    f"{cost['layer_seconds'] * 1e6:,.1f}",
                    f"{cost['low_seconds'] * 1e6:,.1f} to {cost['high_seconds'] * 1e6:,.1f}",
                )
            )
    head = (
        "geometry",
        "stock experts",
        "layers",
        "stock step ms",
        "engine's step ms",
        "difference us a layer",
        "quartiles",
    )
    return Table("Everything resident: the engine against stock", head, tuple(rows))
