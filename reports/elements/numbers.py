"""How numbers are written in tables. What is unknown is a dash, never a zero."""

from __future__ import annotations

from reports.stats.intervals import Interval


def ratio(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def points(interval: Interval) -> str:
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def score(interval: Interval) -> str:
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def budget_title(budget: str) -> str:
    """A memory budget as a reader would say it."""
    if budget.endswith("%"):
        return f"slots for {budget} of all experts"
    return {"smallest": "the fewest slots each strategy needs"}.get(budget, f"a card of {budget}")
