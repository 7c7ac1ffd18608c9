"""Cells set against each other: the same items, under two strategies."""

from __future__ import annotations

from collections.abc import Sequence

from reports.stats import Interval, Paired, geometric_mean, paired
from suites.record import Item, Record


def name(record: Record) -> str:
    """A strategy as tables write it."""
    return record.strategy if record.gamma is None else f"{record.strategy} (gamma {record.gamma:g})"


def _matched(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Item, Item]]:
    """Items of two strategies on the same tasks, paired; the prompts must be the same."""
    by_task = {record.task: record for record in second}
    pairs = []
    for record in first:
        for a, b in zip(record.items, by_task[record.task].items, strict=True):
            assert a.prompt_sha256 == b.prompt_sha256, "cells of one task were not given the same prompts"
            pairs.append((a, b))
    return pairs


def speedup(records: Sequence[Record], baseline: Sequence[Record]) -> Interval:
    """Geometric mean over prompts of baseline TPOT / TPOT; prompts without a decode step have none."""
    ratios = [
        (base.decode_ns / base.decode_tokens) / (item.decode_ns / item.decode_tokens)
        for item, base in _matched(records, baseline)
        if item.decode_tokens and base.decode_tokens
    ]
    return geometric_mean(ratios)


def accuracy(records: Sequence[Record], reference: Sequence[Record]) -> Paired:
    """Scores of `records` against `reference`, paired by item."""
    pairs = _matched(reference, records)
    return paired([a.correct for a, _ in pairs], [b.correct for _, b in pairs])


def total(records: Sequence[Record], field: str) -> int:
    """Sum of an item field over all items of the cells."""
    return sum(getattr(item, field) for record in records for item in record.items)


def count(records: Sequence[Record]) -> int:
    """How many items the cells have."""
    return sum(len(record.items) for record in records)


def tokens_per_s(records: Sequence[Record]) -> float:
    """All decode tokens over all decode seconds."""
    return total(records, "decode_tokens") / (total(records, "decode_ns") / 1e9)


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
