"""The rule by which a run ends early: looks at growing data, fixed before the run, that keep the rate of errors.

Each look has a share of the allowed error of its own (Bonferroni), little of it early (as O'Brien and Fleming), so the
intervals of all looks hold together with at least 95 %: wherever the run ends, what its last look says is wrong in at
most one of twenty runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

ERROR = 0.05  # of all looks together
GROWTH = 4  # each look may err so many times as often as the one before
Judgement = Literal["yes", "no", "not shown"]


@dataclass(frozen=True)
class Difference:
    """A difference of accuracy in points and its interval, at the level of the look that it was computed for."""

    value: float
    low: float
    high: float
    items: int
    lost: int
    gained: int

    def within(self, margin_points: float) -> Judgement:
        """Judge non-inferiority, see `judgement`."""
        return judgement(self.low, self.high, margin_points)


def judgement(low: float, high: float, margin_points: float) -> Judgement:
    """Judge non-inferiority: "yes" if the interval clears the margin, "no" if it lies beyond, else "not shown"."""
    if low > -margin_points:
        return "yes"
    return "no" if high < -margin_points else "not shown"


def bonett_price(lost: Any, gained: Any, items: int, z: float, effect: float = 1.0) -> tuple[Any, Any]:
    """Return (low, high), as shares, of the interval of a paired difference (Bonett and Price 2012).

    `lost` and `gained` are counts or arrays of them, `z` the normal quantile of its level, and `effect` the design
    effect that widens it. The interval keeps its width where Wald's collapses.
    """
    # One is added to each discordant count, and two to the items, before Wald's formula.
    down, up, n = (lost + 1) / (items + 2), (gained + 1) / (items + 2), items + 2
    half = z * (effect * (down + up - (up - down) ** 2) / n) ** 0.5
    return up - down - half, up - down + half


def error_of(look: int, looks: int) -> float:
    """Return the error that the interval of a look, 1 to `looks`, may have; all of them are ERROR together."""
    return ERROR * GROWTH**look / sum(GROWTH**each for each in range(1, looks + 1))


def difference(first: str, second: str, keys: list[str], error: float) -> Difference:
    """Return the second accuracy less the first, both a 1 or 0 an item, with its interval of coverage 1 - `error`.

    It is that of `bonett_price`. Items of one key share their substance and may go wrong together, so the standard
    error is widened by the ratio of that of independent keys to that of independent items, if it is larger (the design
    effect of Kish). Raise ValueError for other than equal lengths, or none.
    """
    if not first:
        raise ValueError("there is no item to compare")
    changes = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    lost, gained, items = changes.count(-1), changes.count(1), len(changes)
    mean = (gained - lost) / items
    # 1. The design effect: squares of the sums of keys over the sum of squares.
    sums: dict[str, float] = {}
    for key, change in zip(keys, changes, strict=True):
        sums[key] = sums.get(key, 0.0) + change - mean
    alone = sum((change - mean) ** 2 for change in changes)
    effect = max(1.0, sum(each**2 for each in sums.values()) / alone) if alone else 1.0
    # 2. Bonett and Price's interval, that much wider.
    low, high = bonett_price(lost, gained, items, NormalDist().inv_cdf(1 - error / 2), effect)
    return Difference(100 * mean, 100 * low, 100 * high, items, lost, gained)
