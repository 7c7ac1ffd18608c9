"""The report's figures, as SVG text. The same records give the same bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from reports.compare import accuracy, count, foreseen, hit_rate, name, speedup, total
from reports.results import Results
from reports.tables import baselines, default_gamma, rows_by_strategy

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#999999", "#333333"
STYLE: Any = {"svg.hashsalt": "mobile", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
         "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def gamma_sweep(results: Results, model: str) -> str | None:
    """Accuracy, all tasks pooled, against speedup over on-demand-overlap at the smallest budget."""
    base = baselines(results, "smallest", model).get("on-demand-overlap")
    groups = [g for g in rows_by_strategy(results, "smallest", model) if g[0].strategy in ("static-half", "mobile")]
    reference = results.pool(model=model, strategy="resident")
    if not base or not groups or not reference:
        return None
    full = 100 * total(reference, "correct") / count(reference)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 4.2))
        swept = sorted((g for g in groups if g[0].gamma is not None), key=lambda g: g[0].gamma or 0)
        points = []
        for group in [*swept, *(g for g in groups if g[0].gamma is None)]:
            x, difference = speedup(group, base), accuracy(group, reference).difference
            y = full + difference.value
            mobile = group[0].gamma is not None
            axes.errorbar(
                x.value, y, yerr=[[y - full - difference.low], [difference.high - (y - full)]],
                fmt="o" if mobile else "s", color=BLUE if mobile else ORANGE, capsize=3, elinewidth=0.8,
            )  # fmt: skip
            label = f"{group[0].gamma:g}" if mobile else name(group[0])
            axes.annotate(label, (x.value, y), textcoords="offset points", xytext=(6, 6), color=BLACK)
            if mobile:
                points.append((x.value, y))
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=BLUE, linewidth=1, zorder=0, label="mobile, by gamma"
        )
        axes.axhline(full, color=GREY, linewidth=1, linestyle="--", label="full K")
        axes.set_xlabel("speedup over on-demand-overlap (decode, projected)")
        axes.set_ylabel("score, all tasks (%)")
        axes.legend(frameon=False, loc="lower left")
        return _svg(figure)


LINES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."), ("#D55E00", ":"), ("#CC79A7", "-"), ("#56B4E9", "--"),
         ("#333333", "-."), ("#999999", ":"))  # fmt: skip


def hits_by_size(results: Results, model: str) -> str | None:
    """Decode hit rate against the share of all experts that have a slot, for strategies that only cache."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for strategy in dict.fromkeys(r.strategy for r in results.pick(model=model) if r.budget.endswith("%")):
        for budget in results.values("budget"):
            group = results.pool(model=model, strategy=strategy, budget=budget)
            rate = hit_rate(group) if group else None
            if rate is not None:
                config = group[0].config
                curves.setdefault(strategy, []).append(
                    (100 * (group[0].slots or 0) / (config["moe_layers"] * config["experts"]), 100 * rate)
                )
    return _lines(curves, "slots, % of all experts", "decode hit rate (%)") if curves else None


def recall_by_layer(results: Results, model: str) -> str | None:
    """How many of the experts that a layer needed were foreseen, by depth, at the smallest budget."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for group in rows_by_strategy(results, "smallest", model):
        layers = foreseen(group)
        executed = not group[0].lossless and group[0].gamma is None  # what runs its guesses is never wrong
        if layers and not executed and not group[0].config["swept"]:
            curves[name(group[0])] = [(layer, 100 * right / needed) for layer, (_, right, needed) in layers.items()]
    return _lines(curves, "MoE layer", "recall (%)") if curves else None


def _lines(curves: dict[str, list[tuple[float, float]]], x: str, y: str) -> str:
    """One line a name, told apart by dashes as well as colour, and named beside its end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 4.2))
        ends = []
        for (label, points), (colour, dashes) in zip(curves.items(), LINES * 3, strict=False):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
            ends.append((ys[-1], xs[-1], label, colour))
        gap, last = 0.045 * (axes.get_ylim()[1] - axes.get_ylim()[0]), -1e9
        for end, right, label, colour in sorted(ends):
            last = max(end, last + gap)
            axes.annotate(label, (right, last), textcoords="offset points", xytext=(8, -3), color=colour)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        return _svg(figure)


def token_timeline(results: Results, model: str) -> str | None:
    """What link and GPU do during a few decode tokens, on-demand-overlap above MoBiLE with a fallback."""
    cells = {"model": model, "task": results.values("task")[0], "budget": "smallest"}
    shown = results.pick(strategy="on-demand-overlap", **cells)
    shown += results.pick(strategy="mobile", gamma=default_gamma(results, model), **cells)
    if not shown:
        return None
    colours = {"load": BLUE, "prefetch": ORANGE, "compute": GREEN, "stall": GREY}
    end = max(event[2] for record in shown for event in record.timeline) / 1e6
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(len(shown), 1, figsize=(10, 1.5 * len(shown) + 0.8), sharex=True, squeeze=False)
        for axes, record in zip(panels[:, 0], shown, strict=True):
            for what, colour in colours.items():
                spans = _merged([(e[1], e[2]) for e in record.timeline if e[0] == what])
                row = 1 if what in ("load", "prefetch") else 0
                axes.broken_barh(spans, (row + 0.1, 0.8), color=colour, linewidth=0)
            axes.set_yticks([0.5, 1.5], ["GPU", "link"])
            axes.set_xlim(0, end)
            axes.set_title(name(record), loc="left", fontsize=10)
        panels[-1, 0].set_xlabel("milliseconds (virtual)")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
        figure.legend(
            handles, ["demand load", "prefetch", "compute", "stall"], ncols=4, frameon=False, loc="upper right"
        )
        figure.tight_layout()
        return _svg(figure)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Touching spans joined, as (start, width) in milliseconds: a drawing needs no seam between equal neighbours."""
    joined: list[list[int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([start, end])
    return [(start / 1e6, (end - start) / 1e6) for start, end in joined]
