"""Figures say what their records say: bins of confidence, labels beside their points, budgets that hold everything."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import matplotlib.pyplot as plt
import pytest

from reports.data import doubts
from reports.data.groups import holds_all
from reports.plots import confidence, forest
from reports.plots.style import label_points
from suites.record import Record
from suites.record_fields import DOUBT_EDGES
from tests.report_runs import Rule, results

MODEL = ("olmoe-tiny", "olmoe", 0)
PAPER = {"speedup": {"low": 1.6, "high": 1.72}}


def changed(found, **config):
    """Return the results with more in the config of MoBiLE's cells."""
    records = tuple(replace(r, config={**r.config, **config}) if r.strategy == "mobile" else r for r in found.records)
    return replace(found, records=records)


def rows(wrong: int | None) -> list[list[float | None]]:
    """Return a histogram of 10 tokens that are sure and 4 that fall back."""
    counts = {DOUBT_EDGES[3]: (10, 0), DOUBT_EDGES[-1]: (4, 4)}
    return [
        [edge, *counts.get(edge, (0, 0)), None if wrong is None else wrong if edge == DOUBT_EDGES[-1] else 0]
        for edge in DOUBT_EDGES
    ]


def test_disagreement_is_shown_where_both_passes_ran_and_nowhere_else():
    figure = confidence.histogram(changed(results(Rule()), doubt_histogram=rows(1)), "olmoe-tiny")
    full = [row for row in figure.data.rows if row[2] != "0"]
    assert full == [("3.162e-06", "5.623e-06", "20", "0", "0", "0"), ("0.5623", "1", "8", "8", "8", "2")]
    assert "not known" in figure.svg
    assert "not known there" in figure.caption
    assert "disagree (%)" in figure.svg


@pytest.mark.parametrize("histogram", [None, rows(None)])
def test_without_a_record_of_disagreement_the_histogram_stands_alone(histogram):
    figure = confidence.histogram(changed(results(Rule()), doubt_histogram=histogram), "olmoe-tiny")
    assert confidence.UNKNOWN in figure.caption
    assert "disagree (%)" not in figure.svg
    assert {row[4] for row in figure.data.rows} == {"0"}


def test_older_records_count_a_fallback_twice_and_the_figure_once():
    group = [r for r in results(Rule()).records if r.strategy == "mobile" and r.gamma == 0.7][:1]
    kept = [[edge / 20, 10] for edge in range(20)]
    group = [replace(r, config={**r.config, "confidence_histogram": kept}) for r in group]
    bins = doubts.of_answers(group)
    assert [(b.low, b.high, b.tokens, b.fallbacks) for b in bins[5:7]] == [(0.25, 0.3, 10, 0), (0.3, 0.35, 5, 5)]
    assert sum(b.tokens for b in bins) == 6 * 10 + 14 * 5


def test_signal_cells_know_both_passes_of_every_token():
    [record] = [r for r in results(Rule(tasks=("arithmetic",))).records if r.strategy == "lru" and r.budget == "16GiB"]
    config = {
        "family": "olmoe",
        "agree": [[1, 0, 1], [0]],
        "doubts": {"probability": [[0.0, 0.2, 0.5], [0.6]]},
        "live": [{"signal": "probability", "gamma": 0.7}],
    }
    cell = replace(record, config=config)
    full = [b for b in doubts.of_signals([cell]) if b.tokens]
    assert [(b.low, b.tokens, b.fallbacks, b.compared, b.disagreed) for b in full] == [
        (0.0, 1, 0, 1, 0),
        (0.1778, 1, 0, 1, 1),
        (0.3162, 1, 1, 1, 0),
        (0.5623, 1, 1, 1, 1),
    ]
    figure = confidence.by_signal_cells([cell])
    assert "Both passes ran on every token" in figure.caption
    assert "not known" not in figure.svg


def test_no_label_covers_another_or_a_point_or_a_bar():
    _, axes = plt.subplots(figsize=(7.5, 4.8))
    crowd = [(f"strategy-{n}", 1 + 0.02 * n, 0.0) for n in range(9)]
    axes.plot([x for _, x, _ in crowd], [0] * 9, "o")
    axes.errorbar([1.1], [0], yerr=[[3], [2]])
    axes.set_ylim(-20, 3)
    label_points(axes, crowd, [(1.1, -3, 2)])
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    plt.close()
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for _, x, y in crowd:
        at = axes.transData.transform((x, y))
        assert not any(box.contains(*at) for box in boxes)
    low, high = axes.transData.transform([(1.1, -3), (1.1, 2)])
    assert not any(box.x0 < low[0] < box.x1 and box.y0 < high[1] and low[1] < box.y1 for box in boxes)


def slots(record: Record, share: float) -> Record:
    return replace(record, slots=round(share * 16 * 64))


def test_a_budget_that_holds_every_expert_is_said_to():
    found = results(Rule())
    assert "All fits" not in forest.speedups(found, PAPER).caption
    whole = replace(found, records=tuple(slots(r, 1) if r.budget == "16GiB" else r for r in found.records))
    figure = forest.speedups(whole, PAPER)
    assert '"All fits"' in figure.caption
    assert "olmoe-tiny, 16GiB (holds all of it)" in figure.svg
    assert "olmoe-tiny, smallest (holds all of it)" not in figure.svg
    assert not holds_all([slots(r, 0.99) for r in found.records[:2]])
