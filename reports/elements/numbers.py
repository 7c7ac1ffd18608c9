"""Numbers as tables write them. An unknown one is a dash, never a zero."""

from __future__ import annotations

from collections.abc import Sequence

from reports.stats.intervals import Interval


def ratio(interval: Interval | None) -> str:
    """Write a ratio with its interval."""
    return "-" if interval is None else f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def bare_ratio(interval: Interval) -> str:
    """Write a ratio with its interval, without a unit, for a sentence."""
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def span(numbers: Sequence[float], spec: str, unit: str = "") -> str:
    """Write the range of some numbers, or the one that all are once they are written."""
    low, high = format(min(numbers), spec), format(max(numbers), spec)
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def points(interval: Interval) -> str:
    """Write a difference in points with its interval, signed."""
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def percent(share: float | None) -> str:
    """Write a share (0 to 1) in percent."""
    return "-" if share is None else f"{100 * share:.1f} %"


def score(interval: Interval) -> str:
    """Write an accuracy, in percent already, with its interval."""
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def p_value(p: float) -> str:
    """Write a p-value with three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def budget_name(budget: str, holds_all: bool = False) -> str:
    """Write a memory budget as it is, and that it holds the whole model where it does."""
    return f"{budget} (holds all of it)" if holds_all else budget


def budget_title(budget: str, holds_all: bool = False) -> str:
    """Write a memory budget (`smallest`, `16GiB`, `25%`) in words."""
    if budget.endswith("%"):
        return f"slots for {budget} of all experts"
    named = budget_name(budget, holds_all)
    return {"smallest": "the fewest slots each strategy needs"}.get(budget, f"a card of {named}")
