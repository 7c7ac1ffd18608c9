"""Histogram of the little pass's confidence on a scale of 1 - confidence, and how often the big pass disagrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt

from reports.data import groups
from reports.data.doubts import PAPERS, Bin, of_answers, of_signals
from reports.data.results import Results, family
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREY, INK, ORANGE, RED, STYLE, figure, legend_above
from reports.stats.intervals import wilson
from suites.record import Record

FIRST_BIN = 10**0.25  # its width on the axis, as a ratio; it holds all tokens that are surer
SCALE = (
    "On the scale of 1 - p, p being the highest softmax probability of each little pass, {what}. Tokens below gamma "
    "(hatched) {fall}. The first bin holds all surer ones."
)
OF_THEM = (
    "Below: the share of a bin's tokens of which the little pass would write another than the big one, with Wilson's "
    "95 % interval."
)
ANSWERS = (
    "Above gamma only the little pass ran, so that whether the big one would disagree is not known there, and nothing "
    "is drawn."
)
UNKNOWN = "These records do not say on which tokens both passes disagree."
HEAD = ("1 - p from", "to", "tokens", "fall back", "both passes known", "disagree")


def histogram(results: Results, model: str) -> Figure | None:
    """Draw the confidences of MoBiLE's own answers; None where the records keep none."""
    group = groups.mobile(results, model)
    bins = of_answers(group)
    if not bins:
        return None
    known = any(each.compared for each in bins)
    caption = SCALE.format(what="tokens of all tasks", fall="are written again by the big pass")
    caption += f" {OF_THEM} {ANSWERS}" if known else f" {UNKNOWN}"
    return _drawn(f"confidence-{model}", caption, bins, group[0].gamma or 0.0)


def by_signal_cells(records: Sequence[Record]) -> Figure | None:
    """Draw one family's confidences on full K's answers, where both passes of every token ran; None without any."""
    bins = of_signals(records)
    if not bins:
        return None
    name = family(records[0])
    gamma = next(each["gamma"] for each in records[0].config["live"] if each["signal"] == PAPERS)
    what = f"on full K's own answers, tokens of all tasks; {name}"
    caption = f"{SCALE.format(what=what, fall='would fall back')} {OF_THEM} Both passes ran on every token."
    return _drawn(f"confidence-of-all-{name}", caption, bins, gamma)


def _drawn(name: str, caption: str, bins: Sequence[Bin], gamma: float) -> Figure:
    tokens, known = sum(each.tokens for each in bins), any(each.compared for each in bins)
    with plt.rc_context(STYLE):
        panels = 2 if known else 1
        drawn, grid = plt.subplots(
            panels,
            1,
            figsize=(7.5, 1.4 + 2.3 * panels),
            sharex=True,
            squeeze=False,
            height_ratios=(3, 2)[:panels],
        )
        above = grid[0, 0]
        least = bins[0].high / FIRST_BIN
        left = [max(each.low, least) for each in bins]
        widths = [each.high - low for each, low in zip(bins, left, strict=True)]
        fell = [100 * each.fallbacks / tokens for each in bins]
        accepted = [100 * (each.tokens - each.fallbacks) / tokens for each in bins]
        look = {"align": "edge", "edgecolor": "white", "linewidth": 0}
        above.bar(left, accepted, widths, color=BLUE, label="accepted", **look)
        above.bar(
            left, fell, widths, bottom=accepted, color=ORANGE, hatch="//", label="below gamma: falls back", **look
        )
        above.set_ylabel("tokens (%)")
        above.set_xscale("log")
        above.set_xlim(least, 1)
        above.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        if known:
            _disagreements(grid[1, 0], bins, gamma)
        for axes in grid[:, 0]:
            axes.axvline(1 - gamma, color=INK, linewidth=1, linestyle="--")
        above.annotate(
            f"gamma {gamma:g}",
            (1 - gamma, 1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(-4, -10),
            ha="right",
            color=INK,
        )
        grid[-1, 0].set_xlabel("1 - p, logarithmic (sure on the left)")
        legend_above(above, 2)
        drawn.align_ylabels()
        rows = tuple(
            (f"{e.low:g}", f"{e.high:g}", str(e.tokens), str(e.fallbacks), str(e.compared), str(e.disagreed))
            for e in bins
        )
        return figure(name, caption, drawn, Table("Tokens by 1 - confidence", HEAD, rows))


def _disagreements(axes: Any, bins: Sequence[Bin], gamma: float) -> None:
    """Draw the share of disagreements of each bin of which both passes are known, and shade where they are not."""
    if any(each.compared < each.tokens for each in bins):
        axes.axvspan(axes.get_xlim()[0], 1 - gamma, facecolor=GREY, alpha=0.15, linewidth=0)
        axes.annotate("not known: no big pass ran", (0.02, 0.8), xycoords="axes fraction", color=INK)
    for each in bins:
        if not each.compared:
            continue
        middle = (max(each.low, each.high / FIRST_BIN) * each.high) ** 0.5
        share = wilson(each.disagreed, each.compared)
        bars = [[max(0, share.value - share.low)], [share.high - share.value]]
        axes.errorbar(middle, share.value, yerr=bars, fmt="D", color=RED, markersize=4, capsize=2, elinewidth=0.7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("disagree (%)")
