"""The verdict rule, fixed before any run."""

from __future__ import annotations

from reports.stats import Interval

WIDENING = 0.02  # "materially different" starts beyond 2 %
WIDEST = 0.10  # an interval wider than ±10 % decides nothing

RULE = (
    "REPRODUCED: the 95 % interval meets the published band widened by 2 %. SHORT, EXCEEDS: wholly below, wholly "
    "above. INCONCLUSIVE: the interval is wider than ±10 %. NOT COMPARABLE: not measured on a GPU over a real link "
    "with the real weights. FAILED, MISSING: no result."
)


def verdict(measured: Interval | None, low: float, high: float, scope: str, weights: str) -> str:
    """Set a speedup against a published band; only real weights on a real link may be compared at all."""
    if measured is None:
        return "MISSING"
    if (scope, weights) != ("gpu+pcie", "real"):
        return "NOT COMPARABLE (projected)" if scope == "cpu+virtual" else "NOT COMPARABLE"
    if (measured.high - measured.low) / 2 > WIDEST * measured.value:
        return "INCONCLUSIVE"
    if measured.high < low * (1 - WIDENING):
        return "SHORT"
    if measured.low > high * (1 + WIDENING):
        return "EXCEEDS"
    return "REPRODUCED"
