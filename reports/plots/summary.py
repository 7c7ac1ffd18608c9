"""One figure for a reader in a hurry: each family's speed beside its accuracy, for full K, half of it, and MoBiLE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt

from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREEN, GREY, INK, ORANGE, STYLE, figure, named
from reports.stats.intervals import Interval

MARKS = {"lru": ("^", GREEN), "static-half": ("s", ORANGE), "mobile": ("o", BLUE)}
LABELS = {"lru": "lru: full K, cached", "static-half": "static-half: always K/2", "mobile": "MoBiLE"}
HEAD = ("family", "strategy", "speedup", "low", "high", "points", "low", "high")


@dataclass(frozen=True)
class Line:
    """One strategy on one family: its speedup, and the points it loses, which a lossless strategy has none of."""

    family: str
    strategy: str
    speedup: Interval
    points: Interval | None


def speed_and_accuracy(lines: Sequence[Line], paper: Mapping[str, Any], caption: str) -> Figure:
    """Return two panels over the same families: speedup beside the published band, points beside the margin."""
    families = list(dict.fromkeys(line.family for line in lines))
    claim, margin = paper["speedup"], paper["accuracy"]["margin_points"]
    with plt.rc_context(STYLE):
        drawn, (speed, accuracy) = plt.subplots(
            1, 2, sharey=True, figsize=(8.6, 1.1 + 0.55 * len(families)), width_ratios=(3, 2)
        )
        band = {"facecolor": GREY, "alpha": 0.35, "hatch": "//", "edgecolor": GREY}
        speed.axvspan(claim["low"], claim["high"], linewidth=0, **band)
        for axes, place in ((speed, 1), (accuracy, 0)):
            axes.axvline(place, color=INK, linewidth=0.8, linestyle=":")
        accuracy.axvline(-margin, color=INK, linewidth=0.8, linestyle="--")
        for line in lines:
            mark, colour = MARKS[line.strategy]
            row = families.index(line.family) + 0.22 * (list(MARKS).index(line.strategy) - 1)
            for axes, shown in ((speed, line.speedup), (accuracy, line.points)):
                if shown is not None:
                    bars = [[shown.value - shown.low], [shown.high - shown.value]]
                    axes.errorbar(
                        shown.value, row, xerr=bars, fmt=mark, color=colour, markersize=6, capsize=2.5, elinewidth=1
                    )
        speed.set_yticks(range(len(families)), [named(family) for family in families])
        speed.set_ylim(len(families) - 0.5, -0.5)
        speed.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        speed.set_xlabel("decode speed over on-demand-overlap")
        accuracy.set_xlabel(f"points less full K's (dashed: -{margin:g})")
        for strategy, (mark, colour) in MARKS.items():
            speed.plot([], [], mark, color=colour, label=LABELS[strategy])
        speed.fill_between([], [], [], label=f"published: {claim['low']:.2f}x to {claim['high']:.2f}x", **band)
        drawn.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.96), ncols=4)
        drawn.tight_layout()
        rows = tuple((line.family, line.strategy, *_numbers(line.speedup), *_numbers(line.points)) for line in lines)
        return figure("summary", caption, drawn, Table(caption, HEAD, rows))


def _numbers(shown: Interval | None) -> tuple[str, str, str]:
    return ("", "", "") if shown is None else (f"{shown.value:g}", f"{shown.low:g}", f"{shown.high:g}")
