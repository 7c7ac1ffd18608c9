"""The evidence that each line of the checklist examines, and the two exceptions by which a line answers."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reports.data.results import Results, read
from reports.pages.content import PAPER
from suites.record import Record, RunFolder
from suites.run_files import read_plan


class Missing(Exception):
    """A line does not hold; the message says what is missing."""


class NeedsReader(Exception):
    """No test can decide this line; the message says where a reader should look."""


@dataclass(frozen=True)
class Evidence:
    """A run folder, its records and its page, read once."""

    run: Path
    results: Results
    plan: dict[str, Any]
    paper: dict[str, Any]
    page: str

    @property
    def measured(self) -> list[Record]:
        """Return the records whose times come from a GPU's clock."""
        return [record for record in self.results.scored if record.scope.startswith("gpu")]

    def same_work(self) -> Iterator[list[Record]]:
        """Yield the groups of cells that must have had the same work: one model, task, hardware and seed."""
        groups: dict[tuple, list[Record]] = {}
        for record in self.results.scored:
            groups.setdefault((record.model, record.task, record.hardware, record.seed), []).append(record)
        yield from groups.values()

    def require_config(self, *names: str) -> None:
        """Raise Missing unless every record's config has all of these names."""
        for name in names:
            lacking = [r.id for r in self.results.scored if r.config.get(name) is None]
            if lacking:
                raise Missing(f"{len(lacking)} records do not say their {name}")


def gather(run: Path) -> Evidence:
    """Read a run folder; a run without a page has an empty one. Raise NoResults as `results.read` does."""
    page = run / "report.md"
    return Evidence(
        run,
        read(run),
        asdict(read_plan(RunFolder(run).plan)),
        tomllib.loads(PAPER.read_text(encoding="utf-8")),
        page.read_text(encoding="utf-8", errors="replace") if page.is_file() else "",
    )
