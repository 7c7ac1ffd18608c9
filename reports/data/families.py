"""MoBiLE's main numbers for one family, at its own threshold and the fewest slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.data import groups
from reports.data.compare import Worst, accuracy, count, speedup, total, worst_task
from reports.data.groups import Group
from reports.data.results import Results
from reports.stats.intervals import Interval, Paired


@dataclass(frozen=True)
class Family:
    """One model's fallback rate (0 to 1), speedup over on-demand-overlap, loss to full K, and its worst task."""

    model: str
    geometry: str
    fallbacks: float
    speed_up: Interval
    loss: Paired
    worst: Worst | None


def families(results: Results) -> list[Family]:
    """Return every family that has MoBiLE, full K and overlapped plain offloading, in the plan's order."""
    return [family for model in results.models if (family := _measure(results, model))]


def worst_family(found: Sequence[Family]) -> Family | None:
    """Return the family whose worst task loses most; None where no task was scored."""
    losses = [(each.worst.loss.difference.value, each) for each in found if each.worst]
    return min(losses, key=lambda pair: pair[0])[1] if losses else None


def answered(results: Results, model: str) -> tuple[Group, Group, Group]:
    """Return full K, static K/2 and MoBiLE at its own threshold, over the items that all of them have.

    Each is empty where it was not run, static K/2 also where it shares no item with the others.
    """
    static_half = results.select_complete(model=model, strategy="static-half", budget="smallest")
    whole = [groups.full_k(results, model), groups.mobile(results, model)]
    full_k, mobile, half = groups.on_common_items([*whole, static_half])
    if count(half) or not static_half:
        return full_k, half, mobile
    full_k, mobile = groups.on_common_items(whole)
    return full_k, [], mobile


def _measure(results: Results, model: str) -> Family | None:
    full_k, _, mobile = answered(results, model)
    base = groups.baselines(results, "smallest", model).get("on-demand-overlap")
    speed_up = speedup(mobile, base) if mobile and base else None
    if not full_k or speed_up is None:
        return None
    tokens = total(mobile, "decode_tokens")
    rate = total(mobile, "fallbacks") / tokens if tokens else 0.0
    loss, worst = accuracy(mobile, full_k), worst_task(mobile, full_k)
    if not loss.items:
        return None
    return Family(model, mobile[0].geometry, rate, speed_up, loss, worst)
