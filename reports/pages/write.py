"""Writing a report to disk: one HTML file that needs no other, and Markdown, LaTeX, CSV and a timeline beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from reports.data.results import Results
from reports.elements import escapes
from reports.elements.page import Report, Span
from reports.pages import csv_cells, latex, perfetto

# An SVG opened by itself, or shown in a Markdown page, has no text colour of its own.
STANDALONE = "<style>:root{color:#1b1b1b}@media (prefers-color-scheme:dark){:root{color:#e8e8e8}}</style>"


def write(report: Report, results: Results, folder: Path) -> list[Path]:
    """Write every output into `folder`; return the paths, the HTML page first. No symbolic link is followed."""
    texts = {
        "report.html": _render("report.html.j2", report),
        "report.md": markdown(report),
        "tables.tex": latex.tables(results, report.alarm),
        "cells.csv": csv_cells.csv_of(results).csv,
        "timeline.json": perfetto.trace(results),
    }
    for figure in report.figures:
        texts[f"figures/{figure.name}.svg"] = figure.svg.replace(">", f">{STANDALONE}", 1)
        texts[f"figures/{figure.name}.csv"] = figure.data.csv
    if (folder / "figures").is_symlink():
        (folder / "figures").unlink()
    (folder / "figures").mkdir(exist_ok=True)
    for stale in (folder / "figures").iterdir():
        stale.unlink()
    for name, text in texts.items():
        write_anew(folder / name, text)
    return [folder / name for name in texts]


def write_pages(report: Report, folder: Path) -> list[Path]:
    """Write the HTML page and the Markdown of a report without figures into `folder`; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.html": _render("report.html.j2", report), "report.md": markdown(report)}
    for name, text in texts.items():
        write_anew(folder / name, text)
    return [folder / name for name in texts]


def write_anew(path: Path, text: str) -> None:
    """Write a file anew: a link of that name in a folder that was passed around would lead to another file."""
    if path.is_symlink():
        path.unlink()
    path.write_text(text, encoding="utf-8")


def markdown(report: Report, figures: bool = True) -> str:
    """Return the page as Markdown; without figures it needs no file beside it."""
    if not figures:
        report = replace(report, sections=tuple(replace(section, figures=()) for section in report.sections))
    return _render("report.md.j2", report)


def _render(template: str, report: Report) -> str:
    templates = Environment(
        loader=PackageLoader("reports.pages"),
        autoescape=select_autoescape(["html.j2"]),
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "line": escapes.markdown,
        "paragraph": escapes.markdown_paragraph,
        "cell": escapes.markdown_cell,
        "code": escapes.markdown_code,
        "marked": _marked,
    }
    return templates.get_template(template).render(report=report).lstrip()


def _shown(value: Any) -> Any:
    """Return the value of an expression with what no page can hold made visible; markup of our own stays as it is."""
    return escapes.visible(value) if type(value) is str else value


def _marked(spans: Iterable[Span]) -> str:
    return "".join(f"⟦{span.text}⟧" if span.fell_back else span.text for span in spans)
