"""Cells set against each other: the same items, under two strategies."""

from __future__ import annotations

from collections.abc import Sequence

from reports.stats.intervals import Interval, Paired, geometric_mean, paired
from suites.record import Item, Record


class UnlikePrompts(ValueError):
    """Cells that should hold the same items hold other prompts, so nothing of them can be paired."""


def name(record: Record) -> str:
    """A strategy as tables write it."""
    return record.strategy if record.gamma is None else f"{record.strategy} (gamma {record.gamma:g})"


def matched(first: Sequence[Record], second: Sequence[Record]) -> list[list[tuple[Item, Item]]]:
    """Items that both have, paired by their number, a list for each task.

    Timed cells may hold fewer items than scored ones, so items are never paired by position. Raises UnlikePrompts
    where one number stands for two prompts.
    """
    by_task = {record.task: {item.doc: item for item in record.items} for record in second}
    groups = []
    for record in first:
        others = by_task.get(record.task, {})
        pairs = [(item, others[item.doc]) for item in record.items if item.doc in others]
        if any(a.prompt_sha256 != b.prompt_sha256 for a, b in pairs):
            raise UnlikePrompts(
                f"Cells of {record.model} on {record.task} were not given the same prompts; run them again."
            )
        groups.append(pairs)
    return groups


def seconds_per_token(item: Item) -> float | None:
    """TPOT of one item; None where nothing was decoded or timed."""
    return item.decode_ns / item.decode_tokens / 1e9 if item.decode_tokens and item.decode_ns else None


def speedup(records: Sequence[Record], baseline: Sequence[Record]) -> Interval | None:
    """Geometric mean over prompts of baseline TPOT / TPOT, by task; None if no prompt is timed in both."""
    groups = []
    for pairs in matched(records, baseline):
        times = [(seconds_per_token(item), seconds_per_token(base)) for item, base in pairs]
        groups.append([base / own for own, base in times if own and base])
    return geometric_mean(groups) if any(groups) else None


def accuracy(records: Sequence[Record], reference: Sequence[Record]) -> Paired:
    """Scores of `records` against `reference`, paired by item; what was not scored in both is no pair."""
    pairs = [(a.correct, b.correct) for group in matched(reference, records) for a, b in group]
    scored = [(first, second) for first, second in pairs if first is not None and second is not None]
    return paired([first for first, _ in scored], [second for _, second in scored])


def total(records: Sequence[Record], field: str) -> int:
    """Sum of an item field over all items of the cells; unknown counts as nothing."""
    return sum(getattr(item, field) or 0 for record in records for item in record.items)


def count(records: Sequence[Record]) -> int:
    """How many items the cells have."""
    return sum(len(record.items) for record in records)


def tokens_per_s(records: Sequence[Record]) -> float | None:
    """All decode tokens over all decode seconds; None where nothing was timed."""
    timed = [item for record in records for item in record.items if seconds_per_token(item)]
    nanoseconds = sum(item.decode_ns for item in timed)
    return sum(item.decode_tokens for item in timed) / (nanoseconds / 1e9) if nanoseconds else None


def share(records: Sequence[Record], part: str, whole: str) -> float | None:
    """One counter over another, summed over cells; None where the whole is nothing."""
    below = sum(record.counters[whole] for record in records)
    return sum(record.counters[part] for record in records) / below if below else None


def foreseen(records: Sequence[Record]) -> dict[int, tuple[int, int, int]]:
    """By MoE layer: experts foreseen, of them right, and needed, summed over cells. Empty where nothing is foreseen."""
    layers: dict[int, tuple[int, int, int]] = {}
    for record in records:
        for layer, *seen in record.guesses:
            before = layers.get(layer, (0, 0, 0))
            layers[layer] = (before[0] + seen[0], before[1] + seen[1], before[2] + seen[2])
    return dict(sorted(layers.items()))


def wasted_bytes(records: Sequence[Record]) -> int:
    """Bytes of prefetched experts that no step used."""
    return sum(
        (r.counters["prefetch_loads"] - r.counters["prefetch_useful"]) * r.config["expert_nbytes"] for r in records
    )


def hit_rate(records: Sequence[Record]) -> float | None:
    """Experts that were ready when a decode step asked for them, over all it asked for."""
    hits = sum(record.counters["hits"] for record in records)
    absent = ("demand_loads", "late_prefetches", "cpu_experts")
    asked = hits + sum(record.counters.get(name, 0) for record in records for name in absent)
    return hits / asked if asked else None
