"""Figures of a cache's hit rate by memory, and of predictors' recall by depth."""

from __future__ import annotations

from reports.data import groups
from reports.data.compare import hit_rate, prediction_counts, strategy_name
from reports.data.results import Results
from reports.elements.page import Figure
from reports.plots.style import curves

RECALL = (
    "Recall by depth, at the fewest slots each strategy needs. Layers that nothing foresees have no point; strategies "
    "that run what they foresee, right or wrong, are left out."
)
HITS = (
    "Hit rate of the cache alone. Belady's rule knows the future and is the most that any eviction could reach; what a "
    "real rule leaves below it is the room there is."
)


def hits_by_memory(results: Results, model: str) -> Figure | None:
    """Draw the decode hit rate by the share of all experts that have a slot, for strategies that only cache."""
    lines: dict[str, list[tuple[float, float]]] = {}
    whole: list[str] = []
    for strategy in dict.fromkeys(r.strategy for r in results.select(model=model) if r.budget.endswith("%")):
        for budget in results.distinct("budget"):
            group = results.select_complete(model=model, strategy=strategy, budget=budget)
            rate = hit_rate(group) if group else None
            if rate is not None:
                config = group[0].config
                slots_percent = 100 * (group[0].slots or 0) / (config["moe_layers"] * config["experts"])
                lines.setdefault(strategy, []).append((slots_percent, 100 * rate))
                whole += [budget] if groups.holds_all(group) and budget not in whole else []
    caption = f"{HITS} The rightmost points are the whole model: {' and '.join(whole)} holds it." if whole else HITS
    return curves(f"hits-{model}", caption, lines, "slots, % of all experts", "decode hit rate (%)")


def recall_by_depth(results: Results, model: str) -> Figure | None:
    """Draw the recall of predictions by MoE layer, at the smallest budget."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for group in groups.unswept(results, "smallest", model):
        layers = {layer: seen for layer, seen in prediction_counts(group).items() if seen[2]}
        executed = not group[0].lossless and group[0].gamma is None  # runs its predictions, so none is wrong
        if layers and not executed:
            lines[strategy_name(group[0])] = [
                (layer, 100 * right / needed) for layer, (_, right, needed) in layers.items()
            ]
    return curves(f"recall-{model}", RECALL, lines, "MoE layer", "recall (%)")
