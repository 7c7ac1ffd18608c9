"""The verbs of `python -m reports`: each prints its findings and returns the exit code.

Exit codes: 0 all well, 1 something to heed, 2 (by __main__) nothing to work on.
"""

from __future__ import annotations

import gc
import hashlib
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from reports.checks import abba as trials
from reports.checks import benchmarks as micro
from reports.checks import bundle, expected, readme, submission
from reports.checks.checklist import evidence, lines
from reports.checks.difference import difference
from reports.data.results import latest_run, read
from reports.elements.console import console as new_console
from reports.elements.escapes import on_one_line, visible
from reports.elements.page import Table
from reports.pages import collected, content, write
from reports.pages.submitted import Submitted
from suites.record import write_json

SHOWN = 40  # lines of a long list on the screen


def _say(console: Console, word: str, style: str, rest: str) -> None:
    """Print a line whose first word is coloured."""
    console.print(Text.assemble((word, style), rest))


def _print(console: Console, table: Table) -> None:
    """Print a table, turned on its side where its words are wider than the console and would be cut."""
    lines = (table.head, *table.rows)
    turned = tuple(zip(*lines, strict=True))
    if _narrowest(lines) > console.width >= _narrowest(turned):
        lines = turned
    shown = RichTable(*lines[0], title=table.caption, title_justify="left")
    for row in lines[1:]:
        shown.add_row(*row)
    console.print(shown)


def _narrowest(lines: Sequence[Sequence[str]]) -> int:
    """Return the fewest columns of a console that show every word of a table whole."""
    words = [[len(word) for cell in column for word in cell.split()] for column in zip(*lines, strict=True)]
    return sum(3 + max(column, default=0) for column in words) + 1


def build(options: Namespace) -> int:
    """Write every output, seal the folder, print the overview and the page's path; 1 on an alarm or a missing cell."""
    console, begun = new_console(), time.monotonic()
    run: Path = options.run or latest_run()
    results = read(run)
    gc.freeze()  # the records stay, so that no later collection need look at them
    report = content.build(results)
    paths = write.write(report, results, run)
    seal = bundle.seal(run, results)
    if report.alarm:
        console.print(report.alarm, style="bold red")
    for paragraph in report.opening[1:]:
        console.print(f"\n{paragraph}\n")
    for section in report.sections[:2]:
        for table in (table for table in section.tables if table.rows):
            _print(console, table)
        if not any(table.rows for table in section.tables):
            console.print(f"{section.heading}: {section.paragraphs[0]}" if section.paragraphs else section.heading)
    if results.left_out:
        cell, why = results.left_out[0]
        _say(console, "left out", "yellow", f" {len(results.left_out)} cells, first {on_one_line(cell)}: {why}")
    for cell, why in results.absent[:SHOWN]:
        _say(console, "no record", "red", f" {on_one_line(cell)}: {why}")
    if len(results.absent) > SHOWN:
        console.print(f"and {len(results.absent) - SHOWN} more cells without a record, all on the page")
    console.print(
        f"report: {paths[0]} (beside it report.md, tables.tex, cells.csv, timeline.json for ui.perfetto.dev); "
        f"written in {time.monotonic() - begun:.1f} s ({time.process_time():.1f} s of processor time)\n"
        f"manifest: SHA-256 {seal}"
    )
    return 1 if report.alarm or results.absent else 0


def check(options: Namespace) -> int:
    """Print the checklist; 1 if a line is missing."""
    console = new_console()
    table = lines.table(evidence.gather(options.run or latest_run()))
    _print(console, table)
    counted = Counter(row[2] for row in table.rows)
    console.print(", ".join(f"{count} {result}" for result, count in counted.items()))
    return 1 if counted[lines.MISSING] else 0


def verify(options: Namespace) -> int:
    """Print what differs from the manifest; 1 if a file of the bundle does."""
    console = new_console()
    run = options.run or latest_run()
    found = bundle.verify(run)
    for line in found.changed:
        _say(console, "changed", "bold red", f" {line}")
    for line in found.surroundings[:SHOWN]:
        console.print(f"not as when it was sealed: {line}")
    if len(found.surroundings) > SHOWN:
        console.print(f"and {len(found.surroundings) - SHOWN} more")
    if not found.changed:
        console.print(f"{run}: all {found.files} files are as they were sealed")
    return 1 if found.changed else 0


def diff(options: Namespace) -> int:
    """Print what changed between two runs; 1 if something of it matters."""
    console = new_console()
    found = difference(read(options.first), read(options.second))
    for table in (found.surroundings, found.cells):
        if table.rows:
            _print(console, table)
    for line in found.matters or ("Nothing that matters: the same cells, texts, counters and times.",):
        console.print(line)
    return 1 if found.matters else 0


def expect(options: Namespace) -> int:
    """Save a run as what later runs must give; 1, and nothing saved, if a control is broken or a cell is missing."""
    console = new_console()
    results = read(options.run or latest_run())
    report = content.build(results)
    without = len(results.absent) + len(results.left_out)
    if report.alarm or without:
        console.print(f"not kept: {report.alarm or f'{without} cells have no record'}")
        return 1
    page = write.markdown(report, figures=False)
    for path in expected.save(results, page, options.out or expected.folder_of(results.preset)):
        console.print(f"{path} ({path.stat().st_size / 1024:,.0f} KiB)")
    if readme.SOURCE.parent.name == results.preset:
        console.print("The READMEs quote this run; bring them up to date with: python -m reports readme")
    return 0


def write_readme(options: Namespace) -> int:
    """Rewrite the tables of the READMEs and their figure; with --check, print which are stale, 1 if any is."""
    paths = readme.stale() if options.check else readme.write()
    for path in paths:
        print(f"{visible(str(path))}: {'not as the report says' if options.check else 'written'}")
    print(f"{len(paths)} of {len(readme.texts())} files {'are stale' if options.check else 'changed'}")
    return 1 if options.check and paths else 0


def gate(options: Namespace) -> int:
    """Print each fact that differs from the expectation; 1 if any does."""
    console = new_console()
    results = read(options.run or latest_run())
    found = expected.gate(results, options.against or expected.folder_of(results.preset))
    for name, facts, unlike in (
        ("T0", "tokens and counters", found.t0),
        ("T1", "virtual times and speedups", found.t1),
    ):
        for line in unlike[:SHOWN]:
            _say(console, name, "bold red", f" {line}")
        if len(unlike) > SHOWN:
            console.print(f"and {len(unlike) - SHOWN} more")
        console.print(f"{name} ({facts}): {f'{len(unlike)} differ' if unlike else 'as expected'}")
    console.print(f"{found.cells} cells and {found.speedups} speedups were expected; tolerance zero")
    if found.t0:
        console.print(
            "A processor with other vector instructions (AVX2, AVX-512), even of the same name, rounds a model's "
            "arithmetic otherwise; made_on in the expectation says where it was made."
        )
    return 1 if found.t0 or found.t1 else 0


def submit(options: Namespace) -> int:
    """Pack a finished run into one archive, and print what others will read of it. Raise Unsubmittable."""
    run: Path = options.run or latest_run()
    path = options.out or submission.default_path(run)
    about = submission.pack(run, path, options.by, options.as_it_is)
    print(f"{visible(str(path))}: {len(about.files)} files, {path.stat().st_size / 2**20:.1f} MiB", end="; ")
    print(f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    for environment in submission.environments(read(run)):
        print(f"it names this machine as: {visible(environment)}")
    for line in about.missing:
        print(f"it says that the checklist misses line {visible(line)}")
    return 0


def collect(options: Namespace) -> int:
    """Write the page of several archives, each run of which counts once, and print its path. Raise Unsubmittable."""
    found: dict[str, Submitted] = {}
    twice = []
    for path in options.archives:
        one = submission.unpacked(path)
        if one.sha256 in found:
            twice.append(path.name)
            print(f"{visible(str(path))}: the same run as {visible(found[one.sha256].archive)}, counted once")
        found.setdefault(one.sha256, one)
    report = collected.report(list(found.values()), twice)
    console = new_console()
    for section in report.sections:
        console.print(section.heading, style="bold")
        for paragraph in section.paragraphs:
            console.print(paragraph)
        for table in section.tables:
            _print(console, table)
    print(f"report: {visible(str(write.write_pages(report, options.out)[0]))} (beside it report.md)")
    return 0


def abba(options: Namespace) -> int:
    """Print the judgement of a trial, and write it into the trial's folder; 1 if it is a regression."""
    console = new_console()
    folder = options.trial or trials.latest()
    trial = trials.read(folder)
    found = trials.judge(trial)
    report = trials.report(trial, found)
    page = write.markdown(report)
    write.write_anew(folder / "summary.md", page)
    write_json(folder / "judgement.json", asdict(found))
    if options.summary is not None:
        with options.summary.open("a", encoding="utf-8") as file:
            file.write(f"{page}\n")
    for warning in found.warnings:
        console.print(warning, style="yellow")
    for section in report.sections:
        for table in section.tables:
            _print(console, table)
            if table.note:
                console.print(table.note)
    for fact, value in report.facts:
        console.print(f"{fact}: {value}")
    if report.alarm is not None:
        console.print(report.alarm, style="bold red")
    elif any(line.verdict == trials.INCONCLUSIVE for line in found.lines):
        console.print("INCONCLUSIVE: no regression is shown and none is ruled out; more --pairs narrow the interval.")
    console.print(f"{folder / 'summary.md'}, judgement.json, {trials.TRIAL}", soft_wrap=True)
    return 1 if found.failed else 0


def benchmarks(options: Namespace) -> int:
    """Print pytest-benchmark's comparison of two files. Raise UnlikeMachines unless one machine made both."""
    micro.same_machine(options.base, options.head)
    return micro.compare(options.base, options.head)
