"""Strategies of a run that are not among those shipped here: a user's own, or a user's composition of ours.

The names stand here as well as in the project's entry points, since a report reads records and imports no strategy.
"""

from __future__ import annotations

from reports.data import groups
from reports.data.groups import Group
from reports.data.results import Results

SHIPPED = frozenset(
    (
        "activation-trace",
        "adapmoe",
        "belady",
        "cache-prior",
        "cpu-hybrid",
        "drop-cold",
        "fate",
        "least-stale",
        "lfu",
        "lru",
        "mobile",
        "mobile-cached",
        "next-gate",
        "on-demand",
        "on-demand-overlap",
        "oracle-prefetch",
        "pre-gated",
        "resident",
        "ser",
        "speculating-experts",
        "speculating-experts-verify",
        "static-half",
        "trained-predictor",
    )
)
PRESETS = frozenset(("accuracy", "cpu", "disk", "measured", "paper", "past", "past_measured", "shapes", "smoke"))


def is_own(strategy: str, preset: str) -> bool:
    """Return whether a strategy is not shipped, or was composed for a preset that is not."""
    parts = strategy.split("+")
    return not SHIPPED.issuperset(parts) or (len(parts) > 1 and preset not in PRESETS)


def own_strategies(results: Results, model: str) -> list[Group]:
    """Return the cells of each strategy of a run's own, at the fewest slots or at its first budget, all tasks."""
    found: dict[tuple[str, float | None], Group] = {}
    for budget in sorted(results.budgets(model), key=lambda each: each != "smallest"):
        for group in groups.unswept(results, budget, model):
            first = group[0]
            if first.budget == budget and is_own(first.strategy, results.preset):
                found.setdefault((first.strategy, first.gamma), group)
    return list(found.values())
