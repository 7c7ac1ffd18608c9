"""Overview tables: a row a family, the verdicts by claim, and the power of so many items."""

from __future__ import annotations

from typing import Any

from reports import verdict
from reports.data import groups
from reports.data.compare import accuracy, count, share, speedup, total, worst_task
from reports.data.families import answered
from reports.data.groups import BASELINES, ON_DEMAND
from reports.data.results import Results
from reports.elements.numbers import budget_name, percent, points, ratio, score
from reports.elements.page import Table
from reports.stats.intervals import Interval, wilson
from reports.stats.power import DISCORDANT, PUBLISHED, fewest_items, half_width, items_needed, power

Row = tuple[str, ...]


def families(results: Results, margin_points: float) -> Table:
    """Return one row a family: MoBiLE's effect on its accuracy and speed at its own threshold, then its setup."""
    rows, slots = [], []
    for model in results.models:
        full_k, half, mobile = answered(results, model)
        baselines = groups.baselines(results, "smallest", model)
        if not (mobile or half or baselines):
            continue  # a run whose budgets are all bytes
        record = results.select(model=model)[0]
        loss = accuracy(mobile, full_k) if count(mobile) and full_k else None
        worst = worst_task(mobile, full_k) if loss else None
        tokens = total(mobile, "decode_tokens")
        rows.append(
            (
                model,
                points(loss.difference) if loss else "-",
                loss.within(margin_points) if loss else "-",
                worst.in_words if worst else "-",
                points(accuracy(half, full_k).difference) if count(half) and full_k else "-",
                points(accuracy(mobile, half).difference) if count(half) and mobile else "-",
                percent(total(mobile, "fallbacks") / tokens) if tokens else "-",
                *(
                    ratio(speedup(mobile, baselines[base])) if mobile and base in baselines else "-"
                    for base in BASELINES
                ),
                _over_lru_at_equal_memory(results, model),
                score(wilson(total(full_k, "correct"), count(full_k))) if count(full_k) else "-",
                str(count(mobile)) if mobile else "-",
                record.geometry,
                f"{record.config['experts']} / {record.config['top_k']}",
            )
        )
        if mobile and "lru" in baselines:
            slots.append(f"{baselines['lru'][0].slots} beside {mobile[0].slots} with {model}")
    head = (
        "model",
        "MoBiLE less full K",
        f"within {margin_points:g} point",
        "worst task",
        "static K/2 less full K",
        "MoBiLE less static K/2",
        "fallbacks",
        *(f"over {base}" for base in BASELINES),
        "over lru, same memory",
        "full K %",
        "n",
        "timed as",
        "experts / K",
    )
    more = (
        f" The fewest slots of lru hold all K experts of a token, MoBiLE's half of them ({', '.join(slots)}), so that "
        "lru has more memory there; beside it both have the same."
        if slots
        else ""
    )
    note = (
        "All tasks together on the same items, the fewest slots each strategy needs; brackets are 95 % intervals. The "
        f"worst task is picked after the fact, and its interval is not widened for that.{more}"
    )
    return Table("The families at a glance", head, tuple(rows), note)


def _over_lru_at_equal_memory(results: Results, model: str) -> str:
    """Return MoBiLE's speedup over lru under the first budget of bytes that has both and does not hold the model."""
    for budget in results.budgets(model):
        mobile, lru = groups.mobile(results, model, budget), groups.baselines(results, budget, model).get("lru")
        if budget == "smallest" or not (mobile and lru) or groups.budget_holds_all(results, model, budget):
            continue
        if measured := speedup(mobile, lru):
            return f"{ratio(measured)}, {budget}"
    return "-"


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
        named = budget_name(budget, groups.budget_holds_all(results, model, budget))
        mobile, baselines = groups.mobile(results, model, budget), groups.baselines(results, budget, model)
        for baseline in ON_DEMAND:
            base = baselines.get(baseline, [])
            measured = speedup(mobile, base) if mobile and base else None
            stamp = verdict.stamp_of(mobile, base)
            outcome = verdict.speedup_verdict(measured, claim["low"], claim["high"], stamp, trusted)
            published = f"{claim['low']:.2f}x to {claim['high']:.2f}x"
            rows.append(
                ("speedup", published, model, f"over {baseline}, {named}", ratio(measured), outcome, str(stamp))
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
