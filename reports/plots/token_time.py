"""Figure of a decode token's time, split into stalls, experts and the rest."""

from __future__ import annotations

import matplotlib.pyplot as plt

from reports.data import groups
from reports.data.compare import strategy_name, total
from reports.data.groups import Group
from reports.data.results import Results
from reports.elements.page import Figure, Table
from reports.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, STYLE, figure, legend_above, named

PARTS = (
    ("waiting for the link", ORANGE, "//"),
    ("waiting for the CPU", PURPLE, "xx"),
    ("experts", BLUE, ""),
    ("attention, router, shared experts, head", GREEN, "--"),
    ("waiting", ORANGE, "//"),
    ("everything else", SKY, "\\\\"),
)
CAPTION = (
    "Where the time of a decode token goes, at the fewest slots each strategy needs; tasks together. The "
    "kernels of a real device are not timed one by one, so there its compute is one part."
)


def stacked_parts(results: Results, model: str) -> Figure | None:
    """Draw milliseconds a token, a bar a strategy, stacked by part; None if nothing was timed."""
    bars = [
        (strategy_name(g[0]), _parts(g))
        for g in groups.unswept(results, "smallest", model)
        if total(g, "decode_tokens")
    ]
    if not bars:
        return None
    kinds = [kind for kind in PARTS if any(parts.get(kind[0]) for _, parts in bars)]
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 1.1 + 0.32 * len(bars)))
        left = [0.0] * len(bars)
        for label, colour, hatch in kinds:
            widths = [parts.get(label, 0.0) for _, parts in bars]
            axes.barh(
                range(len(bars)),
                widths,
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                height=0.72,
                label=label,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(bars)), [named(label) for label, _ in bars])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a token")
        legend_above(axes, 2)
        rows = tuple(
            (label, *(f"{parts[kind]:.4f}" if kind in parts else "" for kind, *_ in kinds)) for label, parts in bars
        )
        head = ("strategy", *(f"{kind} (ms)" for kind, *_ in kinds))
        return figure(f"parts-{model}", CAPTION, drawn, Table("Where a token's time goes", head, rows))


def _parts(group: Group) -> dict[str, float]:
    """Return milliseconds a token by part: four of the virtual clock, two where a record does not split compute."""
    tokens = sum(record.counters["tokens"] for record in group)

    def of_counter(counter: str) -> float:
        return 1e3 * sum(record.counters[f"decode_{counter}_seconds"] for record in group) / tokens

    step = 1e3 * sum(record.counters["decode_seconds"] for record in group) / tokens
    if any(record.counters.get("decode_dense_seconds") is None for record in group):
        return {"waiting": of_counter("stall"), "everything else": step - of_counter("stall")}
    shares = (
        of_counter("stall") - of_counter("cpu_stall"),
        of_counter("cpu_stall"),
        of_counter("expert"),
        of_counter("dense"),
    )
    return {label: share for (label, *_), share in zip(PARTS, shares, strict=False)}
