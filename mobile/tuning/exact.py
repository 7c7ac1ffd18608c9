"""Exact binomial bounds (Clopper and Pearson, Biometrika 1934), by bisection: of a share that was counted."""

from __future__ import annotations

import math
from collections.abc import Callable

HALVINGS = 60  # of the interval from 0 to 1: below the spacing of floats near any bound


def highest_share(count: int, of: int, error: float) -> float:
    """Return the upper bound of a share of which `count` in `of` were seen, wrong with probability `error` at most."""
    if count >= of:
        return 1.0
    return _where(lambda share: _at_most(count, of, share) > error)


def lowest_share(count: int, of: int, error: float) -> float:
    """Return the lower bound of a share of which `count` in `of` were seen, wrong with probability `error` at most."""
    return 1 - highest_share(of - count, of, error)


def fewest_items(budget: float, error: float) -> int:
    """Return the fewest items of which none must be counted for `highest_share` to be within `budget`."""
    return math.ceil(math.log(error) / math.log1p(-budget))


def _at_most(count: int, of: int, share: float) -> float:
    """Return the probability that a binomial of `of` and `share` is `count` at most."""
    if share in (0.0, 1.0):
        return float(share == 0.0 or count >= of)
    yes, no, whole = math.log(share), math.log1p(-share), math.lgamma(of + 1)
    return math.fsum(
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(of - k + 1) + k * yes + (of - k) * no)
        for k in range(count + 1)
    )


def _where(below: Callable[[float], bool]) -> float:
    """Return the share up to which `below` holds."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return high
