"""One figure for a reader in a hurry: each family's speed beside its accuracy, for full K, half of it, and MoBiLE.

A run's own strategies stand there, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt

from reports.data import groups
from reports.data.compare import accuracy, speedup, strategy_name, worst_task
from reports.data.own import own_strategies
from reports.data.results import Results
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, STYLE, figure, named
from reports.stats.intervals import Interval

MARKS = {"lru": ("^", GREEN), "static-half": ("s", ORANGE), "mobile": ("o", BLUE)}
OTHERS = (("D", RED), ("v", PURPLE), ("P", SKY), ("*", INK))
LABELS = {"lru": "lru: full K, cached", "static-half": "static-half: always K/2", "mobile": "MoBiLE"}
HEAD = ("family", "strategy", "speedup", "low", "high", "points", "low", "high", "worst task", "low", "high")
OF_RUN = (
    "Decode speed over on-demand-overlap with the fewest slots, and accuracy less full K's, all tasks together, with "
    "95 % intervals; crosses are the worst task. The published band and the margin stand beside, and judge no "
    "projection."
)


@dataclass(frozen=True)
class Line:
    """One strategy on one family: its speedup, and the points it loses, which a lossless strategy has none of.

    `worst` are the points of the task on which it loses most.
    """

    family: str
    strategy: str
    speedup: Interval
    points: Interval | None
    worst: Interval | None = None


def of_run(results: Results, paper: Mapping[str, Any]) -> Figure | None:
    """Draw lru, static K/2, MoBiLE and the run's own strategies on every family; None if no speedup is known."""
    lines = [line for model in results.models for line in _lines(results, model)]
    return speed_and_accuracy(lines, paper, OF_RUN) if lines else None


def _lines(results: Results, model: str) -> Iterator[Line]:
    """Yield a line a strategy, each over the baseline under its own budget: the fewest slots, or an own one's first."""
    full_k = groups.full_k(results, model)
    shipped = [
        group
        for group in groups.unswept(results, "smallest", model)
        if group[0].strategy in MARKS and group[0].budget == "smallest"
    ]
    for group in (*shipped, *own_strategies(results, model)):
        first = group[0]
        base = groups.baselines(results, first.budget, model).get("on-demand-overlap")
        speed_up = speedup(group, base) if base else None
        if speed_up is None:
            continue
        own = first.strategy not in MARKS
        name = strategy_name(first) if own else first.strategy
        loss = accuracy(group, full_k) if full_k and not first.lossless else None
        worst = worst_task(group, full_k) if loss else None
        yield Line(
            model,
            name if first.budget == "smallest" else f"{name}, {first.budget}",
            speed_up,
            loss.difference if loss and loss.items else None,
            worst.loss.difference if worst else None,
        )


def speed_and_accuracy(lines: Sequence[Line], paper: Mapping[str, Any], caption: str) -> Figure:
    """Return two panels over the same families: speedup beside the published band, points beside the margin."""
    families = list(dict.fromkeys(line.family for line in lines))
    marks = _marks(lines)
    claim, margin = paper["speedup"], paper["accuracy"]["margin_points"]
    with plt.rc_context(STYLE):
        drawn, (speed, accuracy_axes) = plt.subplots(
            1, 2, sharey=True, figsize=(8.6, 1.1 + 0.55 * len(families) * len(marks) / len(MARKS)), width_ratios=(3, 2)
        )
        band = {"facecolor": GREY, "alpha": 0.35, "hatch": "//", "edgecolor": GREY}
        speed.axvspan(claim["low"], claim["high"], linewidth=0, **band)
        for axes, place in ((speed, 1), (accuracy_axes, 0)):
            axes.axvline(place, color=INK, linewidth=0.8, linestyle=":")
        accuracy_axes.axvline(-margin, color=INK, linewidth=0.8, linestyle="--")
        for line in lines:
            mark, colour = marks[line.strategy]
            order, middle = list(marks).index(line.strategy), (len(marks) - 1) / 2
            row = families.index(line.family) + 0.66 / len(marks) * (order - middle)
            for axes, shown in ((speed, line.speedup), (accuracy_axes, line.points)):
                if shown is not None:
                    bars = [[shown.value - shown.low], [shown.high - shown.value]]
                    axes.errorbar(
                        shown.value, row, xerr=bars, fmt=mark, color=colour, markersize=6, capsize=2.5, elinewidth=1
                    )
            if line.worst is not None:
                accuracy_axes.plot(line.worst.value, row, "x", color=colour, markersize=6)
        speed.set_yticks(range(len(families)), [named(family) for family in families])
        speed.set_ylim(len(families) - 0.5, -0.5)
        speed.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        speed.set_xlabel("decode speed over on-demand-overlap")
        accuracy_axes.set_xlabel(f"points less full K's (dashed: -{margin:g}; x: worst task)")
        for strategy, (mark, colour) in marks.items():
            speed.plot([], [], mark, color=colour, label=named(LABELS.get(strategy, strategy)))
        speed.fill_between([], [], [], label=f"published: {claim['low']:.2f}x to {claim['high']:.2f}x", **band)
        drawn.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.96), ncols=4)
        drawn.tight_layout()
        rows = tuple(
            (
                line.family,
                line.strategy,
                *(number for shown in (line.speedup, line.points, line.worst) for number in _numbers(shown)),
            )
            for line in lines
        )
        return figure("summary", caption, drawn, Table(caption, HEAD, rows))


def _marks(lines: Sequence[Line]) -> dict[str, tuple[str, str]]:
    """Return the mark and colour of each strategy: those of `MARKS`, then any others in turn."""
    others = [name for name in dict.fromkeys(line.strategy for line in lines) if name not in MARKS]
    return MARKS | dict(zip(others, cycle(OTHERS), strict=False))


def _numbers(shown: Interval | None) -> tuple[str, str, str]:
    return ("", "", "") if shown is None else (f"{shown.value:g}", f"{shown.low:g}", f"{shown.high:g}")
