"""A plugin of pytest that writes what became of each test as soon as it is known, and goes on where it was lost.

A failed CUDA kernel takes every later test of its process with it, and a crash the process itself. Called again, the
plugin leaves out what has begun before, in any part.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from suites.first_contact.findings import Finding, Kind, append, read

LOST_CODE = 70  # of a session that another process must go on with
LOST = ("CUDA error", "device-side assert")  # in a failure after which the card takes no more work of the process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--findings", type=Path, help="the file that outcomes are added to")
    parser.addoption("--part", default="tests", help="the part of the first contact that this is")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--findings") is not None:
        config.pluginmanager.register(Outcomes(config.getoption("--findings"), config.getoption("--part")))


class Outcomes:
    """What became of each test: its name, "passed", "failed" or "skipped", and why."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part, self._lost = path, part, False

    def _say(self, kind: Kind, name: str, detail: str = "", value: float | None = None) -> None:
        append(self._path, Finding(self._part, kind, name, value, "s" if value is not None else "", detail))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        begun = {one.name for one in read(self._path) if one.kind == "began"}
        items[:] = [item for item in items if item.nodeid not in begun]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say("failed", report.nodeid, report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say("began", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._lost = self._lost or any(word in report.longreprtext for word in LOST)
            self._say("failed", report.nodeid, report.longreprtext, report.duration)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self._say("skipped", report.nodeid, str(reason))
        elif report.when == "call":
            self._say("passed", report.nodeid, "", report.duration)

    def pytest_runtest_logfinish(self) -> None:
        if self._lost:
            pytest.exit("the card takes no more work of this process; another one goes on", returncode=LOST_CODE)
