"""Figure of accuracy by speed at one memory: strategies, gammas and row formats, and the front of each kind."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt

from reports.data.results import AS_IS
from reports.data.settings import Setting
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, STYLE, figure, label_points, legend_above
from reports.stats.pareto import front

CAPTION = (
    "Accuracy, all tasks, less full K's on the same items, against speedup over on-demand-overlap with rows as they "
    "are, all with {budget} of memory. The solid line joins what nothing beats in both; the dashed one what nothing "
    "beats among settings that give the stock model's answers, which lie on the line of no difference. Points on a "
    "front, and MoBiLE's own, are labelled."
)
COLOURS = (BLUE, ORANGE, PURPLE, SKY)


def accuracy_against_speed(settings: Sequence[Setting], model: str, budget: str) -> Figure | None:
    """Draw every setting of a model under a budget; None without any."""
    settings = [each for each in settings if not each.is_a_limit]
    if len(settings) < 2:
        return None
    points = [(each, each.over_base.value, each.points.value) for each in settings]
    formats = list(dict.fromkeys(each.rows for each in settings))
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 5.2))
        axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
        for rows, colour in zip(formats, COLOURS * len(formats), strict=False):
            named = "rows as they are" if rows == AS_IS else f"{rows} rows"
            for mark, of_full_k in (("^", True), ("o", False)):
                chosen = [(x, y) for each, x, y in points if each.rows == rows and each.of_full_k == of_full_k]
                if chosen:
                    kind = "all experts" if of_full_k else "fewer or other experts"
                    axes.plot(*zip(*chosen, strict=True), mark, color=colour, markersize=5, label=f"{named}, {kind}")
        edge = front([(x, y) for _, x, y in points])
        exact = front([(x, y) for each, x, y in points if each.exact])
        axes.step(*zip(*edge, strict=True), where="pre", color=INK, linewidth=0.9, zorder=0)
        right = max((x for x, _ in exact), default=1.0)
        axes.plot([1.0, right], [0, 0], color=GREEN, linewidth=1.6, linestyle="--", zorder=0)
        axes.set_xlabel("speedup over on-demand-overlap, rows as they are (decode)")
        axes.set_ylabel("accuracy less full K's (points)")
        legend_above(axes, 2)
        ahead = {*edge, *exact}
        named_points = [
            (each.name, x, y)
            for each, x, y in points
            if (x, y) in ahead or (each.cells[0].strategy == "mobile" and each.rows == AS_IS)
        ]
        label_points(axes, named_points)
        head = ("strategy", "rows", "speedup", "low", "high", "points", "low", "high", "on the front")
        rows_of_data = tuple(
            (
                each.strategy,
                each.rows,
                *(f"{n:.4f}" for n in (x, each.over_base.low, each.over_base.high)),
                *(f"{n:.4f}" for n in (y, each.points.low, each.points.high)),
                "yes" if (x, y) in edge else "no",
            )
            for each, x, y in points
        )
        caption = CAPTION.format(budget=budget)
        return figure(f"past-{model}-{budget}", caption, drawn, Table("Accuracy against speed", head, rows_of_data))
