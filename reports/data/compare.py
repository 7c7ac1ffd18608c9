"""Quantities of cells, and comparisons of cells item by item: speedup, accuracy, hit rate, wasted bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reports.stats.intervals import Interval, Paired, geometric_mean, paired
from suites.record import Item, Record


class UnlikePrompts(ValueError):
    """Cells that should hold the same items hold other prompts, so nothing of them can be paired."""


def strategy_name(record: Record) -> str:
    """Return the strategy of a record as tables write it, with its gamma if it has one."""
    return record.strategy if record.gamma is None else f"{record.strategy} (gamma {record.gamma:g})"


def paired_items(first: Sequence[Record], second: Sequence[Record]) -> list[list[tuple[Item, Item]]]:
    """Pair the items that both have by their number; one list of (first, second) a task.

    Timed cells may hold fewer items than scored ones, so items are never paired by position. Raise UnlikePrompts
    where items of one number have different prompts.
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
    """Return the TPOT of an item in seconds; None where nothing was decoded or timed."""
    return item.decode_ns / item.decode_tokens / 1e9 if item.decode_tokens and item.decode_ns else None


def speedup(records: Sequence[Record], baseline: Sequence[Record]) -> Interval | None:
    """Return the geometric mean over prompts of baseline TPOT / TPOT; None if no prompt is timed in both."""
    groups = []
    for pairs in paired_items(records, baseline):
        times = [(seconds_per_token(item), seconds_per_token(base)) for item, base in pairs]
        groups.append([baseline_s / seconds for seconds, baseline_s in times if seconds and baseline_s])
    return geometric_mean(groups) if any(groups) else None


def accuracy(records: Sequence[Record], reference: Sequence[Record]) -> Paired:
    """Pair the scores of `records` with those of `reference`, item by item; leave out items not scored in both."""
    pairs = [(a.correct, b.correct) for group in paired_items(reference, records) for a, b in group]
    scored = [(first, second) for first, second in pairs if first is not None and second is not None]
    return paired([first for first, _ in scored], [second for _, second in scored])


class Worst(NamedTuple):
    """The task on which some cells lose most against others, and how they differ there."""

    task: str
    loss: Paired

    @property
    def short(self) -> str:
        """Return the task and its difference in points."""
        return f"{self.task} {self.loss.difference.value:+.1f}"

    @property
    def in_words(self) -> str:
        """Return the task and its difference in points with the interval."""
        lost = self.loss.difference
        return f"{self.short} [{lost.low:+.1f}, {lost.high:+.1f}]"


def worst_task(records: Sequence[Record], reference: Sequence[Record]) -> Worst | None:
    """Return the task with the lowest difference of accuracy, the first of equals; None if nothing was scored twice."""
    by_task = [Worst(record.task, accuracy([record], reference)) for record in records]
    scored = [each for each in by_task if each.loss.items]
    return min(scored, key=lambda each: each.loss.difference.value, default=None)


def total(records: Sequence[Record], field: str) -> int:
    """Sum an item field over all items of the cells; an unknown value counts as 0."""
    return sum(getattr(item, field) or 0 for record in records for item in record.items)


def count(records: Sequence[Record]) -> int:
    """Count the items of the cells."""
    return sum(len(record.items) for record in records)


def tokens_per_s(records: Sequence[Record]) -> float | None:
    """Return all decode tokens over all decode seconds; None where nothing was timed."""
    timed = [item for record in records for item in record.items if seconds_per_token(item)]
    nanoseconds = sum(item.decode_ns for item in timed)
    return sum(item.decode_tokens for item in timed) / (nanoseconds / 1e9) if nanoseconds else None


def share(records: Sequence[Record], part: str, whole: str) -> float | None:
    """Return one counter over another, both summed over the cells; None where the second sum is 0."""
    denominator = sum(record.counters[whole] for record in records)
    return sum(record.counters[part] for record in records) / denominator if denominator else None


def prediction_counts(records: Sequence[Record]) -> dict[int, tuple[int, int, int]]:
    """Sum over cells, by MoE layer, the experts (predicted, rightly predicted, needed); empty without predictions."""
    layers: dict[int, tuple[int, int, int]] = {}
    for record in records:
        for layer, *seen in record.guesses:
            before = layers.get(layer, (0, 0, 0))
            layers[layer] = (before[0] + seen[0], before[1] + seen[1], before[2] + seen[2])
    return dict(sorted(layers.items()))


def wasted_bytes(records: Sequence[Record]) -> int:
    """Return the bytes of prefetched experts that no step used."""
    return sum(
        (r.counters["prefetch_loads"] - r.counters["prefetch_useful"]) * r.config["expert_nbytes"] for r in records
    )


def hit_rate(records: Sequence[Record]) -> float | None:
    """Return the experts resident when a decode step needed them over all it needed; None if it needed none."""
    hits = sum(record.counters.get("hits", 0) for record in records)
    absent = ("demand_loads", "late_prefetches", "cpu_experts")
    asked = hits + sum(record.counters.get(name, 0) for record in records for name in absent)
    return hits / asked if asked else None
