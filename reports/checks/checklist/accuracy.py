"""Tests of lines 18 to 20: accuracy."""

from __future__ import annotations

from reports.checks.checklist import recomputed
from reports.checks.checklist.evidence import Evidence, Missing, NeedsReader
from reports.stats.power import PUBLISHED


def answers_are_kept(evidence: Evidence) -> str:
    """Count the answers. Raise Missing where a record has none, or a wrong score, or the page no paired difference."""
    if empty := [r.id for r in evidence.results.scored if not r.items]:
        raise Missing(f"{len(empty)} records hold no item")
    if "McNemar" not in evidence.page or "difference to full K" not in evidence.page:
        raise Missing("the page shows no paired difference")
    made = (*evidence.results.scored, *evidence.results.controls)
    if wrong := next((f"record {r.id}: {why}" for r in made if (why := recomputed.wrong_scores(r))), None):
        raise Missing(wrong)
    if others := {r.task for r in made if recomputed.is_of_other_items(r)}:
        raise NeedsReader(f"{', '.join(sorted(others))}: other items than those shipped here, so no score was repeated")
    again = sum(len(r.items) for r in evidence.results.scored if recomputed.is_of_other_items(r) is False)
    return (
        f"{sum(len(r.items) for r in evidence.results.scored):,} answers; {again:,} scored again; "
        "differences are paired"
    )


def margin_is_stated(evidence: Evidence) -> str:
    """Raise Missing unless the page states the margin and the power of so many items."""
    margin = evidence.paper["accuracy"]["margin_points"]
    if f"-{margin:g} point" not in evidence.page or not all(name in evidence.page for name, _ in PUBLISHED):
        raise Missing("the page does not state the margin, or not what so many items can show")
    return f"{margin:g} point, with the power of the comparison beside it"


def items_are_sampled(evidence: Evidence) -> str:
    """Raise Missing where a cell's items are the first of its task; NeedsReader where the task's size is unknown."""
    for record in evidence.results.scored:
        docs, task_items = [item.doc for item in record.items], record.config.get("task_items")
        if len(docs) < 8 or docs != list(range(len(docs))) or len(docs) == task_items:
            continue
        if task_items is None:
            raise NeedsReader(f"{record.model} on {record.task} has items 0 to {docs[-1]}; of how many is not recorded")
        raise Missing(f"{record.model} on {record.task}: the items are the first {len(docs)} of {task_items}")
    return "seeded; the numbers of the items are in the records"
