"""The choice among measured settings: the cheapest whose loss is within the budget, with confidence.

A setting is a signal and a gamma. Its loss is the share of items that full K gets right and it does not, less the
reverse. The bounds are exact: Clopper and Pearson's of the two shares, each wrong with half the error. (Where no item
can be gained, the loss is one share, and its bound takes the whole error.)

Of many settings some would pass by luck if each were tested by itself. So those of one signal are tested in an order
that is fixed beforehand, from the most fallbacks to the fewest, up to the first that fails (fixed-sequence testing:
the error of the whole sequence is that of one test). Of several signals each gets its part of the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from mobile.tuning.exact import fewest_items, highest_share, lowest_share

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Setting:
    """A signal and the gamma that it is compared with."""

    signal: str
    gamma: float


@dataclass(frozen=True)
class Measured:
    """What a setting did on `items` items; `lost` and `gained` are numbers of items, in their order.

    `can_gain` says that some item has an answer, so that one may be gained.
    """

    setting: Setting
    items: int
    tokens: int
    fallbacks: int
    lost: tuple[int, ...]
    gained: tuple[int, ...]
    can_gain: bool = True

    @property
    def fallback_rate(self) -> float:
        """Return the fallbacks per decoded token."""
        return self.fallbacks / self.tokens if self.tokens else 0.0

    @property
    def loss(self) -> float:
        """Return the points that were lost on these items."""
        return 100 * (len(self.lost) - len(self.gained)) / self.items

    def high(self, error: float) -> float:
        """Return the upper bound of the loss in points, wrong with probability `error` at most."""
        if not self.can_gain:
            return 100 * highest_share(len(self.lost), self.items, error)
        gained = lowest_share(len(self.gained), self.items, error / 2)
        return 100 * (highest_share(len(self.lost), self.items, error / 2) - gained)

    def low(self, error: float) -> float:
        """Return the lower bound of the loss in points, wrong with probability `error` at most."""
        if not self.can_gain:
            return 100 * lowest_share(len(self.lost), self.items, error)
        gained = highest_share(len(self.gained), self.items, error / 2)
        return 100 * (lowest_share(len(self.lost), self.items, error / 2) - gained)


def certified(measured: Sequence[Measured], max_loss: float, confidence: float = CONFIDENCE) -> list[Measured]:
    """Return the settings whose loss is within `max_loss` points: of each signal, those before its first that fails."""
    passed = []
    error = error_of(measured, confidence)
    for signal in dict.fromkeys(each.setting.signal for each in measured):
        of_signal = [each for each in measured if each.setting.signal == signal]
        for each in sorted(of_signal, key=lambda m: -m.setting.gamma):
            if each.high(error) > max_loss:
                break
            passed.append(each)
    return passed


def error_of(measured: Sequence[Measured], confidence: float = CONFIDENCE) -> float:
    """Return the error that each signal's sequence of tests may have."""
    return (1 - confidence) / max(1, len({each.setting.signal for each in measured}))


def cheapest(passed: Sequence[Measured]) -> Measured | None:
    """Return the setting with the fewest fallbacks, and so the fewest bytes; of equal ones that with the least loss."""
    return min(passed, key=lambda m: (m.fallback_rate, m.loss), default=None)


def least_loss(measured: Sequence[Measured]) -> Measured:
    """Return the setting that lost least on these items, of equal ones that with the fewest fallbacks."""
    return min(measured, key=lambda m: (m.loss, m.fallback_rate))


def items_needed(measured: Sequence[Measured], max_loss: float, confidence: float = CONFIDENCE) -> int | None:
    """Return about how many items would certify some setting, if all went on as on these; None if none can be.

    Exact where nothing was lost. Else both bounds are taken as normal ones: of shares b lost and c gained they leave
    z (sqrt b + sqrt c) / sqrt n, which must fit between the loss and the budget.
    """
    error, budget = error_of(measured, confidence), max_loss / 100
    found = []
    for each in measured:
        room = budget - each.loss / 100
        if room <= 0:
            continue
        part = error / 2 if each.can_gain else error
        spread = math.sqrt(len(each.lost) / each.items) + math.sqrt(len(each.gained) / each.items)
        wanted = (NormalDist().inv_cdf(1 - part) * spread / room) ** 2
        found.append(max(fewest_items(budget, part), math.ceil(wanted)))
    return min(found, default=None)
