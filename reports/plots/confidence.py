"""Histogram of the little pass's confidence, split where tokens fall back."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt

from reports.data import groups
from reports.data.results import Results
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, INK, ORANGE, STYLE, figure

CAPTION = (
    "Highest softmax probability of each little pass, tokens of all tasks. Tokens below gamma (hatched) are written "
    "again by the big pass."
)


def histogram(results: Results, model: str) -> Figure | None:
    """Draw the histogram of MoBiLE's confidences; None where the records keep none."""
    group = groups.mobile(results, model)
    bins: dict[float, int] = {}
    for record in group:
        for edge, tokens in record.config.get("confidence_histogram") or ():
            bins[edge] = bins.get(edge, 0) + tokens
    if not bins or not sum(bins.values()):
        return None
    edges, gamma = sorted(bins), group[0].gamma or 0.0
    width = min((b - a for a, b in pairwise(edges)), default=1.0)
    below = [edge < gamma - 1e-9 for edge in edges]
    tokens = sum(bins.values())
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 3.6))
        for region, colour, hatch, label in (
            (True, ORANGE, "//", "below gamma: falls back"),
            (False, BLUE, "", "accepted"),
        ):
            inside = [edge for edge, is_below in zip(edges, below, strict=True) if is_below == region]
            heights = [100 * bins[edge] / tokens for edge in inside]
            axes.bar(
                inside,
                heights,
                width,
                align="edge",
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                label=label,
            )
        axes.axvline(gamma, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            f"gamma {gamma:g}",
            (gamma, axes.get_ylim()[1]),
            textcoords="offset points",
            xytext=(-4, -4),
            ha="right",
            color=INK,
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("confidence of the little pass")
        axes.set_ylabel("tokens (%)")
        axes.legend(frameon=False, loc="upper left")
        rows = tuple((f"{e:g}", str(bins[e]), "yes" if b else "no") for e, b in zip(edges, below, strict=True))
        data = Table("Confidences", ("lower edge", "tokens", "falls back"), rows)
        return figure(f"confidence-{model}", CAPTION, drawn, data)
