"""Words of the page: one verdict, no pooled difference without its worst task, nothing that was not measured."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from reports.data.compare import worst_task
from reports.pages import content
from reports.sections import sentences
from tests.report_runs import ITEMS, Rule, results

PAPER = tomllib.loads(content.PAPER.read_text(encoding="utf-8"))
TWO = (("olmoe-tiny", "olmoe", 0), ("qwen2-moe-tiny", "qwen2-moe", 0))


def losing(found, model, task, more):
    """Return the results with so many more answers of MoBiLE wrong on one task of one model."""

    def worse(record):
        if (record.model, record.task, record.strategy) != (model, task, "mobile"):
            return record
        right = [i.doc for i in record.items if i.correct][:more]
        return replace(record, items=tuple(replace(i, correct=i.correct and i.doc not in right) for i in record.items))

    return replace(found, records=tuple(map(worse, found.records)))


def test_the_worst_task_is_the_one_with_the_lowest_difference():
    found = losing(results(Rule()), "olmoe-tiny", "web_of_lies", 3)
    mobile = found.select(model="olmoe-tiny", strategy="mobile", gamma=0.7, budget="smallest")
    worst = worst_task(mobile, found.select(model="olmoe-tiny", strategy="resident"))
    assert (worst.task, worst.loss.lost) == ("web_of_lies", 5)
    assert worst.in_words.startswith(f"{worst.short} [")
    assert worst.short == f"web_of_lies {-100 * 5 / ITEMS:+.1f}"


@pytest.mark.parametrize("models", [TWO[:1], TWO])
def test_the_worst_task_stands_beside_the_pooled_difference_of_the_opening_and_the_verdict(models):
    found = losing(results(Rule(models=models)), models[-1][0], "web_of_lies", 3)
    for text in (sentences.opening(found, PAPER)[1], sentences.verdict(found, PAPER)):
        assert "(worst task web_of_lies -12.5 [" in text
        assert (f"], {models[-1][0]})" in text) == (len(models) > 1)


def test_the_verdict_is_one_sentence_and_a_projection_says_so():
    text = sentences.verdict(results(Rule(models=TWO)), PAPER)
    assert text.startswith("Projected, so not judged by the paper: MoBiLE ran 1.60 times as fast")
    assert text.endswith("that the loss is within 1 point is shown for 0 of 2 families.")
    assert ". " not in text


def test_the_verdict_of_a_measurement_counts_what_was_judged():
    text = sentences.verdict(results(Rule(scope="gpu+pcie", weights="real", gpu={"name": "a card"})), PAPER)
    assert text.startswith("Measured (gpu+pcie, real), speed ")
    assert "REPRODUCED in " in text
    other = sentences.verdict(results(Rule(scope="gpu+throttled", weights="real")), PAPER)
    assert other.startswith("Measured (gpu+throttled, real), so not judged by the paper: ")


def test_a_broken_control_leaves_no_verdict():
    assert "can be trusted" in sentences.verdict(results(Rule(canary_correct=ITEMS)), PAPER)


def section(page, heading):
    return next(each for each in page.sections if each.heading == heading)


def table(page, heading, caption):
    return next(each for each in section(page, heading).tables if each.caption.startswith(caption))


def rows(shown):
    """Return the rows of a table by their first cell, each a dict by column head."""
    return {row[0]: dict(zip(shown.head, row, strict=True)) for row in shown.rows}


def few(found, strategy, gamma, kept):
    """Return the results with a strategy asked only the items for which `kept(doc)` is true."""

    def cut(record):
        if (record.strategy, record.gamma) != (strategy, gamma):
            return record
        return replace(record, items=tuple(item for item in record.items if kept(item.doc)))

    return replace(found, records=tuple(map(cut, found.records)))


def test_a_projected_run_has_one_sentence_for_all_rows_that_may_not_be_judged():
    page = content.build(results(Rule()))
    assert not any(each.rows for each in section(page, "Verdicts").tables)
    assert (
        section(page, "Verdicts")
        .paragraphs[0]
        .startswith(
            "None of the 6 comparisons with the paper is judged (NOT COMPARABLE (projected), cpu+virtual, shipped-tiny)"
        )
    )
    assert "NOT COMPARABLE" not in "".join(
        cell for each in page.sections for t in each.tables for r in t.rows for cell in r
    )


def test_a_mixed_run_keeps_the_rows_that_are_judged():
    measured = results(Rule(models=TWO, scope="gpu+pcie", weights="real", gpu={"name": "a card"}))
    mixed = replace(
        measured,
        records=tuple(replace(r, scope="cpu+virtual") if r.model == TWO[0][0] else r for r in measured.records),
    )
    judged, every = (section(content.build(each), "Verdicts") for each in (mixed, measured))
    assert {row[2] for row in judged.tables[0].rows} == {TWO[1][0]}
    assert judged.paragraphs[0].startswith("6 of the 12 comparisons with the paper are not judged (NOT COMPARABLE (pro")
    assert len(every.tables[0].rows) == 12
    assert every.paragraphs == judged.paragraphs[1:]


def test_every_gamma_of_the_sweep_is_over_the_same_items_as_full_k_and_static_half():
    found = few(results(Rule(lost=(2, 3, 7))), "mobile", 0.9, lambda doc: doc % 4 == 3)
    shown = rows(table(content.build(found), "olmoe-tiny: accuracy against speed", "Sweep over gamma"))
    assert list(shown) == ["full K", "static-half", "mobile (gamma 0.7)", "mobile (gamma 0.9)"]
    assert {row["n"] for row in shown.values()} == {str(2 * ITEMS // 4)}
    # Of the lost items 3 and 7 are among those: 2 of 10 in each task.
    lost = {row["lost / gained"] for name, row in shown.items() if name != "full K"}
    assert lost == {"4 / 0"}


def test_a_strategy_that_was_asked_less_stands_in_a_table_where_all_are_on_its_items():
    found = few(results(Rule()), "static-half", None, lambda doc: doc % 4 == 3)
    all_asked, fewer = section(content.build(found), "olmoe-tiny: accuracy").tables
    for shown, strategies, n in (
        (all_asked, {"full K", "mobile (gamma 0.7)"}, ITEMS),
        (fewer, {"full K", "static-half", "mobile (gamma 0.7)"}, ITEMS // 4),
    ):
        names, asked = (shown.head.index(name) for name in ("strategy", "n"))
        assert {row[names] for row in shown.rows} == strategies
        assert {row[asked] for row in shown.rows if row[0] != "all tasks"} == {str(n)}


def test_speeds_of_one_table_are_over_the_same_prompts():
    found = results(Rule(timed=10))
    shown = table(content.build(found), "olmoe-tiny: speed", "Decode speed, the fewest")
    assert {row["prompts"] for row in rows(shown).values()} == {"20"}
    assert "only hits and stalled are over all prompts of each, 20 to 80." in shown.note


def test_static_half_is_set_against_mobile_on_the_same_items():
    found = results(Rule())
    worse = [item.doc for item in found.records[0].items if item.correct][:6]
    records = tuple(
        replace(r, items=tuple(replace(i, correct=i.correct and i.doc not in worse) for i in r.items))
        if r.strategy == "static-half"
        else r
        for r in found.records
    )
    [row] = rows(table(content.build(replace(found, records=records)), "Overview", "The families")).values()
    assert row["MoBiLE less full K"].startswith("-5.0 [")
    assert row["static K/2 less full K"].startswith("-15.0 [")
    assert row["MoBiLE less static K/2"].startswith("+10.0 [")
    assert row["worst task"].startswith("arithmetic -5.0 [")
    assert row["over lru"].startswith("1.40x [")
    assert row["over lru, same memory"].startswith("1.40x [")
    assert row["over lru, same memory"].endswith(", 16GiB")


def test_a_budget_that_holds_the_whole_model_is_said_to():
    found = results(Rule())
    held = tuple(replace(r, slots=16 * 64) if r.budget == "16GiB" else r for r in found.records)
    page = content.build(replace(found, records=held))
    assert table(page, "olmoe-tiny: speed", "Decode speed, a card of 16GiB (holds all of it)").rows
    forest = next(figure for figure in page.figures if figure.name == "speedups")
    assert "olmoe-tiny, 16GiB (holds all of it)" in forest.svg
    [row] = rows(table(page, "Overview", "The families")).values()
    assert row["over lru, same memory"] == "-", "where all is held there is nothing to cache"
    assert "holds all of it" not in str(content.build(found))
