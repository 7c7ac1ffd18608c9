"""Statistics of paired runs: ratios of time, differences of accuracy, and how sure one can be of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap, norm

RESAMPLES = 5000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def geometric_mean(ratios: Sequence[float]) -> Interval:
    """Geometric mean of per-prompt ratios with a percentile bootstrap over prompts (fixed seed).

    In virtual time processes do not differ, so the level of processes that wall-clock runs add has no spread here.
    """
    logs = np.log(np.asarray(ratios, dtype=float))
    value = math.exp(logs.mean())
    if len(logs) < 2 or np.ptp(logs) == 0:
        return Interval(value, value, value)
    drawn = bootstrap(
        (logs,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    return Interval(value, math.exp(drawn.low), math.exp(drawn.high))


@dataclass(frozen=True)
class Paired:
    """Two runs scored on the same items; `lost` were right only in the first, `gained` only in the second."""

    items: int
    lost: int
    gained: int

    @property
    def difference(self) -> Interval:
        """Second minus first accuracy in points, with the 95 % interval of Bonett and Price (2012).

        It adds one to each discordant count, so it keeps its width where Wald's interval collapses.
        """
        lost, gained, n = (self.lost + 1) / (self.items + 2), (self.gained + 1) / (self.items + 2), self.items + 2
        centre = gained - lost
        half = float(norm.ppf(0.975)) * math.sqrt((gained + lost - centre**2) / n)
        return Interval(100 * (self.gained - self.lost) / self.items, 100 * (centre - half), 100 * (centre + half))

    @property
    def p_value(self) -> float:
        """Exact McNemar: two-sided binomial test of the discordant items."""
        discordant = self.lost + self.gained
        return float(binomtest(self.lost, discordant).pvalue) if discordant else 1.0

    def within(self, margin_points: float) -> str:
        """Non-inferiority at a margin: "yes" if the interval clears it, "no" if it lies beyond, else "not shown"."""
        if self.difference.low > -margin_points:
            return "yes"
        return "no" if self.difference.high < -margin_points else "not shown"


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Count the discordant items of two runs, item by item."""
    both = list(zip(first, second, strict=True))
    return Paired(len(both), sum(a and not b for a, b in both), sum(b and not a for a, b in both))


def wilson(right: int, items: int) -> Interval:
    """Accuracy in percent with Wilson's 95 % interval."""
    drawn = binomtest(right, items).proportion_ci(method="wilson")
    return Interval(100 * right / items, 100 * drawn.low, 100 * drawn.high)
