"""Turn a run's records into a report: `python -m reports build [RUN]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from reports.content import build
from reports.results import NoResults, latest_run, read
from reports.write import write


def main() -> int:
    top = argparse.ArgumentParser(prog="python -m reports", description=__doc__.split(":")[0])
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    sub = verbs.add_parser("build", help="write report.md and report.html into the run folder")
    sub.add_argument("run", nargs="?", type=Path, help="run folder (default: that of the last run)")
    options = top.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    begun = time.monotonic()
    try:
        run = options.run or latest_run()
        results = read(run)
        report = build(results)
    except NoResults as none:
        print(f"error: {none}", file=sys.stderr)
        return 2
    paths = write(report, run)
    console.print(f"\n{report.opening}\n", highlight=False)
    for section in report.sections[:1]:
        for table in section.tables:
            shown = RichTable(*table.head, title=table.caption, title_justify="left")
            for row in table.rows:
                shown.add_row(*row)
            console.print(shown)
    for cell, why in results.absent:
        console.print(f"[red]no record[/] {cell}: {why}", highlight=False)
    if report.alarm:
        console.print(f"[bold red]{report.alarm}")
    console.print(
        f"report: {paths[1]} (and {paths[0].name}); written in {time.monotonic() - begun:.0f} s", highlight=False
    )
    return 1 if report.alarm or results.absent else 0


if __name__ == "__main__":
    sys.exit(main())
