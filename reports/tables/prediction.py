"""Tables of experts predicted and loaded ahead: recall, precision, and the bytes wasted."""

from __future__ import annotations

from reports.data import groups
from reports.data.compare import count, hit_rate, prediction_counts, share, strategy_name, total, wasted_bytes
from reports.data.results import Results
from reports.elements.numbers import budget_title, percent
from reports.elements.page import Table


def by_strategy(results: Results, model: str, budget: str) -> Table:
    """Return recall, precision and waste of each predicting strategy at one budget, all layers and tasks together."""
    rows, timed = [], []
    for group in groups.unswept(results, budget, model):
        layers = prediction_counts(group).values()
        if not layers:
            continue
        timed.append(group)
        guessed, right, needed = (sum(column) for column in zip(*layers, strict=True))
        tokens = total(group, "decode_tokens")
        rows.append(
            (
                strategy_name(group[0]),
                percent(right / needed if needed else None),
                percent(right / guessed if guessed else None),
                percent(share(group, "prefetch_useful", "prefetch_loads")),
                f"{wasted_bytes(group) / tokens / 1e9:.3f}" if tokens else "-",
                percent(hit_rate(group)),
                percent(share(group, "decode_stall_seconds", "decode_seconds")),
                "-" if group[0].slots is None else f"{group[0].slots:,}",
                str(count(group)),
            )
        )
    head = (
        "strategy",
        "recall",
        "precision",
        "fetched and used",
        "wasted GB/token",
        "hits",
        "stalled",
        "slots",
        "prompts",
    )
    alike = len({count(group) for group in timed}) < 2
    note = "" if alike else "Each strategy over all the prompts that it was timed on, which are not the same for all."
    title = budget_title(budget, groups.budget_holds_all(results, model, budget))
    return Table(f"What was foreseen, {title}", head, tuple(rows), note)


def by_layer(results: Results, model: str) -> Table:
    """Return recall and precision of each layer's predictions, at the smallest budget."""
    seen = {strategy_name(group[0]): prediction_counts(group) for group in groups.unswept(results, "smallest", model)}
    seen = {strategy: layers for strategy, layers in seen.items() if layers}
    rows = []
    for layer in sorted({layer for layers in seen.values() for layer in layers}):
        cells = []
        for layers in seen.values():
            guessed, right, needed = layers.get(layer, (0, 0, 0))
            cells.append(f"{percent(right / needed)} / {percent(right / guessed)}" if guessed and needed else "-")
        rows.append((str(layer), *cells))
    return Table("Recall / precision by MoE layer", ("layer", *seen), tuple(rows))
