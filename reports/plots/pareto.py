"""Figure of accuracy by speed: every strategy and every gamma, and the Pareto front."""

from __future__ import annotations

import matplotlib.pyplot as plt

from reports.data import groups
from reports.data.compare import accuracy, count, speedup, strategy_name
from reports.data.results import Results
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREEN, GREY, INK, ORANGE, STYLE, figure, label_points, legend_above
from reports.stats.intervals import Interval
from reports.stats.pareto import front

CAPTION = (
    "Accuracy, all tasks, less full K's on the same items, against speedup over on-demand-overlap with the fewest "
    "slots. Lossless strategies lie on the line of no difference by construction. The line joins what nothing beats in "
    "both; bars are 95 % intervals. MoBiLE's points are labelled with gamma, all others with the strategy."
)
KINDS = {
    "mobile": ("o", BLUE, "MoBiLE, by gamma"),
    "lossy": ("s", ORANGE, "other strategies that can change answers"),
    "lossless": ("^", GREEN, "lossless strategies"),
}


def accuracy_against_speed(results: Results, model: str) -> Figure | None:
    """Draw accuracy by speedup; None where the baseline, full K or every other strategy is missing."""
    base = groups.baselines(results, "smallest", model).get("on-demand-overlap")
    reference = groups.full_k(results, model)
    if not base or not reference:
        return None
    points: list[tuple[str, str, Interval, Interval]] = []
    shown = groups.by_strategy(results, "smallest", model)
    reference, *alike = groups.on_common_items([reference, *(g for g in shown if not g[0].lossless)])
    answered = {(group[0].strategy, group[0].gamma): group for group in alike}
    for group in shown:
        first, speed_up = group[0], speedup(group, base)
        if first.strategy == "resident" or speed_up is None:
            continue
        kind = "mobile" if first.strategy == "mobile" else "lossless" if first.lossless else "lossy"
        alike_group = answered.get((first.strategy, first.gamma), [])
        if not (first.lossless or count(alike_group)):
            continue  # it shares no item with the others
        loss = Interval(0, 0, 0) if first.lossless else accuracy(alike_group, reference).difference
        points.append((strategy_name(first), kind, speed_up, loss))
    if not points:
        return None
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 4.8))
        axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
        for kind, (mark, colour, label) in KINDS.items():
            axes.plot([], [], mark, color=colour, label=label)
            for _, its_kind, x, y in points:
                if its_kind == kind:
                    bars = None if kind == "lossless" else [[y.value - y.low], [y.high - y.value]]
                    axes.errorbar(x.value, y.value, yerr=bars, fmt=mark, color=colour, capsize=2, elinewidth=0.7)
        edge = front([(x.value, y.value) for _, _, x, y in points])
        axes.step(*zip(*edge, strict=True), where="pre", color=INK, linewidth=0.9, label="best of both", zorder=0)
        axes.set_xlabel("speedup over on-demand-overlap (decode)")
        axes.set_ylabel("accuracy less full K's (points)")
        legend_above(axes, 2)
        label_points(
            axes,
            [
                (label.removeprefix("mobile (gamma ").rstrip(")"), x.value, y.value)
                for label, _, x, y in sorted(points, key=lambda point: point[2].value)
            ],
            [(x.value, y.low, y.high) for _, kind, x, y in points if kind != "lossless"],
        )
        rows = tuple(
            (
                label,
                *(f"{n:.4f}" for n in (x.value, x.low, x.high, y.value, y.low, y.high)),
                "yes" if (x.value, y.value) in edge else "no",
            )
            for label, _, x, y in points
        )
        head = ("strategy", "speedup", "low", "high", "points", "low", "high", "on the front")
        caption = f"{CAPTION} Accuracy is over the {count(reference):,} questions that all of them were asked."
        return figure(f"pareto-{model}", caption, drawn, Table("Accuracy against speed", head, rows))
