"""Power of a paired comparison by its number of items; known before a run, so the page prints it before results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import bdtr, gammaln, ndtri, xlog1py, xlogy

from reports.stats.intervals import LEVEL, bonett_price

PUBLISHED = (("HumanEval", 164), ("GSM8K", 1319), ("BIG-Bench-Hard", 6511))
DISCORDANT = (0.02, 0.05, 0.10)  # shares of items on which two runs of one model were seen to differ
WANTED = 0.8


def power(items: int, discordant: float, margin_points: float, true_points: float = 0.0) -> float:
    """Return the exact probability that the interval clears the margin when the true difference is `true_points`.

    `discordant` is the share of items that only one of the two runs gets right. Raise ValueError where the true
    difference is larger than that share can make it.
    """
    gained = (discordant + true_points / 100) / 2
    if not 0 <= gained <= discordant <= 1:
        raise ValueError(
            f"a difference of {true_points} points needs more than {100 * discordant:g} % discordant items"
        )
    if not discordant:
        return float(bonett_price(0, 0, items)[0] > -margin_points / 100)
    # Sum over the number of discordant items, then over how many of them were gained; both are binomial.
    total = 0.0
    sizes = np.arange(items + 1)
    below = bdtr(sizes, items, discordant)
    for count in sizes[(below >= 1e-9) & (np.concatenate([[0.0], below[:-1]]) < 1 - 1e-9)]:
        up = np.arange(count + 1)
        shown = bonett_price(count - up, up, items)[0] > -margin_points / 100
        total += binomial(count, items, discordant) * binomial(up[shown], count, gained / discordant).sum()
    return float(total)


def binomial(successes: Any, trials: int, share: float) -> Any:
    """Return the probability of so many successes (a number or an array), each of probability `share`."""
    ways = gammaln(trials + 1) - gammaln(successes + 1) - gammaln(trials - successes + 1)
    return np.exp(ways + xlogy(successes, share) + xlog1py(trials - successes, -share))


def half_width(items: int, discordant: float) -> float:
    """Return half of the 95 % interval in points, with as many discordant items lost as gained."""
    low, high = bonett_price(items * discordant / 2, items * discordant / 2, items)
    return 100 * float(high - low) / 2


def fewest_items(margin_points: float) -> int:
    """Return the fewest items that can clear the margin if not one of them is discordant."""
    items = 1
    while power(items, 0.0, margin_points) < 1:
        items += 1
    return items


def items_needed(discordant: float, margin_points: float) -> int:
    """Return about how many items clear the margin four times in five without a difference (normal approximation)."""
    z = ndtri((1 + LEVEL) / 2) + ndtri(WANTED)
    return max(fewest_items(margin_points), math.ceil(discordant * (100 * z / margin_points) ** 2))
