"""The chapter past the paper: what composed strategies, packed rows and choices that know the cache add to MoBiLE."""

from __future__ import annotations

from collections.abc import Sequence

from reports.data.groups import budget_holds_all
from reports.data.results import AS_IS, Results, rows_of
from reports.data.settings import Setting, answered_itself, at_memory, memory_budgets
from reports.elements.numbers import budget_name
from reports.elements.page import Section
from reports.plots import past_paper as plots
from reports.tables import past_paper as tables
from reports.tables import synthetic

Found = Sequence[tuple[str, str, Sequence[Setting]]]  # (model, memory budget, settings)

METHOD = (
    "On a busy link prediction cannot pay; only fewer bytes can: fewer experts (MoBiLE), bytes that never move (a "
    "better cache, experts computed on the CPU, choices among what is there), fewer bits a weight (packed rows). "
    'They multiply. Names joined by "+" are one strategy made of the parts of several. Everything in a table has the '
    "same bytes of memory, so packed rows are also more slots. Rows of int8 or int4 are other weights: also with all "
    "experts their answers are held against those of the stock model. Speed is projected where it stands beside "
    "accuracy, and measured where the heading says so."
)
OWN_ANSWERS = (
    "Strategies that choose by what is in the slots answer by themselves in every cell, one prompt at a time: what "
    "they write depends on the memory and on what was asked before."
)
MEASURED = (
    "The same scripts of recorded routing over this machine's disk, in real time, in turn, with as much memory for "
    "every row of a table as the heading says. A script fixes where MoBiLE falls back: on packed rows the model's own "
    "rate may be another, which the tables above show. Fewer layers are made than the real models have, so that the "
    "output head and all else that every token reads weigh more here, and cap what fewer bytes can give."
)


def sections(results: Results, margin_points: float) -> list[Section]:
    """Return the chapter; nothing for a run that does not go past the paper."""
    if not goes_past(results):
        return []
    found = _found(results)
    own = (OWN_ANSWERS,) if any(map(answered_itself, results.records)) else ()
    paragraphs = (METHOD, *own, *((verdict(found, margin_points),) if found else ()))
    summary = (tables.champions(found, margin_points),) if found else ()
    parts = [
        Section(
            f"{model} past the paper, {budget}",
            (),
            (tables.by_setting(settings, model, budget, margin_points),),
            tuple(
                drawn
                for drawn in (plots.accuracy_against_speed(settings, model, settings[0].cells[0].budget),)
                if drawn
            ),
            level=3,
            folded=True,
        )
        for model, budget, settings in found
    ]
    return [Section("Past the paper", paragraphs, summary), *parts, *_measured(results, found, margin_points)]


def opening(results: Results, margin_points: float) -> str:
    """Return the chapter's verdict for the page's first paragraphs; empty for a run without such a chapter."""
    found = _found(results) if goes_past(results) else []
    return f"{verdict(found, margin_points)} A projection, like all speeds beside accuracy here." if found else ""


def in_short(results: Results, margin_points: float) -> str:
    """Return in how many cases the aim was reached, in one clause; empty for a run without such a chapter."""
    found = _found(results) if goes_past(results) else []
    best = [tables.fastest(settings, margin_points) for _, _, settings in found]
    reached = [each for each in best if each is not None and each.over_base.value >= tables.WANTED]
    worst = [each.worst for each in reached if each.worst]
    lowest = min(worst, key=lambda each: each.loss.difference.value, default=None)
    beside = f" (worst task {lowest.in_words})" if lowest else ""
    return f"{_aim(margin_points)}{beside} was reached in {len(reached)} of {len(found)} cases" if found else ""


def _found(results: Results) -> Found:
    """Return the settings of every model and memory budget that has a baseline and something beside it."""
    return [
        (model, budget_name(budget, budget_holds_all(results, model, budget)), settings)
        for model in results.models
        for budget in memory_budgets(results, model)
        if len(settings := at_memory(results, model, budget)) > 1
    ]


def goes_past(results: Results) -> bool:
    """Return whether a run has composed strategies, packed rows, or choices that know the cache."""
    composed = any("+" in record.strategy for record in (*results.records, *results.synthetic))
    return composed or bool(results.packed or results.packed_synthetic)


def verdict(found: Found, margin_points: float) -> str:
    """Return in how many cases the aim was reached, and by what."""
    reached, missed = [], []
    for model, budget, settings in found:
        best = tables.fastest(settings, margin_points)
        if best is not None and best.over_base.value >= tables.WANTED:
            lost = f", worst task {best.worst.short}" if best.worst else ""
            reached.append(f"{model} with {budget} ({best.over_base.value:.2f}x, {best.name}{lost})")
        else:
            missed.append(f"{model} with {budget}")
    aim = _aim(margin_points)
    if not reached:
        return f"Projected, {aim} was reached nowhere."
    return f"Projected, {aim} was reached by {'; '.join(reached)}" + (
        f". It was not reached by {'; '.join(missed)}." if missed else ", in every case."
    )


def _aim(margin_points: float) -> str:
    return (
        f"at least {tables.WANTED:g} times on-demand-overlap at the same memory for at most {margin_points:g} point "
        "over all tasks together"
    )


def _measured(results: Results, projected: Found, margin_points: float) -> list[Section]:
    """Return the measured part: each geometry over the disk, rows and strategies side by side."""
    records = [r for r in results.scripted if r.scope == "cpu+disk"]
    models = dict.fromkeys(r.model for r in records if rows_of(r) != AS_IS or "+" in r.strategy)
    by_model = {model: [record for record in records if record.model == model] for model in models}
    found = tuple(table for cells in by_model.values() if (table := synthetic.by_rows(cells)).rows)
    if not found:
        return []
    summary = tables.measured([record for cells in by_model.values() for record in cells], projected, margin_points)
    return [
        Section("Past the paper, measured over the disk", (MEASURED,), (summary,), level=3),
        Section("Past the paper over the disk, every cell", (), found, level=3, folded=True),
    ]
