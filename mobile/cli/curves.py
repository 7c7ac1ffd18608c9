"""The plot of `mobile replay`: hit rate against device memory, one labelled curve a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

from mobile import outputs
from mobile.errors import Refused
from mobile.replay.replay import Outcome
from mobile.visible import on_one_line

# Okabe and Ito's colours (2008), told apart with any colour vision; yellow is left out, being faint on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vXP*h<>"
LINES = ("-", "--", "-.", ":")  # where curves cover each other, each still shows
FORMATS = (".svg", ".png")
LABEL_GAP = 0.045  # of the axis, between two labels


def check(path: Path) -> None:
    """Raise Refused, before anything is replayed, if the plot cannot be drawn or written."""
    if path.suffix.lower() not in FORMATS:
        raise Refused(f"Cannot draw {outputs.printable(path)}; name a file that ends in {' or '.join(FORMATS)}.")
    outputs.check_file(path)
    if find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib; pip install 'mobile-moe[harness]', or leave --plot out.")


def draw(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    """Write the plot; strategies without a hit rate are left out. Labels stand at the curves' right ends."""
    import matplotlib
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[float, float]]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.memory_nbytes):
        if outcome.hit_rate is not None:
            curves.setdefault(outcome.strategy, []).append((outcome.memory_nbytes / 2**30, outcome.hit_rate))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mobile", "text.parse_math": False}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        heights = _label_heights({name: points[-1][1] for name, points in curves.items()})
        styles = zip(cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
        for (name, points), (colour, marker, line) in zip(curves.items(), styles, strict=False):
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=6, linewidth=1.6)
            axes.annotate(
                on_one_line(name),
                xy=points[-1],
                xytext=(1.03, heights[name]),
                textcoords=axes.get_yaxis_transform(),
                color=colour,
                va="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5},
            )
        axes.set(
            xlabel="device memory (GiB)", ylabel="hit rate of decode", title=on_one_line(title), ylim=(-0.03, 1.03)
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        kind = path.suffix.lower().removeprefix(".")
        with outputs.open_atomic(path) as file:
            figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _label_heights(wanted: dict[str, float]) -> dict[str, float]:
    """Return heights as near to the wanted ones as possible without labels that overlap."""
    placed: dict[str, float] = {}
    lowest, highest = 0.0, 1.0
    for name, height in sorted(wanted.items(), key=lambda item: item[1]):
        placed[name] = max(height, lowest)
        lowest = placed[name] + LABEL_GAP
    for name in reversed(placed):
        placed[name] = min(placed[name], highest)
        highest = placed[name] - LABEL_GAP
    return placed
