"""Statistics of confidence signals: the share of disagreeing tokens that falling back on the least sure would catch.

The intervals come from a bootstrap over items, whose tokens are drawn together; every signal gets the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reports.stats.intervals import LEVEL, Interval

RESAMPLES = 1000


@dataclass(frozen=True)
class Tokens:
    """Decode tokens of several items: `item` (tokens,) numbers their items from 0, `wrong` marks the disagreements.

    `doubts` gives 1 - confidence by signal, (tokens,) each.
    """

    item: np.ndarray
    wrong: np.ndarray
    doubts: dict[str, np.ndarray]

    @property
    def draws(self) -> np.ndarray:
        """Return how often each resample draws each item, (1 + RESAMPLES, items); the first draws each once."""
        items = int(self.item.max()) + 1
        drawn = np.random.default_rng(0).multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
        return np.concatenate([np.ones((1, items), dtype=drawn.dtype), drawn])

    def rates(self, doubt: np.ndarray, above: float, draws: np.ndarray) -> np.ndarray:
        """Return by draw the share of tokens whose doubt is above a bound."""
        falls = np.bincount(self.item, doubt > above, draws.shape[1])
        return (draws @ falls) / (draws @ np.bincount(self.item, minlength=draws.shape[1]))


def pooled(items: Sequence[tuple[Sequence[int], dict[str, Sequence[float]]]]) -> Tokens:
    """Return the tokens of items, each (agrees by token, doubts by signal and token)."""
    lengths = [len(agrees) for agrees, _ in items]
    return Tokens(
        np.repeat(np.arange(len(items)), lengths),
        np.concatenate([np.array(agrees, dtype=int) == 0 for agrees, _ in items]),
        {name: np.concatenate([np.array(doubts[name]) for _, doubts in items]) for name in items[0][1]},
    )


@dataclass(frozen=True)
class Caught:
    """What one signal catches, by draw: the area under its curve, and the share caught at each of several rates."""

    area: np.ndarray
    at: tuple[np.ndarray, ...]


def caught(tokens: Tokens, doubt: np.ndarray, rates: Sequence[np.ndarray], draws: np.ndarray) -> Caught:
    """Return what falling back on the most doubtful tokens catches; `rates` are shares of all tokens, by draw.

    The curve is the share of disagreements among the tokens that fall back, against their share of all tokens. Tokens
    of equal doubt fall back in no order, so the curve is straight between them. It is nan in a draw without a
    disagreement.
    """
    order = np.argsort(-doubt, kind="stable")
    ends = np.flatnonzero(np.diff(doubt[order], append=np.nan))  # of groups of equal doubt: nan differs from all
    item, wrong = tokens.item[order], tokens.wrong[order]
    area, at = np.full(len(draws), np.nan), tuple(np.full(len(draws), np.nan) for _ in rates)
    for number, drawn in enumerate(draws):
        weights = drawn[item]
        fallen, hit = np.cumsum(weights)[ends], np.cumsum(weights * wrong)[ends]
        if hit[-1] == 0:
            continue
        x, y = np.append(0, fallen / fallen[-1]), np.append(0, hit / hit[-1])
        area[number] = np.trapezoid(y, x)
        for found, rate in zip(at, rates, strict=True):
            found[number] = np.interp(rate[number], x, y)
    return Caught(area, at)


def interval(by_draw: np.ndarray) -> Interval:
    """Return the value of the items as they are, and the bootstrap's 95 % percentile interval."""
    low, high = np.nanquantile(by_draw[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(by_draw[0]), float(low), float(high))
