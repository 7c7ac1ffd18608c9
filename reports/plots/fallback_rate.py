"""Figure of MoBiLE's speedup by fallback rate, beside the closed form and the published band."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

from reports.data.groups import ON_DEMAND
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREY, INK, ORANGE, STYLE, figure, legend_above
from reports.tables.synthetic import fallback_rate, fallback_sweep, speedup_over
from suites.record import Record

MARKS = dict(zip(ON_DEMAND, (("o", BLUE), ("s", ORANGE)), strict=True))
POINTS = 51
CAPTION = (
    "Speedup of MoBiLE against the share of tokens that fall back, with 95 % intervals, beside 2 / (1 + r) and the "
    "published band. Synthetic weights may stand beside the band but are never judged by it."
)


def speedups(records: list[Record], claim: dict[str, Any]) -> Figure | None:
    """Draw one geometry's sweep over the fallback rate; None if there is none."""
    lines = [
        (baseline, 100 * fallback_rate(record), measured)
        for record in fallback_sweep(records)
        for baseline in ON_DEMAND
        if (measured := speedup_over(records, record, baseline))
    ]
    if not lines:
        return None
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 4.2))
        axes.axhspan(
            claim["low"],
            claim["high"],
            facecolor=GREY,
            alpha=0.35,
            hatch="//",
            edgecolor=GREY,
            linewidth=0,
            label="published band",
        )
        rates = [100 * n / (POINTS - 1) for n in range(POINTS)]
        most = max(rate for _, rate, _ in lines)
        shown = [rate for rate in rates if rate <= max(most, 10)]
        axes.plot(shown, [2 / (1 + r / 100) for r in shown], color=INK, linestyle="--", label="2 / (1 + r)")
        for baseline, (mark, colour) in MARKS.items():
            mine = [(rate, m) for base, rate, m in lines if base == baseline]
            if mine:
                bars = [[m.value - m.low for _, m in mine], [m.high - m.value for _, m in mine]]
                axes.errorbar(
                    [rate for rate, _ in mine],
                    [m.value for _, m in mine],
                    yerr=bars,
                    fmt=f"{mark}-",
                    color=colour,
                    markersize=6,
                    capsize=2.5,
                    elinewidth=1,
                    label=f"over {baseline}",
                )
        axes.set_xlabel("tokens that fall back (%)")
        axes.set_ylabel("speedup (decode)")
        legend_above(axes, 4)
        rows = tuple(
            (base, f"{rate:.4g}", f"{m.value:.4f}", f"{m.low:.4f}", f"{m.high:.4f}", f"{2 / (1 + rate / 100):.4f}")
            for base, rate, m in lines
        )
        head = ("baseline", "fallbacks %", "speedup", "low", "high", "2 / (1 + r)")
        return figure(f"band-{records[0].model}", CAPTION, drawn, Table(CAPTION, head, rows))
