"""Tables read back from a page that was written as Markdown.

Of a run whose page is committed only the page and the exact facts of its cells are at hand, no records. Other pages and
figures that quote it take their numbers from the page itself, so that both say the same.
"""

from __future__ import annotations

import re

from reports.elements.escapes import of_markdown
from reports.elements.page import Table
from reports.stats.intervals import Interval

_INTERVAL = re.compile(r"([+-]?[\d.]+)x? \[([+-]?[\d.]+), ([+-]?[\d.]+)\]")


def read_tables(page: str) -> dict[tuple[str, str], Table]:
    """Return every table of a page by (heading above it, caption); the rows are text as it stands in the cells."""
    found: dict[tuple[str, str], Table] = {}
    heading = caption = ""
    lines: list[str] = []
    for line in (*page.splitlines(), ""):
        if line.startswith("| "):
            lines.append(line)
            continue
        if lines:
            head, _, *rows = (_cells(row) for row in lines)
            found[heading, caption] = Table(caption, head, tuple(rows))
            lines = []
        if line.startswith("#"):
            heading = of_markdown(line.lstrip("#").strip())
        elif line.startswith("**") and line.endswith("**"):
            caption = of_markdown(line[2:-2])
    return found


def _cells(line: str) -> tuple[str, ...]:
    return tuple(of_markdown(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1])


def columns(table: Table, *names: str) -> list[tuple[str, ...]]:
    """Return the rows of a table with the named columns alone, in that order. Raise ValueError if one is missing."""
    places = [table.head.index(name) for name in names]
    return [tuple(row[place] for place in places) for row in table.rows]


def interval(text: str) -> Interval | None:
    """Return the interval that a cell shows, as `2.15x [1.95, 2.36]` or `-0.9 [-2.1, +0.4]`; None if it shows none."""
    found = _INTERVAL.fullmatch(text)
    return Interval(*(float(part) for part in found.groups())) if found else None
