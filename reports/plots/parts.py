"""Where a token's time goes, as parts of it stacked."""

from __future__ import annotations

import matplotlib.pyplot as plt

from reports import groups
from reports.compare import name, total
from reports.groups import Group
from reports.page import Figure, Table
from reports.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, STYLE, figure, legend_above
from reports.results import Results

# Counters of seconds that are parts of `decode_seconds`; a record may lack some, and what is left is "other".
PARTS = (
    ("decode_stall_seconds", "waiting for the link", ORANGE, "//"),
    ("decode_expert_seconds", "experts", BLUE, ""),
    ("decode_dense_seconds", "attention, router and shared experts", GREEN, ".."),
    ("decode_cpu_seconds", "waiting for the CPU", PURPLE, "xx"),
)
OTHER = ("other", SKY, "\\\\")
COMPUTING = ("computing (dense and experts together)", SKY, "\\\\")
CAPTION = "Where the time of a decode token goes, at the fewest slots each strategy needs; tasks together."


def token_time(results: Results, model: str) -> Figure | None:
    """Milliseconds a token, stacked by part, a bar a strategy; None if nothing was timed."""
    bars = [(name(g[0]), _parts(g)) for g in groups.own(results, "smallest", model) if total(g, "decode_tokens")]
    if not bars:
        return None
    split = any(len(parts) > 2 for _, parts in bars)
    kinds = [(label, colour, hatch) for _, label, colour, hatch in PARTS] + [OTHER if split else COMPUTING]
    kinds = [kind for kind in kinds if any(parts.get(kind[0]) for _, parts in bars)]
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(7.5, 1.1 + 0.32 * len(bars)))
        left = [0.0] * len(bars)
        for label, colour, hatch in kinds:
            widths = [parts.get(label, 0.0) for _, parts in bars]
            axes.barh(range(len(bars)), widths, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0,
                      height=0.72, label=label)  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a token")
        legend_above(axes, 2)
        rows = tuple(
            (label, *(f"{parts[kind]:.4f}" if kind in parts else "" for kind, *_ in kinds)) for label, parts in bars
        )
        head = ("strategy", *(f"{kind} (ms)" for kind, *_ in kinds))
        return figure(f"parts-{model}", CAPTION, drawn, Table("Where a token's time goes", head, rows))


def _parts(group: Group) -> dict[str, float]:
    """Milliseconds a token by part, those that every record of the group counts; the rest is one part."""
    whole = sum(record.counters["decode_seconds"] for record in group)
    tokens = sum(record.counters["tokens"] for record in group)
    seconds = {
        label: sum(record.counters[counter] for record in group)
        for counter, label, *_ in PARTS
        if all(counter in record.counters for record in group)
    }
    rest = OTHER if len(seconds) > 1 else COMPUTING
    seconds[rest[0]] = max(0.0, whole - sum(seconds.values()))
    return {label: 1e3 * value / tokens for label, value in seconds.items()}
