"""Overview tables: a row a family, the verdicts by claim, and the power of so many items."""

from __future__ import annotations

from typing import Any

from reports import verdict
from reports.data import groups
from reports.data.compare import accuracy, count, share, speedup
from reports.data.groups import ON_DEMAND
from reports.data.results import Results
from reports.elements.numbers import percent, points, ratio, score
from reports.elements.page import Table
from reports.stats.intervals import Interval
from reports.stats.power import DISCORDANT, PUBLISHED, fewest_items, half_width, items_needed, power
from reports.tables.scores import full_score

Row = tuple[str, ...]


def families(results: Results, margin_points: float) -> Table:
    """Return one row a family: MoBiLE's effect on its accuracy and speed at its own threshold."""
    rows = []
    for model in results.models:
        full_k, mobile = groups.full_k(results, model), groups.mobile(results, model)
        static_half = results.select_complete(model=model, strategy="static-half", budget="smallest")
        baselines = groups.baselines(results, "smallest", model)
        if not (mobile or static_half or baselines):
            continue  # a run whose budgets are all bytes
        record = results.select(model=model)[0]
        scored = full_score(results, model)
        loss = accuracy(mobile, full_k) if mobile and full_k else None
        rows.append(
            (
                model,
                record.geometry,
                f"{record.config['experts']} / {record.config['top_k']}",
                str(count(mobile)) if mobile else "-",
                score(scored) if scored else "-",
                points(accuracy(static_half, full_k).difference) if static_half and full_k else "-",
                points(loss.difference) if loss else "-",
                loss.within(margin_points) if loss else "-",
                percent(share(mobile, "fallbacks", "tokens")) if mobile else "-",
                *(
                    ratio(speedup(mobile, baselines[base])) if mobile and base in baselines else "-"
                    for base in ON_DEMAND
                ),
            )
        )
    head = (
        "model",
        "timed as",
        "experts / K",
        "n",
        "full K %",
        "static K/2 less full K",
        "MoBiLE less full K",
        f"within {margin_points:g} point",
        "fallbacks",
        *(f"over {base}" for base in ON_DEMAND),
    )
    note = "All tasks together, the fewest slots each strategy needs; brackets are 95 % intervals."
    return Table("The families at a glance", head, tuple(rows), note)


def verdicts(results: Results, paper: dict[str, Any], trusted: bool) -> Table:
    """Return the verdict on every published claim for every family; `trusted` is False where a control is broken."""
    rows = [row for model in results.models for row in _speed_rows(results, model, paper["speedup"], trusted)]
    rows += [_accuracy_row(results, model, paper["accuracy"], trusted) for model in results.models]
    rows += [_loading_row(results, model, paper["loading"], trusted) for model in results.models]
    head = ("claim", "published", "model", "here", "value", "verdict", "scope")
    return Table("Verdicts, claim by claim", head, tuple(rows))


def _speed_rows(results: Results, model: str, claim: dict[str, Any], trusted: bool) -> list[Row]:
    """Return rows over both on-demand baselines at every budget, since the paper does not say which it means."""
    rows: list[Row] = []
    for budget in results.budgets(model):
        mobile, baselines = groups.mobile(results, model, budget), groups.baselines(results, budget, model)
        for baseline in ON_DEMAND:
            base = baselines.get(baseline, [])
            measured = speedup(mobile, base) if mobile and base else None
            stamp = verdict.stamp_of(mobile, base)
            outcome = verdict.speedup_verdict(measured, claim["low"], claim["high"], stamp, trusted)
            published = f"{claim['low']:.2f}x to {claim['high']:.2f}x"
            rows.append(
                ("speedup", published, model, f"over {baseline}, {budget}", ratio(measured), outcome, str(stamp))
            )
    return rows


def _accuracy_row(results: Results, model: str, claim: dict[str, Any], trusted: bool) -> Row:
    mobile, full_k = groups.mobile(results, model), groups.full_k(results, model)
    measured = accuracy(mobile, full_k) if mobile and full_k else None
    stamp = verdict.stamp_of(mobile, full_k)
    outcome = verdict.accuracy_verdict(measured, claim["margin_points"], stamp, trusted)
    here = f"within {claim['margin_points']:g} point of full K, all tasks"
    return (
        "accuracy",
        "negligible loss",
        model,
        here,
        points(measured.difference) if measured else "-",
        outcome,
        str(stamp),
    )


def _loading_row(results: Results, model: str, claim: dict[str, Any], trusted: bool) -> Row:
    """Return the row on the share of decode time that plain offloading waits for the link; it has no interval."""
    base = groups.baselines(results, "smallest", model).get("on-demand", [])
    stalled = share(base, "decode_stall_seconds", "decode_seconds") if base else None
    stamp = verdict.stamp_of(base)
    measured = None if stalled is None else Interval(stalled, stalled, stalled)
    outcome = verdict.speedup_verdict(measured, claim["low"], 1.0, stamp, trusted)
    published = f"over {100 * claim['low']:g} % of latency"
    return ("loading", published, model, "stalled on the link, on-demand", percent(stalled), outcome, str(stamp))


def power_of_items(results: Results, margin_points: float) -> Table:
    """Return half width and power of a paired comparison, for the paper's item counts and for those of this run."""
    here: dict[int, str] = {}
    for model in results.models:
        per_task = {len(record.items) for record in groups.full_k(results, model)}
        here |= dict.fromkeys(per_task, f"one task here ({model})")
        here[count(groups.full_k(results, model))] = f"all tasks here ({model})"
    sizes = [*PUBLISHED, *((label, size) for size, label in sorted(here.items()) if size)]
    rows = [
        (
            label,
            f"{size:,}",
            *(f"±{half_width(size, d):.1f} / {100 * power(size, d, margin_points):.0f} %" for d in DISCORDANT),
        )
        for label, size in sizes
    ]
    rows.append(("items that 80 % takes", "", *(f"about {items_needed(d, margin_points):,}" for d in DISCORDANT)))
    head = ("items", "n", *(f"{100 * d:g} % discordant" for d in DISCORDANT))
    note = (
        "Half of the 95 % interval of the paired difference in points / probability that the interval clears "
        f"{margin_points:g} point if there is no difference at all. HumanEval alone cannot show {margin_points:g} "
        f"point: its interval is wider than that whatever comes out, and only a lucky gain clears it. Fewer than "
        f"{fewest_items(margin_points)} items cannot even when not one answer differs."
    )
    return Table("What so many items can show", head, tuple(rows), note)
