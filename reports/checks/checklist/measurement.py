"""Tests of lines 12 to 17: measurement. A virtual clock has no noise, so guards against it apply to GPU times only."""

from __future__ import annotations

from collections.abc import Sequence

from reports.checks.checklist import recomputed
from reports.checks.checklist.evidence import Evidence, Missing
from reports.data import groups
from reports.data.compare import paired_items
from reports.data.fingerprint import VIRTUAL
from suites.record import Record

EXACT = "virtual clock: the same inputs give the same times, bit for bit"
PROMPTS, PROCESSES = 25, 3
NOISE = 0.02  # of a measured bandwidth


def _only_virtual(evidence: Evidence) -> bool:
    return all(record.scope == VIRTUAL for record in evidence.results.scored)


def _measured(evidence: Evidence, *names: str) -> str:
    for name in names:
        if lacking := [r.id for r in evidence.measured if r.config.get(name) is None]:
            raise Missing(f"{len(lacking)} measured records do not hold {name}")
    return f"{len(evidence.measured)} measured records hold {', '.join(names)}"


def warm_up_is_stored(evidence: Evidence) -> str:
    """Raise Missing where a measured record does not hold its warm-up."""
    return f"{EXACT}; nothing warms up" if _only_virtual(evidence) else _measured(evidence, "warmup")


def prompts_and_processes_suffice(evidence: Evidence) -> str:
    """Raise Missing where prompts are too few, or a measured record has too few processes."""
    for model in evidence.results.models:
        mobile = groups.mobile(evidence.results, model)
        for base, group in groups.baselines(evidence.results, "smallest", model).items():
            if mobile and (pairs := sum(map(len, paired_items(mobile, group)))) < PROMPTS:
                raise Missing(f"{model} against {base}: {pairs} pairs of prompts, of {PROMPTS} that are wanted")
    if _only_virtual(evidence):
        return f"at least {PROMPTS} pairs each; {EXACT}"
    for record in evidence.measured:
        if (record.config.get("processes") or 0) < PROCESSES:
            raise Missing(f"record {record.id} was timed in fewer than {PROCESSES} processes")
    return f"at least {PROMPTS} pairs and {PROCESSES} processes each"


def averaging_is_stated(evidence: Evidence) -> str:
    """Raise Missing unless the page says how speedups are averaged and shows tokens per second."""
    if "geometric mean over prompts" not in evidence.page or "tokens/s" not in evidence.page:
        raise Missing("the page has no speeds, or does not say how they are averaged")
    return "said and shown on the page"


def phases_are_timed_apart(evidence: Evidence) -> str:
    """Raise Missing where an item lacks the time of prefill or of decode, or the counters are not their sums."""
    if bare := [
        r.id for r in evidence.results.scored if any(i.ttft_ns is None or i.decode_ns is None for i in r.items)
    ]:
        raise Missing(f"{len(bare)} records lack one of the two times")
    results = evidence.results
    faults = [(r, recomputed.wrong_sums(r)) for r in (*results.scored, *results.controls)]
    faults += [(r, recomputed.longer_than_it_took(r)) for r in (*results.scripted, *results.references)]
    if wrong := next((f"record {r.id}: {why}" for r, why in faults if why), None):
        raise Missing(wrong)
    return "ttft_ns and decode_ns in every item; the counters are the items' sums"


def device_is_monitored(evidence: Evidence) -> str:
    """Raise Missing where a measured record has no telemetry."""
    if _only_virtual(evidence):
        return "no device: nothing to watch"
    if blind := [r.id for r in evidence.measured if not r.environment.get("telemetry")]:
        raise Missing(f"{len(blind)} measured records hold no telemetry")
    return f"{len(evidence.measured)} measured records hold telemetry"


def link_is_checked(evidence: Evidence) -> str:
    """Raise Missing where no bandwidth is recorded, or a cell's bytes exceed what the link can carry."""
    if _only_virtual(evidence):
        evidence.require_config("link_gb_per_s")
        _not_faster(evidence.results.scored, "link_gb_per_s", 1 + 1e-6)
        return "an assumed bandwidth, stated in every record, which no cell's bytes pass"
    found = _measured(evidence, "link_measured_gb_per_s")
    _not_faster(evidence.measured, "link_measured_gb_per_s", 1 + NOISE)
    return f"{found}, which no cell's bytes pass by more than {100 * NOISE:g} %"


def _not_faster(records: Sequence[Record], rate: str, slack: float) -> None:
    above = [
        f"{r.model} {r.task} {r.strategy}"
        for r in records
        if r.counters["decode_bytes"] > 1e9 * r.config[rate] * slack * r.counters["decode_seconds"]
    ]
    if above:
        raise Missing(f"bytes moved faster than the link allows in {'; '.join(above[:3])}")
