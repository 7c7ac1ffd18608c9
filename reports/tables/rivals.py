"""Table of MoBiLE beside the fastest strategy that answers as full K does, at every memory budget."""

from __future__ import annotations

from collections.abc import Sequence

from reports.data import groups
from reports.data.compare import speedup, strategy_name
from reports.data.groups import Group
from reports.data.results import Results
from reports.elements.numbers import budget_name, ratio
from reports.elements.page import Table
from reports.stats.intervals import Interval

BASE = "on-demand-overlap"
UNDECIDED = "not shown"


def fastest_lossless(results: Results, model: str, budget: str) -> Group:
    """Return the fastest strategy of a budget that loses nothing, knows no future and is not resident; [] if none."""
    base = groups.baselines(results, budget, model).get(BASE)
    if base is None:
        return []
    able = [
        group
        for group in groups.unswept(results, budget, model)
        if group[0].lossless and group[0].strategy != "resident" and not groups.knows_future(group[0])
    ]
    timed = [(measured.value, group) for group in able if (measured := speedup(group, base))]
    return max(timed, key=lambda pair: pair[0])[1] if timed else []


def beside_lossless(results: Results) -> Table:
    """Return a row a family and budget: the fastest that loses nothing, MoBiLE over it, and which is the faster."""
    rows = []
    for model in results.models:
        for budget in results.budgets(model):
            mobile, rival = groups.mobile(results, model, budget), fastest_lossless(results, model, budget)
            over = speedup(mobile, rival) if mobile and rival else None
            if over is None:
                continue
            base = groups.baselines(results, budget, model)[BASE]
            name = strategy_name(rival[0])
            rows.append(
                (
                    model,
                    budget_name(budget, groups.budget_holds_all(results, model, budget)),
                    name,
                    ratio(over),
                    faster(over, name),
                    ratio(speedup(rival, base)),
                    ratio(speedup(mobile, base)),
                    "; ".join(dict.fromkeys(record.hardware for record in (*mobile, *rival))),
                )
            )
    head = (
        "model",
        "memory",
        "fastest that answers as full K",
        "MoBiLE over it",
        "faster",
        f"it over {BASE}",
        f"MoBiLE over {BASE}",
        "hardware",
    )
    note = "The fastest is picked on the prompts that it is shown on, which flatters it."
    return Table("MoBiLE beside the fastest that loses nothing", head, tuple(rows), note)


def faster(over: Interval, rival: str) -> str:
    """Return which is the faster where the interval of MoBiLE's speed over the rival's says so."""
    return "MoBiLE" if over.low > 1 else rival if over.high < 1 else UNDECIDED


def in_words(rows: Sequence[tuple[str, ...]]) -> str:
    """Return in a sentence which is the faster in which cases, from rows of `beside_lossless`; empty without any."""
    if not rows:
        return ""
    cases: dict[tuple[str, str], list[str]] = {}
    for model, memory, rival, _, which, *_ in rows:
        outcome = f"{rival} is faster"
        if which != rival:
            outcome = f"MoBiLE is faster than {rival}" if which == "MoBiLE" else f"{rival} is not shown to be faster"
        cases.setdefault((outcome, "the fewest slots each needs" if memory == "smallest" else memory), []).append(model)
    found = (f"{outcome} with {memory} ({', '.join(models)})" for (outcome, memory), models in cases.items())
    hardware = ", ".join(dict.fromkeys(row[-1] for row in rows))
    return f"On {hardware}, beside the fastest strategy that answers as full K does: {'; '.join(found)}."
