"""What the report says, once, for every output format."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import plots, tables
from reports.compare import accuracy, hit_rate, share, speedup
from reports.results import Results
from reports.tables import Table
from reports.verdict import RULE

PAPER = Path(__file__).parent / "paper.toml"
GAMMA_SWEEP = (
    "Each point is a threshold gamma; bars are the 95 % interval of the paired difference to full K. The square is "
    "static K/2, which never falls back."
)
FORESIGHT = (
    "Recall is the share of the experts a layer needed that had been foreseen, precision the share of the foreseen "
    "that were needed; MoBiLE foresees only when it falls back. What was fetched and not used is wasted on the link. "
    "A layer of the small model stands for several of the real one; each is foreseen as well as a recorded layer is."
)
RECALL = (
    "Recall by depth, at the fewest slots each strategy needs. Layers that nothing foresees have no point; strategies "
    "that run what they foresee, right or wrong, are left out."
)
HITS = (
    "Hit rate of the cache alone. Belady's rule knows the future and is the most that any eviction could reach; what a "
    "real rule leaves below it is the room there is."
)
TIMELINE = (
    "Three decode tokens. The link copies one expert at a time; the GPU computes or stalls. Where MoBiLE falls back, "
    "its big pass finds half of its experts in place and most of the others on their way."
)


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, tables and figures (SVG text by name)."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[tuple[str, str, str], ...] = ()  # (file name, caption, SVG)


@dataclass(frozen=True)
class Report:
    """The whole page; `alarm` is set when nothing below it can be trusted."""

    title: str
    opening: str
    alarm: str | None
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...]


def build(results: Results) -> Report:
    """The report of a run."""
    paper = tomllib.loads(PAPER.read_text())
    broken = [row[0] for row in tables.checks(results).rows if row[1] != "held"]
    leaks = [
        row for model in results.values("model") for row in tables.ceilings(results, model).rows if row[-1] != "yes"
    ]
    alarm = None
    if broken or leaks:
        what = [*broken, *(f"{row[1]} passed its bandwidth ceiling on {row[0]}" for row in leaks)]
        alarm = "Nothing below can be trusted: " + "; ".join(what) + "."
    sections: list[Section] = []
    for model in results.values("model"):
        sections += _model_sections(results, model, paper)
    sections += [_controls(results), _absent(results), _provenance(paper), _limits()]
    return Report(
        title=f"How far does MoBiLE hold? ({results.preset})",
        opening=_opening(results, paper),
        alarm=alarm,
        sections=tuple(section for section in sections if section.tables or section.paragraphs or section.figures),
        facts=_facts(results),
    )


def _opening(results: Results, paper: dict[str, Any]) -> str:
    """One paragraph for someone who has never heard of it, with this run's main numbers."""
    text = (
        "A Mixture-of-Experts language model has many small networks, its experts, and uses only a few of "
        "them for each word it writes. When the experts do not fit in a graphics card's memory they wait in "
        "main memory, and copying the chosen ones over for every token takes most of the time. MoBiLE is an "
        "idea to copy less: write each token with half of its experts, and only if the model is then unsure "
        f"of the token, write it again with all of them. Its authors report {paper['speedup']['low']:.2f} to "
        f"{paper['speedup']['high']:.2f} times the speed of plain offloading with negligible loss of accuracy."
    )
    model = results.values("model")[0]
    gamma = tables.default_gamma(results, model)
    group = results.pool(model=model, strategy="mobile", gamma=gamma, budget="smallest")
    base = tables.baselines(results, "smallest", model).get("on-demand-overlap")
    full = results.pool(model=model, strategy="resident")
    if not (group and base and full):
        return f"{text} This run lacks the cells to say how far that holds; see what is missing below."
    ratio, loss = speedup(group, base), accuracy(group, full)
    fallbacks = share(group, "fallbacks", "tokens") or 0.0
    shown = loss.within(paper["accuracy"]["margin_points"])
    says = {
        "yes": "which is within the 1 point we call negligible",
        "no": "which is more than the 1 point we call negligible",
        "not shown": "an interval too wide, or too low, to call negligible at 1 point",
    }[shown]
    return (
        f"{text} This run used a small model trained for the purpose ({model}) and a simulated "
        f"{group[0].hardware} with the sizes of {group[0].geometry}: a projection, not a measurement. In it "
        f"MoBiLE fell back on {100 * fallbacks:.1f} % of tokens, ran {ratio.value:.2f} times [{ratio.low:.2f}, "
        f"{ratio.high:.2f}] as fast as overlapped plain offloading, and its answers changed accuracy by "
        f"{loss.difference.value:+.1f} points [{loss.difference.low:+.1f}, {loss.difference.high:+.1f}] over "
        f"{loss.items} questions, {says}."
    )


def _model_sections(results: Results, model: str, paper: dict[str, Any]) -> list[Section]:
    budgets = [b for b in results.values("budget") if b != "all" and not b.endswith("%")]
    record = results.pick(model=model)[0]
    dressed = f"{model} stands for {record.geometry} on {record.hardware}"
    gamma_figure, timeline = plots.gamma_sweep(results, model), plots.token_timeline(results, model)
    return [
        Section("Verdicts", (RULE, _arithmetic(results, model)), (tables.verdicts(results, model, paper),)),
        Section(
            f"Speed: {model}",
            (
                f"{dressed}: its own routing and fallbacks, the real model's bytes, layers and memory budget, "
                "on a virtual clock. Projected, batch 1, decode only; prefill (TTFT) stands apart. A speedup "
                "is the geometric mean over prompts of the baseline's time per token over the strategy's own, "
                "with a 95 % bootstrap interval over prompts. Slots are of the real model's experts; the "
                "cache starts cold and stays warm from prompt to prompt. Plain offloading keeps nothing "
                "between tokens, so memory beyond its smallest does not help it: where a budget holds much of "
                "the model, compare with lru instead.",
            ),
            (*(tables.speed(results, model, budget) for budget in budgets),
             *(tables.speed_by_task(results, model, budget) for budget in budgets[:1]),
             tables.ceilings(results, model)),
        ),
        Section(
            f"Accuracy: {model}",
            (
                "Greedy decoding scored by lm-eval on the engine that is timed. Lossless strategies give full "
                "K's answers by construction, so three rows say all. Prefill runs all K experts in every row. "
                "The margin was fixed before the run; \"not shown\" means that the interval reaches below it.",
            ),
            (tables.accuracies(results, model, paper["accuracy"]["margin_points"]),
             tables.gammas(results, model, paper["accuracy"]["margin_points"])),
        ),
        Section(
            f"What can be foreseen: {model}",
            (FORESIGHT,),
            tuple(t for t in (*(tables.foresight(results, model, budget) for budget in budgets),
                              tables.foresight_by_layer(results, model)) if t.rows),
            (*_figure("recall_by_layer.svg", RECALL, plots.recall_by_layer(results, model)),
             *_figure("hits_by_size.svg", HITS, plots.hits_by_size(results, model))),
        ),
        Section(f"Accuracy against speed: {model}", figures=_figure("gamma_sweep.svg", GAMMA_SWEEP, gamma_figure)),
        Section(f"Where a token's time goes: {model}", figures=_figure("token_timeline.svg", TIMELINE, timeline)),
    ]  # fmt: skip


def _arithmetic(results: Results, model: str) -> str:
    """What the fallback rate alone would give, so that the share of the cache in a speedup is plain."""
    group = results.pool(model=model, strategy="mobile", gamma=tables.default_gamma(results, model), budget="smallest")
    if not group:
        return "There is no MoBiLE cell at the smallest budget."
    fallbacks, hits = share(group, "fallbacks", "tokens") or 0.0, hit_rate(group) or 0.0
    return (
        "Arithmetic to hold against the table: if loading were all of the time, nothing were kept between tokens and "
        f"every prefetch were in time, a fallback rate of {100 * fallbacks:.1f} % would give 2 / (1 + r) = "
        f"{2 / (1 + fallbacks):.2f}x. Whatever a row has beyond that is cache: MoBiLE must hold one token's little "
        f"experts, and at the smallest budget {100 * hits:.1f} % of the experts that a decode step asked for were "
        "still there. Larger budgets are mostly cache, which is why the row of lru at the same budget stands beside."
    )


def _figure(file: str, caption: str, svg: str | None) -> tuple[tuple[str, str, str], ...]:
    return ((file, caption, svg),) if svg else ()


def _controls(results: Results) -> Section:
    text = (
        "Each live run repeats its first items alone, at batch 1, under every strategy it stands for: the "
        "text must equal the batch's, and every counter of the live ledger, times included, the replayed one's."
    )
    return Section("Controls", (text,), (tables.checks(results),))


def _absent(results: Results) -> Section:
    if not results.absent:
        return Section("Failed and missing cells", ("None.",))
    return Section("Failed and missing cells", (), (Table("Cells without a record", ("cell", "why"), results.absent),))


def _provenance(paper: dict[str, Any]) -> Section:
    known = paper["known"]
    return Section(
        "Whose is what",
        tuple(
            f"{who}: {'; '.join(known[key])}."
            for who, key in (
                (f"The paper's ({paper['citation']})", "paper"), ("Reported second-hand", "secondary"),
                ("Ours", "ours"), ("Unknown to us", "unknown"),
            )
        ),
    )  # fmt: skip


def _limits() -> Section:
    return Section(
        "Limits",
        (
            "Time is computed, not measured: a discrete-event clock charges copies at the profile's bandwidth "
            "and compute by a roofline, and has not been checked against a GPU here.",
            "The model is tiny and its tasks are generated, so its fallback rate and its loss are its own. "
            "They say how the method behaves, not how a real model scores.",
            "The baseline keeps nothing between tokens; the paper does not say whether its baseline does.",
            "Each layer of the small model stands for several of the real one, so layers of a group make the "
            "same choices.",
        ),
    )


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    """What a reader needs to repeat the run; nothing that changes when it is repeated."""
    record = results.records[0]
    packages = record.environment["packages"]
    return (
        ("preset", results.preset),
        ("cells", f"{len(results.records)} recorded, {len(results.absent)} without a record"),
        ("scope", f"{record.scope}, weights {record.weights}"),
        ("code", f"{record.environment['git_commit']}{' (dirty)' if record.environment['git_dirty'] else ''}"),
        (
            "machine",
            f"{record.environment['cpu']}, {record.environment['cores']} cores, GPU {record.environment['gpu']}",
        ),
        ("packages", ", ".join(f"{name} {number}" for name, number in packages.items() if number)),
        ("time and bandwidth", "; ".join(record.config["profile_sources"])),
    )
