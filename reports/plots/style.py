"""Style of every figure: Okabe and Ito's colours, with marks, dashes or hatches too, on light and on dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from reports.elements.escapes import on_one_line
from reports.elements.page import Figure, Table
from reports.elements.slug import slug
from reports.plots.compact import compact

# A picture keeps its text, which whoever shows it draws in a font of theirs.
warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#999999",
)
INK = "#010203"  # stands for the page's own text colour until the figure is SVG
STYLE: Any = {
    "svg.hashsalt": "mobile",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a "$" in a name is text
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "figure.dpi": 72,
}
COLOURS, DASHES, MARKS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, INK, GREY), ("-", "--", "-.", ":") * 2, "osD^vPXd"
LINES = tuple(zip(COLOURS, DASHES, MARKS, strict=True))
SIDES = ((6, "left"), (-6, "right"), (0, "center"))  # points of width, and the end of the label that is there
LABEL_STEPS = range(0, 127, 14)  # points of height that a label is moved from its point
LONGEST = 80  # characters of a name in a picture, which is as wide as its longest text
TAG = re.compile(r"<[^>]+>")
ID = re.compile(r'\bid="|url\(#|href="#')


def named(text: str) -> str:
    """Return a name of a record as a figure shows it: on one line, and cut where it is very long."""
    line = on_one_line(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def figure(name: str, caption: str, drawn: Any, data: Table) -> Figure:
    """Close a matplotlib figure and return its SVG, in the page's text colour, each id prefixed by the slug of `name`.

    Only tags are changed: what is between them is text, whatever it says.
    """
    prefix = slug(name)

    def ours(tag: re.Match[str]) -> str:
        return compact(ID.sub(lambda found: f"{found[0]}{prefix}-", tag[0].replace(INK, "currentColor")))

    out = io.StringIO()
    drawn.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    plt.close(drawn)
    text = out.getvalue()
    text = TAG.sub(ours, text[text.index("<svg") :])
    return Figure(prefix, caption, text, data)


def legend_above(axes: Any, columns: int) -> None:
    """Put the legend above the axes, where it hides nothing."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=columns)


def label_points(
    axes: Any, labels: Sequence[tuple[str, float, float]], bars: Sequence[tuple[float, float, float]] = ()
) -> None:
    """Write each (text, x, y) beside its point, inside the axes' height, where it covers no other and none before it.

    Right of the point and above it if that is free, else below, farther off with a line to it, left, or across. `bars`
    (x, low, high) are kept free, too. Nothing more may be drawn after.
    """
    axes.autoscale_view()  # now: matplotlib would do it at the first draw, after the places below were measured
    at = axes.transData.transform([(x, y) for _, x, y in labels])
    taken: list[Any] = [Bbox.from_bounds(left - 4, below - 4, 8, 8) for left, below in at]
    for x, low, high in bars:
        ends = axes.transData.transform([(x, low), (x, high)])
        taken.append(Bbox([ends[0] - 3, ends[1] + 3]))
    inside = axes.get_window_extent()
    for text, x, y in labels:
        for (right, aligned), away, up in product(SIDES, LABEL_STEPS, (5, -13)):
            spot = {"xytext": (right, up + (away if up > 0 else -away)), "ha": aligned}
            drawn = axes.annotate(named(text), (x, y), textcoords="offset points", color=INK, **spot)
            box = drawn.get_window_extent()
            within = inside.y0 <= box.y0 and box.y1 <= inside.y1 and inside.x0 <= box.x0
            if within and not any(box.overlaps(other) for other in taken):
                break
            drawn.remove()
        else:  # nowhere is free: above its point, over whatever is there
            away, spot = 0, {"xytext": (6, 5), "ha": "left"}
            drawn = axes.annotate(named(text), (x, y), textcoords="offset points", color=INK, **spot)
            box = drawn.get_window_extent()
        if away:
            start = axes.transData.transform((x, y))
            end = start + [each * axes.figure.dpi / 72 for each in spot["xytext"]]
            ends = axes.transData.inverted().transform([start + 0.2 * (end - start), end])
            axes.add_artist(Line2D(*ends.T, color=GREY, linewidth=0.6))
        taken.append(box)


def curves(
    name: str, caption: str, points: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str
) -> Figure | None:
    """Draw one line a name, labelled at its end, each with its colour, dashes and mark; None without lines."""
    if not points:
        return None
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 4.2))
        ends = []
        for (label, line), (colour, dashes, mark) in zip(points.items(), LINES * 4, strict=False):
            xs, ys = zip(*sorted(line), strict=True)
            axes.plot(xs, ys, color=colour, linestyle=dashes, marker=mark, markersize=4)
            ends.append((ys[-1], xs[-1], label, colour))
        gap, last = 0.045 * (axes.get_ylim()[1] - axes.get_ylim()[0]), -1e9
        for end, right, label, colour in sorted(ends):
            last = max(end, last + gap)
            # annotation_clip: a label pushed above the axes must still be drawn
            axes.annotate(
                named(label),
                (right, last),
                textcoords="offset points",
                xytext=(8, -3),
                color=colour,
                annotation_clip=False,
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        rows = tuple((label, f"{a:g}", f"{b:.4g}") for label, line in points.items() for a, b in sorted(line))
        return figure(name, caption, drawn, Table(f"{y.capitalize()}, by {x}", ("line", x, y), rows))
