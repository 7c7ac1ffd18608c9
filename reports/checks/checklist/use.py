"""Tests of lines 27 to 32: use by others."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata

from reports.checks import expected
from reports.checks.checklist.evidence import Evidence, Missing, NeedsReader


def cost_is_stated(evidence: Evidence) -> str:
    """Raise Missing unless the plan says how many minutes the run may take."""
    if not evidence.plan.get("minutes"):
        raise Missing("the plan does not say how long the run may take")
    return f"{evidence.plan['minutes']} minutes allowed, said by `python -m suites plan`"


def smoke_is_short(evidence: Evidence) -> str:
    """Raise Missing where smoke may take more than two minutes; NeedsReader for any other preset."""
    if evidence.results.preset != "smoke":
        raise NeedsReader("ask this of a run of the smoke preset")
    minutes = evidence.plan.get("minutes")
    if minutes is None or minutes > 2:
        raise Missing(f"smoke is allowed {minutes} minutes")
    return "this is one"


def licences(evidence: Evidence) -> str:
    """Raise Missing unless the installed package names a licence."""
    try:
        licence = metadata("mobile-moe").json.get("license_expression")
    except PackageNotFoundError:
        licence = None
    if not licence:
        raise Missing("the installed package names no licence")
    return f"{licence}; weights and data that ship with it are its own"


def one_command(evidence: Evidence) -> str:
    """Raise Missing unless there is a page and it names the command that builds it."""
    page = evidence.run / "report.html"
    if not page.is_file():
        raise Missing(f"there is no page; make it with: python -m reports build {evidence.run}")
    if "python -m reports build" not in page.read_text(encoding="utf-8", errors="replace"):
        raise Missing("the page does not name the command")
    return "python -m reports build"


def limits_are_stated(evidence: Evidence) -> str:
    """Raise Missing unless the page has a section on limits."""
    if "## Limits" not in evidence.page:
        raise Missing("the page has no section on limits")
    return "section 'Limits'"


def expected_is_kept(evidence: Evidence) -> str:
    """Raise Missing unless the preset's expected results are committed."""
    folder = expected.folder_of(evidence.results.preset)
    if not (folder / expected.CELLS).is_file():
        raise Missing(f"nothing is expected of preset {evidence.results.preset} yet; python -m reports expect makes it")
    return f"reports/expected/{folder.name}"
