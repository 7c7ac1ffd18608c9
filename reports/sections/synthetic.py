"""The chapters of synthetic cells, which played a script on a real geometry with synthetic weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from reports import verdict
from reports.data.results import Results
from reports.elements.numbers import bare_ratio, percent
from reports.elements.page import Section
from reports.plots import fallback_rate
from reports.sections import verdicts
from reports.stats.intervals import Interval
from reports.tables import synthetic as tables
from suites.record import Record

METHOD = (
    "Stock classes of the real sizes with made-up weights: nothing is answered, so nothing is scored, and no number "
    "here is set against the paper. Routers and the head compute what trained ones compute, on inputs that a script "
    "gives them, so that each layer chooses the script's experts and the little pass is sure or not where the script "
    "says. Every strategy plays the same scripts, one a repeat, teacher-forced, batch 1, on its real code. Recorded "
    "scripts are routing and confidence of the shipped model on its test items, each of its layers standing for an "
    "equal share of the real ones; there MoBiLE's prediction is as good as it was when it was recorded. In scripts "
    "drawn from a distribution every prediction is right."
)
IN_TURN = (
    "Over a disk the experts lie in a file, and rows of it are read past the page cache into a few slots of memory; "
    "one core computes while another one reads. Every cell plays the first script, then every cell the second in the "
    "opposite order, and so on, each from cold slots: whatever else the machine does hurts all alike. A disk that "
    "others use is not steady; the intervals say how far that reaches."
)
READING = (
    "A speedup is the geometric mean over repeats of the baseline's time per token over the strategy's own on the "
    "same script, with a 95 % interval from a bootstrap over repeats. Prefill (TTFT) is timed apart. The first steps "
    "of each repeat are not counted. TPOT is of forward passes alone, the engine's two for a token that falls back: "
    "what generate() itself adds to a token on the host, its checks, choice of the token and streamer, is not in it. "
    "The ceiling is what no engine can pass that keeps nothing between tokens: bytes of a token's experts over the "
    "bandwidth of the copies as they were timed. A link is slowed by copying more behind each expert; the bytes shown "
    "are the experts' own."
)
CHECKS = (
    "Each cell holds what it did against its script: how many tokens were decoded, how many of them fell back, and, "
    "for strategies that keep nothing, that exactly the script's experts were copied. There is no canary: nothing is "
    "answered, and a router that obeys a script cannot be scrambled."
)
DISK, THROTTLED = "cpu+disk", "gpu+throttled"
NEAR = 0.03  # by which the rate of copies may miss the one asked for before the page says so
LIMITS = (
    "Synthetic weights say how fast, never how well: fallback rates are the shipped small models' "
    "or ours to state, and layers that one small layer stands for make the same choices.",
)


def opening(results: Results) -> str:
    """Return the sentences of a page's opening on a run's synthetic cells."""
    models = len({record.model for record in results.synthetic})
    scopes = "; ".join(dict.fromkeys(str(verdict.stamp_of([record])) for record in results.synthetic))
    measured = "".join(f" {sentence}" for sentence in _measured(results))
    return (
        f"This run timed {models} {'geometry' if models == 1 else 'geometries'} of real models with synthetic weights "
        f"({scopes}), which says how fast offloading is at these sizes, and nothing of accuracy.{measured}"
    )


def _over_a_disk(results: Results) -> Iterator[tuple[Record, Interval]]:
    """Yield MoBiLE's cell of each geometry over a disk, and its speedup over overlapped plain offloading."""
    for record in tables.on_recorded_routing(results.synthetic):
        if record.scope == DISK and record.strategy == "mobile" and record.budget == "smallest":
            others = [other for other in results.synthetic if other.model == record.model]
            if faster := tables.speedup_over(others, record, "on-demand-overlap"):
                yield record, faster


def _measured(results: Results) -> Iterator[str]:
    """Yield a sentence on each geometry over a disk: MoBiLE beside overlapped plain offloading, in real time."""
    for record, faster in _over_a_disk(results):
        made, real = record.config["moe_layers"], record.config["real_moe_layers"]
        share = "" if made == real else f", {made} of its {real} layers"
        yield (
            f"Measured: over this machine's disk, with experts of the size of {record.model}{share}, MoBiLE "
            f"ran {bare_ratio(faster)} times as fast as overlapped plain offloading, where "
            f"{percent(tables.fallback_rate(record))} of tokens fell back."
        )


def sections(results: Results, paper: dict[str, Any], trusted: bool) -> list[Section]:
    """Return an overview, the verdicts and a chapter a geometry; nothing for a run without synthetic cells."""
    if not results.synthetic:
        return []
    scopes = {record.scope for record in results.synthetic}
    measured = scopes != {"cpu+virtual"}
    models = dict.fromkeys(record.model for record in results.synthetic)
    by_model = {model: [record for record in results.synthetic if record.model == model] for model in models}
    rows = tuple(row for cells in by_model.values() for row in tables.verdicts(cells, paper["speedup"], trusted).rows)
    judged = tables.verdicts([], paper["speedup"], trusted)
    return [
        Section(
            "Measured: wall-clock speed of the real sizes" if measured else "The real sizes, on the virtual clock",
            (METHOD, *((IN_TURN,) if DISK in scopes else ())),
            (tables.families(list(results.synthetic)),),
        ),
        verdicts.section(
            "Beside the published band", replace(judged, rows=rows), level=3, folded=True, rule=not results.records
        ),
        *(section for cells in by_model.values() for section in _geometry_sections(cells, paper)),
    ]


def _geometry_sections(records: list[Record], paper: dict[str, Any]) -> list[Section]:
    first = records[0]
    drawn = fallback_rate.speedups(records, paper["speedup"])
    parts = [
        Section(
            f"{first.model}, synthetic: speed",
            (READING,),
            tuple(t for link in tables.links(records) if (t := tables.by_link(records, link)).rows),
            level=3,
        ),
        Section(
            f"{first.model}, synthetic: the fallback rate",
            (),
            (tables.by_fallback_rate(records),),
            (drawn,) if drawn else (),
            level=3,
        ),
        Section(f"{first.model}, synthetic: other routing", (), (tables.by_routing(records),), level=3, folded=True),
    ]
    return [Section(f"{first.model}, synthetic", (_conditions(records),)), *(part for part in parts if not part.empty)]


def _conditions(records: list[Record]) -> str:
    config = records[0].config
    scopes = ", ".join(dict.fromkeys(record.scope for record in records))
    made, real = config["moe_layers"], config["real_moe_layers"]
    few = (
        ""
        if made == real
        else " Times, tokens per second and ceilings are of the layers made, and a memory budget holds the share of "
        "their experts that it would hold of the real model's."
    )
    other = "".join(f" {sentence}" for sentence in dict.fromkeys(_shortfalls(records)))
    narrow = "" if config["shrink"] == 1 else f" Every width was divided by {config['shrink']}: this is a test."
    return (
        f"{records[0].geometry} (synthetic) on {_machine(records[0])}, {scopes}: {made} of {real} MoE layers, "
        f"{config['experts']} experts of {config['expert_nbytes']:,} bytes, K = {config['top_k']}, {config['dtype']}. "
        f"{config['repeats']} repeats of {config['prompt_tokens']} prompt tokens, {config['warmup_tokens']} decode "
        f"steps not counted and {config['decode_tokens']} counted. {_where(records[0])}{few}{narrow}{other}"
    )


def _machine(record: Record) -> str:
    """Return what computed: over a disk this machine's processor, whatever card budgets are taken from."""
    return str(record.environment["cpu"]) if record.scope == DISK else record.hardware


def _where(record: Record) -> str:
    """Return where the experts lie, and how they are read from there."""
    if record.scope != DISK:
        return "Experts lie in host memory."
    past = "past" if record.config["link_direct"] else "through"
    depths = "/".join(map(str, dict.fromkeys(record.config["link_depth"])))
    return f"Experts lie in a file and are read {past} the page cache, {depths} at once."


def _off_the_link_asked_for(config: dict[str, Any]) -> str | None:
    """Return a sentence where copies came at another rate than the cell asked for, by more than `NEAR`."""
    asked, measured = config["link_gb_per_s"], config["link_measured_gb_per_s"]
    if asked is None or measured is None or abs(measured / asked - 1) <= NEAR:
        return None
    return f"Copies came at {measured:.1f} GB/s where {asked:g} were asked for."


def _shortfalls(records: list[Record]) -> Iterator[str]:
    """Yield a sentence wherever the machine was less than a cell asked for and was accepted."""
    for record in records:
        config = record.config
        if config["link_gb_per_s"] is not None and config.get("link_throttled") is False:
            yield (
                f"The link carries {config['link_native_gb_per_s']:.1f} GB/s by itself, which was taken as the "
                f"{config['link_gb_per_s']:g} asked for."
            )
        if record.scope == THROTTLED and (off := _off_the_link_asked_for(config)) is not None:
            yield off
        if config.get("link_page_locked") is False:
            yield "The driver did not page-lock the host memory: copies read ordinary memory, which is slower."
        had, asked = config.get("memory_nbytes"), config.get("memory_asked_nbytes")
        if had is not None and asked is not None and had < asked:
            yield f"A budget of {record.budget} was all that the card has, {had / 2**30:.2f} GiB."
