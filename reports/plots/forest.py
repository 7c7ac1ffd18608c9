"""Forest plot of speedups with their intervals, family by family, beside the published band."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

from reports.data import groups
from reports.data.compare import speedup
from reports.data.groups import BASELINES
from reports.data.results import Results
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREEN, GREY, INK, ORANGE, STYLE, figure, legend_above, named
from reports.stats.intervals import Interval

MARKS = dict(zip(BASELINES, (("o", BLUE), ("s", ORANGE), ("^", GREEN)), strict=True))


def speedups(results: Results, paper: dict[str, Any]) -> Figure | None:
    """Draw MoBiLE over each baseline, at each budget, for each family; None if there is no speedup."""
    low, high = paper["speedup"]["low"], paper["speedup"]["high"]
    lines: list[tuple[str, str, str, Interval]] = []
    whole: set[tuple[str, str]] = set()
    for model in results.models:
        for budget in results.budgets(model):
            mobile = groups.mobile(results, model, budget)
            for base, group in groups.baselines(results, budget, model).items():
                measured = speedup(mobile, group) if mobile else None
                if measured:
                    lines.append((model, budget, base, measured))
                    if groups.holds_all(mobile):
                        whole.add((model, budget))
    if not lines:
        return None
    places = list(dict.fromkeys((model, budget) for model, budget, *_ in lines))
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 1.2 + 0.52 * len(places)))
        axes.axvspan(low, high, facecolor=GREY, alpha=0.35, hatch="//", edgecolor=GREY, linewidth=0)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        for model, budget, base, measured in lines:
            row = places.index((model, budget)) + 0.22 * (BASELINES.index(base) - 1)
            mark, colour = MARKS[base]
            bars = [[measured.value - measured.low], [measured.high - measured.value]]
            axes.errorbar(
                measured.value, row, xerr=bars, fmt=mark, color=colour, markersize=6, capsize=2.5, elinewidth=1
            )
        shown = [
            f"{model}, {budget}{' (holds all of it)' if (model, budget) in whole else ''}" for model, budget in places
        ]
        axes.set_yticks(range(len(places)), [named(label) for label in shown])
        axes.set_ylim(len(places) - 0.5, -0.5)
        axes.set_xscale("log", base=2)  # twice as fast lies as far from 1 as half as fast
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        axes.set_xlabel("speedup of MoBiLE (decode)")
        for base, (mark, colour) in MARKS.items():
            axes.plot([], [], mark, color=colour, label=f"over {base}")
        axes.fill_between([], [], [], facecolor=GREY, alpha=0.35, hatch="//", edgecolor=GREY, label="published band")
        legend_above(axes, 4)
        rows = tuple(
            (m, budget, base, f"{interval.value:.4f}", f"{interval.low:.4f}", f"{interval.high:.4f}")
            for m, budget, base, interval in lines
        )
        head = ("model", "budget", "baseline", "speedup", "low", "high")
        caption = (
            "Speedup of MoBiLE at its own threshold, with 95 % intervals, beside the band that was published. A "
            "projection may stand beside the band but is never judged by it."
        )
        if whole:
            caption += ' "All fits": the budget holds every expert, so that whoever caches loads each once and no more.'
        return figure("speedups", caption, drawn, Table("Speedups of MoBiLE", head, rows))
