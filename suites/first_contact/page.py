"""The page of a first contact: what passed, failed and was measured in its first lines, and all the rest below them.

It is one HTML file that needs no other. Every text in it is shown as it is: messages of a driver are anyone's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from html import escape

from mobile.visible import visible
from suites.first_contact.findings import Finding, interrupted
from suites.first_contact.reading import CLOCK

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } td, th { padding: .15rem .9rem .15rem 0; text-align: left;
vertical-align: top; border-bottom: 1px solid #e2e2e2; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; white-space: pre-wrap; } .failed { color: #a40000; }
"""
FILES = {
    "findings.jsonl": "every finding, a JSON line each, in the order in which they came",
    "log.txt": "what each part printed: the beginning and the end",
    "records.zip": "a run folder: records of the timed cells, calibrations, notes of failures; unpack it for python -m "
    "reports build FOLDER",
    "card.json": "the profile of this machine, for --hardware card.json",
    "traces.zip": "traces of torch.profiler, for ui.perfetto.dev",
}
NOT_MEASURED = (
    "Weights are synthetic and random. The clock's error sets a computed time against a measured one; nothing here is "
    "the paper's, and no speed of a strategy is claimed."
)


def page(findings: Sequence[Finding], parts: Sequence[str], title: str) -> str:
    """Return the page of these findings; `parts` are the names of all parts, in order."""
    measured = [one for one in findings if one.kind == "measured"]
    first = [one for one in findings if one.first]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{_text(title)}</h1>",
            *(f"<p>{_text(line)}</p>" for line in answer(findings, parts)),
            "<h2>Measured first</h2>" if first else "",
            _numbers(first),
            "<h2>Failed</h2>" if failures(findings) else "",
            *map(_failure, failures(findings)),
            "<h2>Parts</h2>",
            _parts(findings, parts),
            "<h2>All that was measured</h2>" if measured else "",
            _numbers(measured),
            "<h2>Skipped, and notes</h2>",
            _table((), _grouped(findings)),
            "<h2>Where details lie</h2>",
            _table((), FILES.items()),
            f"<p>{_text(NOT_MEASURED)}</p></body></html>\n",
        ]
    )


def answer(findings: Sequence[Finding], parts: Sequence[str]) -> list[str]:
    """Return the lines that come first: how many parts and tests passed, and which failed."""
    states = {name: state(findings, name) for name in parts}
    wrong = [f"{name} ({how})" for name, how in states.items() if how not in ("done", "skipped")]
    done = sum(how == "done" for how in states.values())
    skipped = [name for name, how in states.items() if how == "skipped"]
    lines = [f"{done} of {len(parts)} parts are done; failed or not reached: {', '.join(wrong) or 'none'}."]
    if skipped:
        lines.append(f"Skipped, since they need a GPU and torch finds none here: {', '.join(skipped)}.")
    count = {kind: sum(is_test(o) and o.kind == kind for o in findings) for kind in ("passed", "failed", "skipped")}
    lost = sum(is_test(o) for o in interrupted(list(findings)))
    if any(count.values()) or lost:
        lines.append(
            f"Tests on this card: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped, "
            f"{lost} began and did not end."
        )
    errors = sorted((o for o in measured_by_clock(findings)), key=lambda o: abs(o.value or 0))
    if errors:
        middle, worst = statistics.median(abs(o.value or 0) for o in errors), errors[-1]
        lines.append(
            f"The virtual clock beside {len(errors)} timed cells: median error {middle:.1f} %, worst "
            f"{worst.value:+.1f} % ({worst.name.partition(': ')[2]})."
        )
    return lines


def measured_by_clock(findings: Iterable[Finding]) -> list[Finding]:
    """Return the clock's errors in percent, a cell each."""
    return [one for one in findings if one.kind == "measured" and one.name.startswith(CLOCK)]


def _grouped(findings: Iterable[Finding]) -> list[tuple[str, str, str]]:
    """Return a row for each thing skipped and each note; tests that were skipped for one reason are one."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for one in findings:
        if one.kind in ("skipped", "note"):
            name = "tests" if is_test(one) else one.name
            rows.setdefault((one.part, name, one.detail), []).append(one.name)
    return [
        (part, f"{len(names)} tests skipped" if name == "tests" else name, detail)
        for (part, name, detail), names in rows.items()
    ]


def failures(findings: Sequence[Finding]) -> list[Finding]:
    """Return what failed, and the tests during which a process was lost."""
    return [
        *(one for one in findings if one.kind == "failed"),
        *(one for one in interrupted(list(findings)) if is_test(one)),
    ]


def state(findings: Iterable[Finding], part: str) -> str:
    """Return what became of a part: done, failed, skipped, running, or not reached."""
    of_part = [one for one in findings if one.part == part]
    own = {one.kind for one in of_part if one.name == part}
    if any(one.kind == "failed" for one in of_part) or ("ended" in own and interrupted(of_part)):
        return "failed"
    return next(
        (word for kind, word in (("ended", "done"), ("skipped", "skipped"), ("began", "running")) if kind in own),
        "not reached",
    )


def is_test(one: Finding) -> bool:
    """Return whether it is about a test, by pytest's way to name one."""
    return "::" in one.name


def _text(text: str) -> str:
    return escape(visible(text))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts."""
    top = f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>" if body else "<p>None.</p>"


def _numbers(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f"<tr><td>{_text(o.part)}</td><td>{_text(o.name)}</td><td class=n>{number(o)}</td><td>{_text(o.unit)}</td>"
        f"<td>{_text(o.detail)}</td></tr>"
        for o in findings
    )
    return f"<table>{rows}</table>" if rows else ""


def number(finding: Finding) -> str:
    """Return the value with four digits, and all digits before the point; "" without one."""
    if finding.value is None:
        return ""
    return f"{finding.value:,.0f}" if abs(finding.value) >= 1000 else f"{finding.value:.4g}"


def _failure(one: Finding) -> str:
    detail = one.detail or "it began and did not end: its process was lost or stopped"
    return f"<h3 class=failed>{_text(one.part)}: {_text(one.name)}</h3><pre>{_text(detail)}</pre>"


def _parts(findings: Sequence[Finding], parts: Sequence[str]) -> str:
    ended = {one.part: one for one in findings if one.kind == "ended"}
    rows = []
    for name in parts:
        last = ended.get(name)
        seconds = "" if last is None or last.value is None else f"{last.value:.0f} s"
        rows.append((name, state(findings, name), seconds, "" if last is None else last.detail))
    return _table(("part", "state", "took", "what it is"), rows)
