"""The chapter past the paper: each setting's answers are those of the run that wrote them, at equal memory."""

from dataclasses import replace

import pytest
from report_runs import ITEMS, Rule, item, record

from reports.data.results import Results
from reports.data.settings import at_memory
from reports.sections.past_paper import sections
from reports.tables.past_paper import champions, fastest, measured

MODEL, MEMORY, MARGIN = ("olmoe-tiny", "olmoe", 0), "3GiB", 1.0
TASKS = ("arithmetic", "web_of_lies")


def cell(like, task, *, named=None, rows="as-is", faster=1.0, wrong=(), docs=range(ITEMS), **config):
    """Return a cell of a strategy called `named`, timed and answering as `like` does, so many times as fast."""
    rule = replace(Rule(), wrong=tuple(wrong))
    made = record(rule, MODEL, task, like, 0.7 if like == "mobile" else None, MEMORY)
    items = tuple(item(rule, task, like, doc) for doc in docs)
    items = tuple(replace(each, decode_ns=round(each.decode_ns / faster)) for each in items)
    config = {**made.config, "rows": rows, "answers_of": config.pop("answers_of", like), **config}
    return replace(made, strategy=named or like, items=items, config=config, id=f"{named or like}-{rows}-{task}")


def run(*cells):
    """Return the results of these cells, sorted as a run's are."""
    as_is = tuple(each for each in cells if each.config["rows"] == "as-is")
    return Results("past", as_is, (), packed=tuple(each for each in cells if each.config["rows"] != "as-is"))


def everything():
    few = range(0, ITEMS, 4)
    return [
        made
        for task in TASKS
        for made in (
            cell("resident", task),
            cell("resident", task, rows="int4", wrong=(3,)),
            cell("on-demand-overlap", task, docs=few, answers_of="resident"),
            cell("on-demand-overlap", task, rows="int4", docs=few, faster=3, answers_of="resident"),
            cell("lru", task, docs=few, answers_of="resident"),
            cell("lru", task, named="belady", docs=few, faster=9, answers_of="resident", needs_future=True),
            cell("mobile", task),
            cell("mobile", task, named="mobile+lfu", docs=few, faster=2, answers_of="mobile"),
            cell("static-half", task, named="drop-cold", answers_of="drop-cold", link="virtual"),
        )
    ]


def by_name(results):
    return {setting.name: setting for setting in at_memory(results, "olmoe-tiny", MEMORY)}


def test_a_composed_strategy_has_the_answers_of_the_run_that_wrote_them():
    found = by_name(run(*everything()))
    assert found["mobile+lfu (gamma 0.7)"].loss == found["mobile (gamma 0.7)"].loss
    assert found["mobile+lfu (gamma 0.7)"].loss.items == 2 * ITEMS
    assert found["mobile (gamma 0.7)"].points.value == -100 * 2 / ITEMS
    assert found["mobile (gamma 0.7)"].worst.short == "arithmetic -5.0"
    assert found["lru"].worst is None


def test_rows_as_they_are_lose_nothing_and_packed_ones_what_all_experts_lose_in_them():
    found = by_name(run(*everything()))
    assert found["lru"].exact
    assert found["lru"].points.value == 0
    packed = found["on-demand-overlap, int4"]
    assert (packed.of_full_k, packed.exact) == (True, False)
    assert packed.points.value == -100 / ITEMS
    assert (packed.over_base.value, packed.over_own_rows.value) == pytest.approx((3.0, 1.0))


def test_a_strategy_that_answers_by_itself_is_scored_on_its_own_cells():
    found = by_name(run(*everything()))["drop-cold"]
    assert found.answers == found.cells
    assert not found.of_full_k


def test_a_limit_is_never_the_fastest_and_what_loses_more_than_asked_neither():
    settings = at_memory(run(*everything()), "olmoe-tiny", MEMORY)
    assert fastest(settings).name == "mobile+lfu (gamma 0.7)"
    assert fastest(settings, MARGIN).name == "lru"
    [row] = champions([("olmoe-tiny", MEMORY, settings)], MARGIN).rows
    assert row[3].startswith("1.14x lru")
    assert row[-2] == "no"


def test_a_setting_without_all_tasks_or_without_answers_is_left_out():
    cells = [each for each in everything() if not (each.strategy == "mobile" and each.task == TASKS[0])]
    assert not {"mobile (gamma 0.7)", "mobile+lfu (gamma 0.7)"} & set(by_name(run(*cells)))


def test_over_the_disk_a_cell_loses_what_its_strategy_and_rows_lose_where_they_were_scored():
    def timed(like, **named):
        made = cell(like, TASKS[0], **named)
        config = {**made.config, "real_moe_layers": 16, "link_gb_per_s": None}
        return replace(made, task="recorded routing", model="olmoe-1b-7b", scope="cpu+disk", config=config)

    found = [("olmoe-tiny", MEMORY, at_memory(run(*everything()), "olmoe-tiny", MEMORY))]
    cells = [
        timed("on-demand-overlap"),
        timed("mobile"),
        timed("mobile", named="mobile+lfu", faster=2),
        timed("on-demand-overlap", rows="int4-cpu", faster=4),
    ]
    for margin, best, reached in ((MARGIN, "1.00x", "no"), (3, "4.00x", "yes")):
        [row] = measured(cells, found, margin).rows
        assert row[3].startswith("1.60x")
        assert row[4].endswith("on-demand-overlap, int4-cpu (-2.5)")
        assert row[5].startswith(best)
        assert row[6] == reached


def test_a_run_that_stays_with_the_paper_has_no_such_chapter():
    plain = [each for each in everything() if "+" not in each.strategy and each.config["rows"] == "as-is"]
    assert sections(run(*plain), MARGIN) == []
    assert sections(run(*everything()), MARGIN)[0].heading == "Past the paper"
