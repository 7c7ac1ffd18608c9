"""The chapter of the preset accuracy: is MoBiLE's loss negligible, with enough questions to say so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from reports.data.results import NoResults, Results, family, read
from reports.elements.page import Section, Tile
from reports.tables import accuracy as tables
from reports.tables.accuracy import BAND, Judged, headroom, in_points, judged, levels
from suites.identity import SHIPPED
from suites.plan.accuracy_cells import FULL_K, PAPERS, RANDOM, STATIC

KEPT = Path(__file__).parents[1] / "measured" / "accuracy"  # the committed run, which other pages cite
LACKS = "This run lacks the cells for a verdict."
METHOD = (
    "Every gating answered the same fresh items: on the test side, never trained on, none of them shipped, no prompt "
    "twice. The rule was fixed before the run: the loss is within the margin where the whole interval of the paired "
    "difference lies above it, beyond it where the whole interval lies below, and else not shown. The items came in "
    "rounds with a look after each, and a family was asked no more once its verdict was settled. The intervals of the "
    "looks cover {levels}: their errors add up to 5 % (Bonferroni), most of it left for the last look (as O'Brien and "
    "Fleming's), so ending early does not raise the rate of errors. Within a look it is Bonett and Price's interval of "
    "a paired difference, widened by the design effect of items that share their substance."
)


def sections(results: Results) -> list[Section]:
    """Return the chapter of a run that has accuracy cells; none otherwise."""
    found = judged(results.accuracy)
    if not found:
        return []
    room = "; ".join(f"{family(one.records[0])}: {', '.join(headroom(one)) or 'none'}" for one in found)
    return [
        Section("Is the loss negligible?", (METHOD.format(levels=levels(found[0])),), (tables.verdicts(found),)),
        Section("Every gating", (_control(found),), (tables.gatings(found),), level=3),
        Section(
            "Every task",
            (
                f"Tasks on which {FULL_K} is between {100 * BAND[0]:g} and {100 * BAND[1]:g} %, so that there is "
                f"something to lose and to win: {room}.",
            ),
            (tables.by_task(found),),
            level=3,
        ),
    ]


def opening(results: Results) -> str:
    """Return the verdict of an accuracy run in words; empty for any other."""
    return _verdict(judged(results.accuracy)) if results.accuracy else ""


def cited(results: Results) -> list[Section]:
    """Return a chapter that cites the committed accuracy run; none where it is not cited."""
    kept = _kept(results)
    if kept is None:
        return []
    found = judged(kept.accuracy)
    commits = ", ".join(dict.fromkeys(str(r.environment["git_commit"])[:12] for r in kept.accuracy))
    text = (
        f"From the committed run of the preset accuracy (code {commits}), whose records and page lie in "
        f"reports/measured/accuracy; repeat it with: nox -s reproduce -- --preset accuracy. {_verdict(found)}"
    )
    return [Section("The loss, with enough questions", (text,), (tables.verdicts(found),))]


def cited_clause(results: Results) -> str:
    """Return what the committed accuracy run says of the loss, a clause of a verdict; empty where it is not cited."""
    kept = _kept(results)
    if kept is None:
        return ""
    found = judged(kept.accuracy)
    least, most = (f"{end(one.items for one in found):,}" for end in (min, max))
    asked = least if least == most else f"{least} to {most}"
    return (
        f"; its loss of accuracy, over {asked} questions a family in the committed run of the preset accuracy, is "
        f"{counted(found)}"
    )


def counted(found: Sequence[Judged]) -> str:
    """Return for how many families the loss is within the margin, and for how many beyond it."""
    said, margin = [one.verdict for one in found], found[0].margin_points
    return (
        f"shown to be at most {margin:g} point for {said.count('yes')} of {len(said)} families, and to be more "
        f"for {said.count('no')}"
    )


def screen(results: Results) -> tuple[str, tuple[Tile, ...]]:
    """Return the sentence and the tiles that the page of an accuracy run begins with."""
    found = judged(results.accuracy)
    if not found:
        return LACKS, ()
    whose = min(found, key=lambda one: one.worst(PAPERS)[1].value)
    task, loss = whose.worst(PAPERS)
    pooled = min(found, key=lambda one: one.difference(PAPERS).value)
    best = max(found, key=lambda one: one.difference(PAPERS).value)
    said = f"Counted, not projected: at the paper's gamma MoBiLE's loss of accuracy against {FULL_K} is "
    return f"{said}{counted(found)}.", (
        Tile(
            "Loss, all tasks together",
            tuple(
                (f"{in_points(one.difference(PAPERS))} points", f"{where}, {family(one.records[0])}, n = {one.items:,}")
                for where, one in (("largest", pooled), ("smallest", best))
            ),
        ),
        Tile(
            "Worst loss on one task",
            ((f"{in_points(loss)} points", f"{family(whose.records[0])} on {task}, n = {loss.items:,}"),),
        ),
        Tile(
            "Added by falling back",
            tuple(
                (_ends([one.difference(PAPERS, against).value for one in found]), f"points, {PAPERS} less {against}")
                for against in (STATIC, RANDOM)
            ),
        ),
    )


def _ends(values: Sequence[float]) -> str:
    low, high = f"{min(values):+.2f}", f"{max(values):+.2f}"
    return low if low == high else f"{low} to {high}"


def _kept(results: Results) -> Results | None:
    """Return the committed accuracy run for a run of the shipped models without such cells; None for any other."""
    ours = bool(results.records) and set(results.distinct("weights")) == {SHIPPED}
    return _committed() if ours and not results.accuracy else None


@cache
def _committed() -> Results | None:
    try:
        return read(KEPT)
    except NoResults:
        return None


def _verdict(found: list[Judged]) -> str:
    said = {"yes": "shown to be within", "no": "shown to be more than", "not shown": "not shown to be within"}
    margin = found[0].margin_points
    parts = []
    for one in found:
        task, worst = one.worst(PAPERS)
        parts.append(
            f"for {family(one.records[0])} it is {said[one.verdict]} {margin:g} point "
            f"({in_points(one.difference(PAPERS))} over {one.items:,} items; worst task {task} {in_points(worst)})"
        )
    return f"MoBiLE's loss against {FULL_K}, at the paper's gamma: {'; '.join(parts)}."


def _control(found: list[Judged]) -> str:
    better = [family(one.records[0]) for one in found if one.difference(PAPERS, RANDOM).low > 0]
    names = [gating for gating in found[0].gatings if gating not in (STATIC, RANDOM)]
    kept = {
        gating: [family(o.records[0]) for o in found if o.difference(gating).within(o.margin_points) == "yes"]
        for gating in names
    }
    above = [family(one.records[0]) for one in found if one.difference(PAPERS, STATIC).low > 0]
    return (
        f"That MoBiLE answers better than {STATIC}, which never falls back, is shown for {_named(above)}. That it "
        f"falls back at the right tokens, and does better than {RANDOM} at the same rate, is shown for "
        f"{_named(better)}. A loss within {found[0].margin_points:g} point is shown "
        f"{'; '.join(f'at {gating} for {_named(families)}' for gating, families in kept.items())}."
    )


def _named(families: list[str]) -> str:
    return ", ".join(families) if families else "none of them"
