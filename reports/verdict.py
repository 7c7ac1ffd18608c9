"""The verdict rule, fixed before any run, and which records it may judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.stats.intervals import Interval, Paired
from suites.record import Record

BAND_TOLERANCE = 0.02  # "materially different" starts beyond 2 %
MAX_HALF_WIDTH = 0.10  # an interval wider than ±10 % decides nothing
MEASURED = ("gpu+pcie", "real")  # the only scope and weights that are set against the paper
OTHER_LINKS = ("gpu+throttled", "cpu+disk")  # scopes measured over a link that is not the paper's

RULE = (
    "REPRODUCED: the 95 % interval meets the published band widened by 2 %; for accuracy, it clears the margin. SHORT, "
    "EXCEEDS: wholly below, wholly above. INCONCLUSIVE: the interval is wider than ±10 %; for accuracy, it neither "
    "clears the margin nor lies beyond it. NOT COMPARABLE: not measured on one GPU over its own link with the real "
    "weights. FAILED: a control of this run is broken, or the cell failed. MISSING: no result."
)


@dataclass(frozen=True)
class Stamp:
    """The scope and weights of some numbers ("mixed" where records differ), and on how many kinds of machine."""

    scope: str
    weights: str
    machines: int = 1

    @property
    def refusal(self) -> str | None:
        """Return why these numbers may not be compared with the paper's; None if they may."""
        if self.scope == "cpu+virtual":
            return "NOT COMPARABLE (projected)"
        if self.scope in OTHER_LINKS:
            return "NOT COMPARABLE (measured on another link)"
        if (self.scope, self.weights) != MEASURED:
            return "NOT COMPARABLE"
        return None if self.machines == 1 else "NOT COMPARABLE (unlike machines)"

    def __str__(self) -> str:
        return f"{self.scope}, {self.weights}" + (f", {self.machines} machines" if self.machines > 1 else "")


def machine_identity(record: Record) -> str:
    """Return the identity of the machine that timed a record; wall times compare only where it is equal."""
    return record.environment.get("fingerprint") or machine(record)


def machine(record: Record) -> str:
    """Return processor, cores, GPU and link of a record in words."""
    gpu = record.environment.get("gpu") or {}
    facts = [gpu.get(name) for name in ("name", "driver", "link_generation", "link_width")]
    return " ".join(str(fact) for fact in (record.environment.get("cpu"), record.environment.get("cores"), *facts))


def stamp_of(*groups: Sequence[Record]) -> Stamp:
    """Return the one stamp of all the records that a number is made from, baseline included."""
    records = [record for group in groups for record in group]
    scopes, weights = {r.scope for r in records}, {r.weights for r in records}
    timed = scopes - {"cpu+virtual", "cpu+paced"}  # on the wall clock, by which machines differ
    machines = len({machine_identity(r) for r in records}) if timed else 1
    return Stamp(
        scopes.pop() if len(scopes) == 1 else "mixed" if scopes else "-",
        weights.pop() if len(weights) == 1 else "mixed" if weights else "-",
        machines,
    )


def speedup_verdict(measured: Interval | None, low: float, high: float, stamp: Stamp, trusted: bool = True) -> str:
    """Return the verdict on a speedup, given the published band (both ends as ratios)."""
    return _comparable(_band_outcome(measured, low, high) if measured else None, stamp, trusted)


def accuracy_verdict(measured: Paired | None, margin_points: float, stamp: Stamp, trusted: bool = True) -> str:
    """Return the verdict on a paired difference of accuracy, given a non-inferiority margin in points."""
    words = {"yes": "REPRODUCED", "no": "SHORT", "not shown": "INCONCLUSIVE"}
    return _comparable(words[measured.within(margin_points)] if measured else None, stamp, trusted)


def _band_outcome(measured: Interval, low: float, high: float) -> str:
    if (measured.high - measured.low) / 2 > MAX_HALF_WIDTH * measured.value:
        return "INCONCLUSIVE"
    if measured.high < low * (1 - BAND_TOLERANCE):
        return "SHORT"
    return "EXCEEDS" if measured.low > high * (1 + BAND_TOLERANCE) else "REPRODUCED"


def _comparable(outcome: str | None, stamp: Stamp, trusted: bool) -> str:
    """Replace an outcome that may not be compared with the paper; every verdict passes here."""
    if outcome is None:
        return "MISSING"
    if not trusted:
        return "FAILED"
    return stamp.refusal or outcome
