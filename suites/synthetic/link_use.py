"""The share of the link that fallbacks used, from a token found unsure to the end of the last copy for it. No torch.

Read from a ledger after the run, so that nothing is added to a decode step: the span of each copy, which on a GPU is
that of its CUDA events, and how many had begun when each pass did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from mobile.ledger import Event, Ledger, Mark
from suites.typed_json import Count

COPIES = ("load", "prefetch")  # events of a ledger


@dataclass(frozen=True)
class LinkUse:
    """Fallbacks that copied something, the nanoseconds they took until the last copy had ended, and bytes copied."""

    passes: Count
    ns: Count
    nbytes: Count


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of these (start, end) spans lasts, in their unit."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def copying_ns(events: Iterable[Event]) -> int:
    """Return the nanoseconds in which any copy of a ledger's events was made."""
    return round(covered((event.start_ns, event.end_ns) for event in events if event.what in COPIES))


def fallback_use(ledger: Ledger, row_nbytes: int) -> LinkUse | None:
    """Return the use of all fallbacks in the ledger; None where it no longer holds every copy."""
    copies = [event for event in ledger.events if event.what in COPIES]
    if len(copies) != ledger.counters.loads:
        return None
    taken = list(_fallbacks(list(ledger.marks), copies))
    return LinkUse(len(taken), sum(ns for ns, _ in taken), sum(count for _, count in taken) * row_nbytes)


def _fallbacks(marks: list[Mark], copies: list[Event]) -> Iterator[tuple[int, int]]:
    """Yield, for each fallback that copied, the nanoseconds to the end of its last copy, and how many it made."""
    passes = [mark for mark in marks if mark.what != "big"]  # which goes on with what its fallback began
    for mark, following in pairwise([*passes, Mark("end", 0, len(copies))]):
        began_here = copies[mark.begun : following.begun]
        if mark.what == "fallback" and began_here:
            yield max(copy.end_ns for copy in began_here) - mark.ns, len(began_here)
