"""Tests of lines 21 to 26: integrity."""

from __future__ import annotations

from reports.checks import bundle
from reports.checks.checklist.evidence import Evidence, Missing, NeedsReader
from reports.sections import controls


def everything_is_hashed(evidence: Evidence) -> str:
    """Raise Missing where a record lacks its generation's hash, or was made with uncommitted code."""
    if not all(
        r.config.get("generation") or r.config.get("timing", "").startswith("live") for r in evidence.results.scored
    ):
        raise Missing("some records, timed by replay, do not name the live run, whose name is a hash of all inputs")
    if any(r.environment.get("git_dirty") is None for r in evidence.results.scored):
        raise Missing("some records do not say whether the code was committed")
    dirty = sum(bool(r.environment["git_dirty"]) for r in evidence.results.scored)
    if dirty:
        raise Missing(f"{dirty} records were made with changes that were not committed")
    return "cells are named by a hash of code, weights, data and versions; the tree was clean"


def bundle_is_sealed(evidence: Evidence) -> str:
    """Count the sealed files. Raise Missing where there is no manifest, or a file differs from it."""
    try:
        found = bundle.verify(evidence.run)
    except bundle.NoManifest as none:
        raise Missing(str(none)) from none
    if found.changed:
        raise Missing(f"{len(found.changed)} files differ from the manifest: {'; '.join(found.changed[:3])}")
    return f"{found.files} files as sealed"


def offloading_keeps_tokens(evidence: Evidence) -> str:
    """Count the checks that live runs made. Raise Missing where there are none, or one failed."""
    outcomes = [(name, ok) for record in evidence.results.all_records for name, ok in record.checks.items()]
    if not outcomes:
        raise Missing("no record holds a check")
    if broken := sorted({name for name, ok in outcomes if not ok}):
        raise Missing(f"broken: {'; '.join(broken[:3])}")
    return f"{len({name for name, _ in outcomes})} checks held in every record"


def canary_fails(evidence: Evidence) -> str:
    """Count the canaries that failed as they must. Raise Missing where there is none, or one did not fail."""
    found = controls.canaries(evidence.results)
    if not found:
        raise Missing("the run has no canary cell")
    if broken := [canary.result for canary in found if canary.passed is False]:
        raise Missing("; ".join(broken))
    if not any(canary.passed for canary in found):
        raise Missing("no canary could tell: the sound scores are near guessing")
    return f"{sum(bool(canary.passed) for canary in found)} canaries fell as they should"


def failures_are_shown(evidence: Evidence) -> str:
    """Raise Missing where a cell has no record, and its machine was large enough for it."""
    without = (*evidence.results.absent, *evidence.results.left_out)
    if unsaid := [cell for cell, _ in without if cell not in evidence.page]:
        raise Missing(f"{len(unsaid)} cells without a record are not on the page; build it again")
    if evidence.results.absent:
        raise Missing(f"{len(evidence.results.absent)} cells have no record (the page lists them)")
    left_out = len(evidence.results.left_out)
    return f"no cell failed; {left_out} ask for more than the machine has" if left_out else "no cell failed"


def no_benchmark_is_detected(evidence: Evidence) -> str:
    """Raise NeedsReader: no test can decide this line."""
    raise NeedsReader("no test can show this; the code that ran is named by its commit and hashed in the manifest")
