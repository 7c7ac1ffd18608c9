"""Timeline of link, GPU and CPU during a few decode tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from reports.data import groups
from reports.data.compare import strategy_name
from reports.data.results import Results
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, figure, named
from suites.record import Record

CAPTION = (
    "Three decode tokens. The link copies one expert at a time; the GPU computes or stalls. Where MoBiLE falls back, "
    "its big pass finds half of its experts in place and most of the others on their way."
)
KINDS = {
    "load": ("demand load", BLUE, 1, ""),
    "prefetch": ("prefetch", ORANGE, 1, "//"),
    "compute": ("compute", GREEN, 0, ""),
    "stall": ("stall", GREY, 0, "xx"),
    "cpu": ("CPU", PURPLE, 2, "--"),
}
LANES = ("GPU", "link", "CPU")
UNDER = {"stall": "compute"}  # drawn as one bar from the first to the last of both, with compute over it


def shown(results: Results, model: str) -> list[Record]:
    """Return the cells to draw: on-demand-overlap above MoBiLE, on the model's first task."""
    cells = {"model": model, "task": results.tasks(model)[0], "budget": "smallest"}
    found = results.select(strategy="on-demand-overlap", **cells)
    found += results.select(strategy="mobile", gamma=groups.default_gamma(results, model), **cells)
    return [record for record in found if record.timeline]


def token_timeline(results: Results, model: str) -> Figure | None:
    """Draw the events of a few tokens; None where no cell kept them."""
    records = shown(results, model)
    if not records:
        return None
    end = max(event[2] for record in records for event in record.timeline) / 1e6
    with plt.rc_context(STYLE):
        drawn, panels = plt.subplots(
            len(records), 1, figsize=(7.5, 1.3 * len(records) + 0.9), sharex=True, squeeze=False
        )
        used = {event[0] for record in records for event in record.timeline}
        lanes = LANES[: 1 + max(row for kind, (_, _, row, _) in KINDS.items() if kind in used)]
        rows: list[tuple[str, ...]] = []
        for axes, record in zip(panels[:, 0], records, strict=True):
            rows += _draw(axes, record)
            axes.set_yticks([0.5 + row for row in range(len(lanes))], lanes)
            axes.set_ylim(0, len(lanes))
            axes.set_xlim(0, end)
            axes.set_title(named(strategy_name(record)), loc="left", fontsize=10)
        panels[-1, 0].set_xlabel("milliseconds")
        handles = [
            plt.Rectangle((0, 0), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
            for kind, (label, colour, _, hatch) in KINDS.items()
            if kind in used
        ]
        drawn.legend(handles=handles, ncols=len(handles), frameon=False, loc="upper right")
        drawn.tight_layout()
        data = Table("Spans of the timeline", ("strategy", "what", "start ms", "milliseconds"), tuple(rows))
        return figure(f"timeline-{model}", CAPTION, drawn, data)


def _draw(axes: Any, record: Record) -> Iterator[tuple[str, ...]]:
    """Draw the events of one cell, a path a kind; yield the spans that were drawn."""
    for kind, (_, colour, row, hatch) in sorted(KINDS.items(), key=lambda each: each[0] not in UNDER):
        if all(event[0] != kind for event in record.timeline):
            continue
        kinds = (UNDER[kind], kind) if kind in UNDER else (kind,)
        spans = _merged([(event[1], event[2]) for event in record.timeline if event[0] in kinds])
        axes.add_artist(PathPatch(_bars(spans, row), facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0))
        for start, width in spans:
            yield strategy_name(record), " or ".join(kinds), f"{start:.4f}", f"{width:.4f}"


def _bars(spans: list[tuple[float, float]], row: int) -> Path:
    """Return all bars of a kind as one path, which is a fraction of the SVG that a path each would be."""
    corners = [
        corner
        for start, width in spans
        for corner in (
            (start, row + 0.1),
            (start + width, row + 0.1),
            (start + width, row + 0.9),
            (start, row + 0.9),
            (start, row + 0.1),
        )
    ]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(spans)
    return Path(corners, codes)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Join touching (start, end) spans in ns into (start, width) in ms, so that no seam is drawn between them."""
    joined: list[list[int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([start, end])
    return [(start / 1e6, (end - start) / 1e6) for start, end in joined]
