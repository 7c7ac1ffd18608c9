"""Groups of cells for comparisons: all tasks of one strategy, its baselines, MoBiLE at its own threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reports.data.results import Results
from reports.elements.numbers import budget_name
from suites.record import Record

ON_DEMAND = ("on-demand", "on-demand-overlap")
BASELINES = (*ON_DEMAND, "lru")  # lru only caches: what the cache alone gives of a speedup
LIMITS = frozenset(("belady", "oracle-prefetch"))

Group = list[Record]


def by_strategy(results: Results, budget: str, model: str, **wanted: Any) -> list[Group]:
    """Group the cells of a budget by strategy and gamma, in the plan's order; `resident` belongs to every budget."""
    cells = [record for record in results.select(model=model, **wanted) if record.budget in (budget, "all")]
    kinds = dict.fromkeys((record.strategy, record.gamma, record.budget) for record in cells)
    groups = (results.select_complete(model=model, strategy=s, gamma=g, budget=b, **wanted) for s, g, b in kinds)
    return [group for group in groups if group]


def unswept(results: Results, budget: str, model: str, **wanted: Any) -> list[Group]:
    """Group the cells of a budget by strategy, without the points of a sweep."""
    return [group for group in by_strategy(results, budget, model, **wanted) if not group[0].config["swept"]]


def baselines(results: Results, budget: str, model: str, **wanted: Any) -> dict[str, Group]:
    """Return the cells of each baseline that was recorded, by its name."""
    found = {base: results.select_complete(model=model, strategy=base, budget=budget, **wanted) for base in BASELINES}
    return {base: records for base, records in found.items() if records}


def default_gamma(results: Results, model: str) -> float | None:
    """Return MoBiLE's own threshold in this run; the other gammas belong to the sweep."""
    found = [r.gamma for r in results.select(model=model, strategy="mobile") if not r.config["swept"]]
    return found[0] if found else None


def mobile(results: Results, model: str, budget: str = "smallest", **wanted: Any) -> Group:
    """Return MoBiLE's cells at its own threshold."""
    gamma = default_gamma(results, model)
    return results.select_complete(model=model, strategy="mobile", gamma=gamma, budget=budget, **wanted)


def holds_all(records: Group) -> bool:
    """Return whether the cells had a slot for every expert, so that a cache loads each once and then nothing."""
    every = [r.config["moe_layers"] * r.config["experts"] for r in records]
    return bool(records) and all((r.slots or 0) >= experts for r, experts in zip(records, every, strict=True))


def full_k(results: Results, model: str, **wanted: Any) -> Group:
    """Return the cells of the model with everything resident: full K, the reference that others are paired with."""
    return results.select_complete(model=model, strategy="resident", **wanted)


def knows_future(record: Record) -> bool:
    """Return whether a cell's strategy needs the future, which no system has; older records say it by name alone."""
    return bool(record.config.get("needs_future")) or not LIMITS.isdisjoint(record.strategy.split("+"))


def on_common_items(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with only the items that all of them have, by task and number: like stands beside like.

    What items hold may be summed over them; the counters of a record stay those of its whole cell.
    """
    by_task: dict[str, set[int]] = {}
    for group in groups:
        for record in group:
            docs = {item.doc for item in record.items}
            by_task[record.task] = by_task.get(record.task, docs) & docs
    return [[_with_items(record, by_task[record.task]) for record in group] for group in groups]


def _with_items(record: Record, docs: set[int]) -> Record:
    kept = tuple(item for item in record.items if item.doc in docs)
    return record if len(kept) == len(record.items) else replace(record, items=kept)


def budget_holds_all(results: Results, model: str, budget: str) -> bool:
    """Return whether a memory budget holds every expert of a model: some strategy has a slot for each under it."""
    return any(holds_all([record]) for record in results.select(model=model, budget=budget))


def memory(record: Record) -> str:
    """Return the memory budget of a cell, and that it holds the whole model where it does."""
    return budget_name(record.budget, record.budget != "all" and holds_all([record]))
