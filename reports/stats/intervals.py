"""Statistics of paired runs: ratios of time and differences of accuracy, each with its 95 % interval.

scipy is imported where it is called: times are read off records on GPU machines that do not have it. Of scipy only
`special` is: `stats` gives the same numbers, and takes longer to import than all of a page's intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from suites.plan import looks

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def geometric_mean(groups: Sequence[Sequence[float]]) -> Interval:
    """Return the geometric mean of per-prompt ratios with a two-level bootstrap interval (tasks, then prompts in each).

    `groups` holds one list of ratios a task, all positive. Every prompt counts once in the value. The percentiles are
    expanded for the number of units of the upper level (Hesterberg, The American Statistician 69 (2015), section
    4.4): the plain percentile interval of five tasks would cover the truth far less often than it says. With two
    or three tasks the interval is about the range between them, and says so by its width. With one task, prompts are
    the only level. The draws are seeded: the same ratios give the same interval. Raise ValueError without ratios.
    """
    kept = tuple(tuple(float(ratio) for ratio in group) for group in groups if len(group))
    if not kept:
        raise ValueError("there is no ratio to average")
    return _geometric_mean(kept)


@lru_cache(maxsize=4096)
def _geometric_mean(groups: tuple[tuple[float, ...], ...]) -> Interval:
    # 1. The value: every prompt counts once, whatever its task.
    pooled = np.log(np.concatenate(groups))
    value = math.exp(pooled.mean())
    if len(pooled) < 2 or np.ptp(pooled) == 0:
        return Interval(value, value, value)
    # 2. The tails, expanded for the units of the upper level: tasks, or prompts where there is one task.
    tail = expanded_tail(len(groups) if len(groups) > 1 else len(pooled))
    # 3. The mean log ratio of each resample, and its quantiles.
    means = resampling_weights(tuple(len(group) for group in groups)) @ pooled
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value, math.exp(low), math.exp(high))


@lru_cache(maxsize=16)
def resampling_weights(sizes: tuple[int, ...]) -> np.ndarray:
    """Return the weight of each value in each two-level resample: float64 (RESAMPLES, sum of sizes), rows sum to 1.

    A resample draws as many groups as there are, with replacement, and within each as many values as it has. Groups
    of the same sizes get the same draws, so a table costs one matrix and strategies differ by nothing but their times.
    """
    rng = np.random.default_rng(0)
    # 1. Draw groups: row r lists the groups of resample r, with repetitions.
    drawn = rng.integers(len(sizes), size=(RESAMPLES, len(sizes)))
    columns = []
    for number, size in enumerate(sizes):
        # 2. For every time that this group was drawn, note the resample that drew it (shape (draws,)).
        owner = np.repeat(np.arange(RESAMPLES), (drawn == number).sum(axis=1))
        # 3. Draw `size` of its values; resample and value are one number, so that one count serves all.
        picked = owner[:, None] * size + rng.integers(size, size=(len(owner), size))
        columns.append(np.bincount(picked.ravel(), minlength=RESAMPLES * size).reshape(RESAMPLES, size))
    # 4. Counts become weights: a resample of larger groups holds more values.
    counts = np.concatenate(columns, axis=1, dtype=float)
    return counts / counts.sum(axis=1, keepdims=True)


def expanded_tail(units: int) -> float:
    """Return the share to cut off on each side to make a percentile interval of `units` values as wide as Student's."""
    from scipy.special import ndtr, stdtrit

    return float(ndtr(-math.sqrt(units / (units - 1)) * stdtrit(units - 1, (1 + LEVEL) / 2)))


def bonett_price(lost: Any, gained: Any, items: int) -> tuple[Any, Any]:
    """Return (low, high), as shares, of the 95 % interval of a paired difference, see `looks.bonett_price`.

    `lost` and `gained` are counts or arrays of them.
    """
    from scipy.special import ndtri

    return looks.bonett_price(lost, gained, items, float(ndtri((1 + LEVEL) / 2)))


@dataclass(frozen=True)
class Paired:
    """Two runs scored on the same items; `lost` were right only in the first, `gained` only in the second."""

    items: int
    lost: int
    gained: int

    @property
    def difference(self) -> Interval:
        """Return the second minus the first accuracy in points, with its 95 % interval (`bonett_price`)."""
        low, high = bonett_price(self.lost, self.gained, self.items)
        return Interval(100 * (self.gained - self.lost) / self.items, 100 * float(low), 100 * float(high))

    @property
    def p_value(self) -> float:
        """Return the p-value of the exact McNemar test (two-sided binomial of the discordant items)."""
        from scipy.special import bdtr

        # Both tails are alike at one half, and overlap where as many are lost as gained.
        return min(1.0, 2 * float(bdtr(min(self.lost, self.gained), self.lost + self.gained, 0.5)))

    def within(self, margin_points: float) -> str:
        """Judge non-inferiority, see `looks.judgement`."""
        return looks.judgement(self.difference.low, self.difference.high, margin_points)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Count the discordant items of two runs, item by item."""
    both = list(zip(first, second, strict=True))
    return Paired(len(both), sum(a and not b for a, b in both), sum(b and not a for a, b in both))


def wilson(right: int, items: int) -> Interval:
    """Return the accuracy in percent with Wilson's 95 % interval."""
    from scipy.special import ndtri

    z, share = float(ndtri((1 + LEVEL) / 2)), right / items
    half = z * math.sqrt(share * (1 - share) / items + (z / (2 * items)) ** 2)
    centre, widened = share + z**2 / (2 * items), 1 + z**2 / items
    low, high = max(0.0, (centre - half) / widened), min(1.0, (centre + half) / widened)
    return Interval(100 * share, 100 * low if right else 0.0, 100 * high if right < items else 100.0)
