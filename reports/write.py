"""Put a report on disk: Markdown with its figures beside it, and one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from reports.content import Report


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.md, its figures and report.html into `folder`; returns the paths."""
    templates = Environment(
        loader=PackageLoader("reports"), autoescape=select_autoescape(["html.j2"]), undefined=StrictUndefined,
        trim_blocks=False, keep_trailing_newline=True,
    )  # fmt: skip
    written = []
    texts = {
        f"report.{kind}": templates.get_template(f"report.{kind}.j2").render(report=report) for kind in ("md", "html")
    }
    texts |= {file: svg for section in report.sections for file, _, svg in section.figures}
    for name, text in texts.items():
        path = folder / name
        path.write_text(text)
        written.append(path)
    return written
