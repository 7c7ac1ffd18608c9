"""Tests of lines 1 to 5: claim and scope."""

from __future__ import annotations

from reports.checks.checklist.evidence import Evidence, Missing
from reports.tables.overview import verdicts
from reports.verdict import RULE


def claims_are_data(seen: Evidence) -> str:
    """Count the claims of paper.toml. Raise Missing where one has no source."""
    held = [name for name, claim in seen.paper.items() if isinstance(claim, dict) and "claim" in claim]
    if lacking := [name for name in held if not seen.paper[name].get("source")]:
        raise Missing(f"no source for {', '.join(lacking)}")
    return f"{', '.join(held)} in paper.toml"


def verdict_for_each_claim(seen: Evidence) -> str:
    """Count the verdicts. Raise Missing where a claim has no value."""
    rows = verdicts(seen.results, seen.paper, trusted=True).rows
    if empty := [f"{row[0]} of {row[2]} ({row[3]})" for row in rows if row[5] == "MISSING"]:
        raise Missing(f"no value for {'; '.join(empty)}")
    return f"{len(rows)} verdicts"


def rule_is_printed(seen: Evidence) -> str:
    """Raise Missing unless the page prints the rule for verdicts."""
    if RULE not in seen.page:
        raise Missing("the page does not print the rule; build it again")
    return "the rule is code and is printed"


def deviations_are_listed(seen: Evidence) -> str:
    """Raise Missing unless the page lists all that paper.toml calls ours or unknown."""
    if not all(line in seen.page for key in ("ours", "unknown") for line in seen.paper["known"][key]):
        raise Missing("the page does not list what is ours and what is unknown")
    return "section 'Whose is what'"


def every_record_is_stamped(seen: Evidence) -> str:
    """List the stamps. Raise Missing where a record has none, or the page does not print one."""
    if bare := [r.id for r in seen.results.records if not (r.scope and r.weights)]:
        raise Missing(f"{len(bare)} records have no stamp")
    stamps = {f"{r.scope}, {r.weights}" for r in seen.results.records}
    if not all(stamp in seen.page for stamp in stamps):
        raise Missing("the page does not print the stamp of every record; build it again")
    return "; ".join(sorted(stamps))
