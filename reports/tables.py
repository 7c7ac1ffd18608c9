"""The report's tables, as rows of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reports.compare import (
    accuracy,
    count,
    foreseen,
    hit_rate,
    name,
    share,
    speedup,
    tokens_per_s,
    total,
    wasted_bytes,
)
from reports.results import Results
from reports.stats import Interval, wilson
from reports.verdict import verdict
from suites.record import Record

FLAVOURS = ("on-demand", "on-demand-overlap")
COMPARED = (*FLAVOURS, "lru")  # caching alone, so that its share of a speedup can be told


@dataclass(frozen=True)
class Table:
    """A caption, column heads and rows, all of them text."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _ratio(interval: Interval) -> str:
    return f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def _points(interval: Interval) -> str:
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _over(records: list[Record], baseline: list[Record] | None) -> str:
    """A speedup as tables write it; a cell with no baseline has none."""
    if baseline is None:
        return "MISSING"
    return "1" if records == baseline else _ratio(speedup(records, baseline))


def rows_by_strategy(results: Results, budget: str, model: str, **wanted: Any) -> list[list[Record]]:
    """The cells of a budget, grouped by strategy and gamma in the plan's order; `resident` belongs to every budget."""
    cells = [record for record in results.pick(model=model, **wanted) if record.budget in (budget, "all")]
    kinds = dict.fromkeys((record.strategy, record.gamma, record.budget) for record in cells)
    groups = (results.pool(model=model, strategy=s, gamma=g, budget=b, **wanted) for s, g, b in kinds)
    return [group for group in groups if group]


def baselines(results: Results, budget: str, model: str, **wanted: Any) -> dict[str, list[Record]]:
    """The cells that others are compared with, of those that were recorded."""
    found = {base: results.pool(model=model, strategy=base, budget=budget, **wanted) for base in COMPARED}
    return {base: records for base, records in found.items() if records}


def speed(results: Results, model: str, budget: str) -> Table:
    """Tokens per second and speedups of every strategy at one budget, all tasks together, default gamma."""
    bases = baselines(results, budget, model)
    rows = []
    for group in rows_by_strategy(results, budget, model):
        if group[0].config["swept"]:
            continue
        tokens = total(group, "decode_tokens")
        rows.append(
            (
                name(group[0]),
                "yes" if group[0].lossless else "no",
                f"{group[0].slots:,}",
                f"{tokens_per_s(group):.1f}",
                *(_over(group, bases.get(base)) for base in COMPARED),
                f"{total(group, 'decode_bytes') / tokens / 1e9:.3f}",
                _percent(hit_rate(group)),
                _percent(share(group, "fallbacks", "tokens")) if group[0].gamma is not None else "-",
                _percent(share(group, "decode_stall_seconds", "decode_seconds")),
                f"{total(group, 'ttft_ns') / 1e6 / count(group):,.0f}",
            )
        )
    title = {"smallest": "the fewest slots each strategy needs"}.get(budget, f"a card of {budget}")
    head = ("strategy", "lossless", "slots", "tokens/s", *(f"over {base}" for base in COMPARED), "GB/token", "hits",
            "fallbacks", "stalled", "TTFT ms")  # fmt: skip
    return Table(f"Decode speed, {title}", head, tuple(rows))


def foresight(results: Results, model: str, budget: str) -> Table:
    """What strategies that load ahead foresaw, all layers and tasks together, and what it cost."""
    rows = []
    for group in rows_by_strategy(results, budget, model):
        layers = foreseen(group).values()
        if not layers or group[0].config["swept"]:
            continue
        guessed, right, needed = (sum(column) for column in zip(*layers, strict=True))
        tokens = total(group, "decode_tokens")
        rows.append(
            (
                name(group[0]),
                f"{group[0].slots:,}",
                _percent(right / needed),
                _percent(right / guessed) if guessed else "-",
                _percent(share(group, "prefetch_useful", "prefetch_loads")),
                f"{wasted_bytes(group) / tokens / 1e9:.3f}",
                _percent(hit_rate(group)),
                _percent(share(group, "decode_stall_seconds", "decode_seconds")),
            )
        )
    head = ("strategy", "slots", "recall", "precision", "fetched and used", "wasted GB/token", "hits", "stalled")
    title = {"smallest": "the fewest slots each strategy needs"}.get(budget, f"a card of {budget}")
    return Table(f"What was foreseen, {title}", head, tuple(rows))


def foresight_by_layer(results: Results, model: str) -> Table:
    """Recall and precision of each layer's guesses, at the smallest budget."""
    groups = [g for g in rows_by_strategy(results, "smallest", model) if foreseen(g) and not g[0].config["swept"]]
    seen = [foreseen(group) for group in groups]
    rows = []
    for layer in sorted({layer for layers in seen for layer in layers}):
        cells = []
        for layers in seen:
            guessed, right, needed = layers.get(layer, (0, 0, 0))
            cells.append(f"{_percent(right / needed)} / {_percent(right / guessed)}" if guessed else "-")
        rows.append((str(layer), *cells))
    return Table("Recall / precision by MoE layer", ("layer", *(name(g[0]) for g in groups)), tuple(rows))


def default_gamma(results: Results, model: str) -> float | None:
    """MoBiLE's own threshold in this run; the other gammas belong to the sweep."""
    own = [r.gamma for r in results.pick(model=model, strategy="mobile") if not r.config["swept"]]
    return own[0] if own else None


def speed_by_task(results: Results, model: str, budget: str) -> Table:
    """MoBiLE's speedup and fallback rate for each task at one budget."""
    gamma, rows = default_gamma(results, model), []
    for task in results.values("task"):
        bases = baselines(results, budget, model, task=task)
        group = results.pick(model=model, strategy="mobile", gamma=gamma, budget=budget, task=task)
        if group:
            rows.append(
                (
                    task,
                    str(len(group[0].items)),
                    f"{tokens_per_s(group):.1f}",
                    *(_over(group, bases.get(base)) for base in COMPARED),
                    _percent(share(group, "fallbacks", "tokens")),
                    f"{total(group, 'decode_tokens') / len(group[0].items):.1f}",
                )
            )
    head = ("task", "prompts", "tokens/s", *(f"over {base}" for base in COMPARED), "fallbacks", "tokens/answer")
    return Table(f"mobile by task, budget {budget}", head, tuple(rows))


def accuracies(results: Results, model: str, margin_points: float) -> Table:
    """Scores of full K, static K/2 and MoBiLE by task and pooled, each paired with full K on the same items."""
    rows = []
    for task in (*results.values("task"), None):
        wanted = {"task": task} if task else {}
        reference = results.pool(model=model, strategy="resident", **wanted)
        groups = [
            group
            for group in rows_by_strategy(results, "smallest", model, **wanted)
            if (group[0].strategy == "resident" or not group[0].lossless) and not group[0].config["swept"]
        ]
        for group in groups if reference else []:
            rows.append((task or "all tasks", *_score(group, reference, margin_points)))
    return Table("Accuracy on the same items", ("task", *_score_head(margin_points)), tuple(rows))


def gammas(results: Results, model: str, margin_points: float) -> Table:
    """Every gamma that was run, all tasks pooled, at the smallest budget: what its fallbacks cost and win back."""
    reference = results.pool(model=model, strategy="resident")
    base = baselines(results, "smallest", model).get("on-demand-overlap")
    found = results.pick(model=model, strategy="mobile", budget="smallest")
    rows = []
    for gamma in sorted({record.gamma for record in found if record.gamma is not None}):
        group = results.pool(model=model, strategy="mobile", budget="smallest", gamma=gamma)
        if group and reference:
            rows.append((*_score(group, reference, margin_points), _over(group, base)))
    head = (*_score_head(margin_points), "over on-demand-overlap")
    return Table("Sweep over gamma, all tasks, smallest budget", head, tuple(rows))


def _score_head(margin_points: float) -> tuple[str, ...]:
    return ("strategy", "n", "score %", "difference to full K", "lost / gained", "McNemar p",
            f"within {margin_points:g} point", "fallbacks")  # fmt: skip


def _score(group: list[Record], reference: list[Record], margin_points: float) -> tuple[str, ...]:
    """One strategy's score and what the pairing with full K says."""
    items = count(group)
    score = wilson(total(group, "correct"), items)
    own = (str(items), f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]")
    if group[0].strategy == "resident":
        return ("full K", *own, "-", "-", "-", "-", "-")
    against = accuracy(group, reference)
    return (
        name(group[0]),
        *own,
        _points(against.difference),
        f"{against.lost} / {against.gained}",
        f"{against.p_value:.3f}",
        against.within(margin_points),
        "-" if group[0].gamma is None else _percent(share(group, "fallbacks", "tokens")),
    )


def verdicts(results: Results, model: str, paper: dict[str, Any]) -> Table:
    """The paper's speedup band against ours, for each budget and baseline flavour."""
    gamma, rows = default_gamma(results, model), []
    band = paper["speedup"]
    for budget in (b for b in results.values("budget") if b != "all" and not b.endswith("%")):
        group = results.pool(model=model, strategy="mobile", gamma=gamma, budget=budget)
        bases = baselines(results, budget, model)
        for flavour in FLAVOURS:
            measured = speedup(group, bases[flavour]) if group and flavour in bases else None
            scope, weights = (group[0].scope, group[0].weights) if group else ("-", "-")
            rows.append(
                (
                    f"{band['low']:.2f}x to {band['high']:.2f}x",
                    f"over {flavour}, {budget}",
                    _ratio(measured) if measured else "-",
                    _ratio(speedup(bases["lru"], bases[flavour])) if "lru" in bases and flavour in bases else "-",
                    verdict(measured, band["low"], band["high"], scope, weights),
                    f"{scope}, {weights}",
                )
            )
    return Table(
        "Verdicts", ("published", "MoBiLE here", "speedup", "caching alone (lru)", "verdict", "scope"), tuple(rows)
    )


def ceilings(results: Results, model: str) -> Table:
    """On-demand against the bandwidth bound that no cache-less engine can pass."""
    rows = []
    for record in [r for r in results.pick(model=model) if r.strategy in FLAVOURS and r.budget == "smallest"]:
        rate = tokens_per_s([record])
        assert record.ceiling_tokens_per_s is not None
        rows.append(
            (
                record.task,
                record.strategy,
                f"{rate:.2f}",
                f"{record.ceiling_tokens_per_s:.2f}",
                _percent(rate / record.ceiling_tokens_per_s),
                "yes" if rate <= record.ceiling_tokens_per_s else "NO: caching leaked in",
            )
        )
    head = ("task", "strategy", "tokens/s", "ceiling", "of the ceiling", "below")
    return Table("On-demand against its bandwidth ceiling", head, tuple(rows))


def checks(results: Results) -> Table:
    """Every check the live runs made of themselves, and whether all of them held."""
    seen: dict[str, list[bool]] = {}
    for record in results.records:
        for check, held in record.checks.items():
            seen.setdefault(check, []).append(held)
    rows = tuple((check, "held" if all(held) else "BROKEN") for check, held in sorted(seen.items()))
    return Table("Checks made during the run", ("check", "result"), rows)
