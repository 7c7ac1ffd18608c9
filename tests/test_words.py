"""Words of the page: one verdict, no pooled difference without its worst task, nothing that was not measured."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from reports import commands
from reports.checks import readme
from reports.data import own
from reports.data.compare import worst_task
from reports.data.markdown_tables import read_tables
from reports.pages import content, latex, write
from reports.sections import sentences, signals
from reports.stats.intervals import Interval
from reports.tables import overview
from reports.tables.signals import Row
from tests.report_runs import ITEMS, Rule, results

ROOT = Path(__file__).parent.parent
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
def test_the_worst_task_stands_beside_the_pooled_difference_of_the_opening(models):
    found = losing(results(Rule(models=models)), models[-1][0], "web_of_lies", 3)
    text = sentences.opening(found, PAPER)[1]
    assert "(worst task web_of_lies -12.5 [" in text
    assert (f"], {models[-1][0]})" in text) == (len(models) > 1)


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
    [row] = rows(table(page, "Overview", "The families")).values()
    assert row["over lru, same memory"] == "-", "where all is held there is nothing to cache"
    assert "holds all of it" not in str(content.build(found))


def with_own(found, name, like="lru", faster=2.0, **changed):
    """Return the results with one more strategy, timed so many times as fast as another, its answers the same."""
    made = tuple(
        replace(
            r,
            id=f"own-{r.id}",
            strategy=name,
            items=tuple(replace(i, decode_ns=round(i.decode_ns / faster)) for i in r.items),
            **changed,
        )
        for r in found.records
        if r.strategy == like and r.gamma in (None, 0.7)
    )
    return replace(found, records=(*found.records, *made))


@pytest.mark.parametrize(
    ("name", "like", "says"),
    [
        ("strangers-fifo", "lru", "ran 2.29 times as fast as overlapped plain offloading and answers as full K does."),
        ("mobile+strangers-fifo", "mobile", "and changed accuracy by -5.0 points (worst task arithmetic -5.0 ["),
        (
            "mobile+lfu",
            "mobile",
            "ran 3.20 times as fast as overlapped plain offloading and changed accuracy by -5.0 po",
        ),
    ],
)
def test_a_users_own_strategy_stands_in_the_opening_the_overview_and_the_headline_figure(name, like, says):
    page = content.build(with_own(results(Rule()), name, like))
    label = name if like == "lru" else f"{name} (gamma 0.7)"
    assert f" {label}, a strategy of this run's own, " in page.opening[1]
    assert says in page.opening[1]
    [row] = table(page, "Overview", "Strategies of this run's own").rows
    shown = dict(zip(table(page, "Overview", "Strategies of this run's own").head, row, strict=True))
    assert shown["strategy"] == label
    assert shown["over lru"].startswith("2.00x [" if like == "lru" else "2.80x [")
    assert shown["over MoBiLE"].startswith("1.43x [" if like == "lru" else "2.00x [")
    assert (shown["worst task"] == "-") == (like == "lru")
    [headline] = [figure for figure in page.figures if figure.name == "summary"]
    assert label in headline.svg
    assert [line[1] for line in headline.data.rows] == ["lru", "static-half", "mobile", label]


def test_an_own_strategy_stands_there_in_a_run_without_mobile():
    found = with_own(results(Rule()), "strangers-fifo")
    page = content.build(replace(found, records=tuple(r for r in found.records if r.strategy != "mobile")))
    assert "strangers-fifo, a strategy of this run's own, ran 2.29 times" in page.opening[1]
    assert sentences.LACKS not in page.opening[1]


def test_what_is_shipped_is_not_a_users_own():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mobile.strategies"]
    assert set(shipped) == own.SHIPPED
    assert {path.stem for path in (ROOT / "suites/presets").glob("*.toml")} <= own.PRESETS
    assert own.is_own("mobile+lfu", "mine")
    assert not own.is_own("mobile+lfu", "past")
    assert not any(own.is_own(name, "mine") for name in shipped)
    page = content.build(results(Rule()))
    assert not any(each.caption.startswith("Strategies of") and each.rows for s in page.sections for each in s.tables)


def test_which_is_faster_is_said_budget_by_budget_and_never_at_large():
    found = with_own(results(Rule()), "cpu-hybrid", faster=2.0)
    slower = tuple(
        replace(r, items=tuple(replace(i, decode_ns=4 * i.decode_ns) for i in r.items))
        if (r.strategy, r.budget) == ("cpu-hybrid", "16GiB")
        else r
        for r in found.records
    )
    page = content.build(replace(found, records=slower))
    assert (
        "On rtx4080-pcie4, beside the fastest strategy that answers as full K does: cpu-hybrid is faster with the "
        "fewest slots each needs (olmoe-tiny); MoBiLE is faster than lru with 16GiB (olmoe-tiny)."
    ) in section(page, "Overview").paragraphs


def test_a_strategy_that_knows_the_future_is_no_rival():
    found = with_own(results(Rule()), "belady", faster=9.0)
    assert {row[2] for row in table(content.build(found), "Overview", "MoBiLE beside").rows} == {"lru"}


def test_the_opening_is_two_paragraphs():
    page = content.build(results(Rule(models=TWO)))
    assert len(page.opening) == 2
    assert page.opening[1].count("published numbers") == 1


def test_the_figure_of_accuracy_by_speed_is_over_the_items_that_all_were_asked():
    found = few(results(Rule(lost=(2, 3, 7))), "mobile", 0.9, lambda doc: doc % 4 == 3)
    figure = next(each for each in content.build(found).figures if each.name == "pareto-olmoe-tiny")
    assert figure.caption.endswith(f"over the {2 * ITEMS // 4} questions that all of them were asked.")
    assert {row[4] for row in figure.data.rows if row[0].startswith("mobile")} == {"-20.0000"}


def test_random_fallbacks_stand_in_words_beside_the_papers_signal():
    def row(name, share):
        whole = Interval(share, share, share)
        return Row("olmoe", name, 10, 100, (0.1, 0.2), whole, None, (whole, whole), None)

    rows_found = [row("probability", 0.7), row("random", 0.1)]
    assert "it caught 10 % of the disagreements, the paper's signal 70 %." in signals.control_in_words(rows_found)
    assert signals.control_in_words(rows_found[:1]) == ""


def test_a_table_too_wide_for_the_console_is_turned_and_loses_no_word(capsys):
    wide = overview.families(results(Rule(models=TWO)), 1.0)
    commands._print(Console(width=80), wide)
    printed = capsys.readouterr().out
    assert all(word in printed for name in (*wide.head, *wide.rows[0]) for word in name.split())
    assert "…" not in printed


def test_the_latex_tables_are_over_the_same_items_and_have_the_worst_task():
    found = results(Rule(lost=(2, 3, 7)))
    on_few = latex.tables(few(found, "static-half", None, lambda doc: doc % 4 == 3), None)
    assert "full K & 100.0 & 100.0 " in on_few
    assert "mobile (gamma 0.7) & 80.0 & 80.0 " in on_few
    assert "mobile (gamma 0.7) & 1.60$\\times$ & $-20.0$ & $-20.0$ & 20.0 " in on_few
    on_all = latex.tables(losing(found, "olmoe-tiny", "web_of_lies", 3), None)
    assert "mobile (gamma 0.7) & 1.60$\\times$ & $-11.2$ & $-15.0$ & 20.0 " in on_all


def test_the_points_of_a_readme_are_over_the_same_items_and_have_the_worst_task():
    found = few(losing(results(Rule(lost=(2, 3, 7))), "olmoe-tiny", "web_of_lies", 3), "mobile", 0.9, lambda _: True)
    for run, said in (
        (found, "-11.2 points (web_of_lies -15.0)"),
        (few(found, "static-half", None, lambda doc: doc % 4 == 3), "-20.0 points (arithmetic -20.0)"),
    ):
        page = write.markdown(content.build(run), figures=False)
        assert readme._lost(read_tables(page))["mobile"] == said


def test_the_overview_quoted_by_the_front_page_has_the_worst_task_beside_the_pooled_difference():
    page = read_tables(write.markdown(content.build(results(Rule(models=TWO))), figures=False))
    quoted = readme.BLOCKS["README.md", "families"]("", page)
    head, _, *quoted_rows = quoted.splitlines()
    assert head.startswith(
        "| model | MoBiLE less full K | worst task | static K/2 less full K | MoBiLE less static K/2 |"
    )
    assert all(" arithmetic -5.0 [" in row for row in quoted_rows)
    assert len(quoted_rows) == len(TWO)
    figure = readme._figure(page)
    assert [row[8] for row in figure.data.rows if row[1] == "mobile"] == ["-5"] * len(TWO)


def test_static_half_on_other_items_leaves_mobile_and_full_k_as_they_are():
    found = results(Rule())
    apart = tuple(
        replace(r, items=tuple(replace(i, doc=i.doc + 1000) for i in r.items)) if r.strategy == "static-half" else r
        for r in found.records
    )
    [row] = rows(overview.families(replace(found, records=apart), 1.0)).values()
    assert row["MoBiLE less full K"].startswith("-5.0 [")
    assert (row["static K/2 less full K"], row["MoBiLE less static K/2"]) == ("-", "-")
