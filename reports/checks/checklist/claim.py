"""Tests of lines 1 to 5: claim and scope."""

from __future__ import annotations

from reports.checks.checklist.evidence import Evidence, Missing
from reports.tables.overview import verdicts
from reports.verdict import RULE


def claims_are_data(evidence: Evidence) -> str:
    """Count the claims of paper.toml. Raise Missing where one has no source."""
    claims = [name for name, claim in evidence.paper.items() if isinstance(claim, dict) and "claim" in claim]
    if lacking := [name for name in claims if not evidence.paper[name].get("source")]:
        raise Missing(f"no source for {', '.join(lacking)}")
    return f"{', '.join(claims)} in paper.toml"


def verdict_for_each_claim(evidence: Evidence) -> str:
    """Count the verdicts. Raise Missing where a claim has no value."""
    rows = verdicts(evidence.results, evidence.paper, trusted=True).rows
    if empty := [f"{row[0]} of {row[2]} ({row[3]})" for row in rows if row[5] == "MISSING"]:
        raise Missing(f"no value for {'; '.join(empty)}")
    return f"{len(rows)} verdicts"


def rule_is_printed(evidence: Evidence) -> str:
    """Raise Missing unless the page prints the rule for verdicts."""
    if RULE not in evidence.page:
        raise Missing("the page does not print the rule; build it again")
    return "the rule is code and is printed"


def deviations_are_listed(evidence: Evidence) -> str:
    """Raise Missing unless the page lists all that paper.toml calls ours or unknown."""
    if not all(line in evidence.page for key in ("ours", "unknown") for line in evidence.paper["known"][key]):
        raise Missing("the page does not list what is ours and what is unknown")
    return "section 'Whose is what'"


def every_record_is_stamped(evidence: Evidence) -> str:
    """List the stamps. Raise Missing where a record has none, or the page does not print one."""
    if bare := [r.id for r in evidence.results.scored if not (r.scope and r.weights)]:
        raise Missing(f"{len(bare)} records have no stamp")
    stamps = {f"{r.scope}, {r.weights}" for r in evidence.results.scored}
    if not all(stamp in evidence.page for stamp in stamps):
        raise Missing("the page does not print the stamp of every record; build it again")
    return "; ".join(sorted(stamps))
