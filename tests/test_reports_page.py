"""The page says what the records hold, in every format, and nothing that they do not."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as some

from reports.data import groups
from reports.data.compare import UnlikePrompts, accuracy, speedup
from reports.pages import content, write
from reports.plots.style import curves, label_points
from reports.sections import controls
from reports.sections.examples import cut_at_spans, disagreements
from reports.stats.pareto import front
from reports.tables import overview, scores, speed
from tests.report_runs import ITEMS, Rule, record, results

MODEL = ("olmoe-tiny", "olmoe", 0)
FOUR = (
    MODEL,
    ("qwen2-moe-tiny", "qwen2-moe", 0),
    ("deepseek-v2-tiny", "deepseek-v2", 0),
    ("qwen3-moe-tiny", "qwen3-moe", 0),
)
SEEDS = (MODEL, ("olmoe-tiny-seed1", "olmoe", 1), ("olmoe-tiny-seed2", "olmoe", 2))


@pytest.fixture(scope="module")
def four():
    return results(Rule(models=FOUR))


@pytest.fixture(scope="module")
def page_of_four(four):
    return content.build(four)


def test_items_are_paired_by_number_and_never_by_position():
    """The timed cells hold every fourth item, and the items of one cell lie backwards."""
    found = results(Rule(timed=10))
    base = groups.baselines(found, "smallest", "olmoe-tiny")["on-demand-overlap"]
    own = [replace(r, items=r.items[::-1]) for r in groups.mobile(found, "olmoe-tiny")]
    assert [len(r.items) for r in base] == [10, 10]
    assert speedup(own, base).value == pytest.approx(64 / 40)
    against = accuracy(own, groups.full_k(found, "olmoe-tiny"))
    assert (against.items, against.lost, against.gained) == (2 * ITEMS, 4, 0)


def test_one_number_for_two_prompts_is_refused():
    found = results(Rule())
    base = groups.baselines(found, "smallest", "olmoe-tiny")["on-demand"]
    other = [replace(r, items=tuple(replace(i, prompt_sha256="0") for i in r.items)) for r in base]
    with pytest.raises(UnlikePrompts, match="not given the same prompts"):
        speedup(groups.mobile(found, "olmoe-tiny"), other)


def test_the_score_of_a_task_stands_with_everything_that_goes_with_it():
    [table] = scores.by_task(results(Rule()), "olmoe-tiny", 1.0)
    shown = {(row[0], row[1]): dict(zip(table.head, row, strict=True)) for row in table.rows}
    own = shown["arithmetic", "mobile (gamma 0.7)"]
    assert own["n"] == str(ITEMS)
    assert own["score %"].startswith("87.5 [")
    assert own["difference to full K"].startswith("-5.0 [")
    assert own["lost / gained"] == "2 / 0"
    assert own["McNemar p"] == "0.500"
    assert own["within 1 point"] == "not shown"
    assert own["difference to static K/2"].startswith("+0.0 [")
    assert own["fallbacks"] == "20.0 %"
    assert own["over on-demand-overlap"].startswith("1.60x")
    assert ("web_of_lies (guessing 50 %)", "static-half") in shown
    assert shown["all tasks", "full K"]["n"] == str(2 * ITEMS)


def test_four_families_have_a_row_and_a_chapter_each(four, page_of_four):
    page = page_of_four
    assert [row[0] for row in overview.families(four, 1.0).rows] == [name for name, *_ in FOUR]
    chapters = [section.heading for section in page.sections if section.level == 2]
    assert [name for name in chapters if name.endswith("-tiny")] == [name for name, *_ in FOUR]
    assert len({figure.name for figure in page.figures}) == len(page.figures)
    assert len({section.anchor for section in page.sections}) == len(page.sections)


def test_a_model_with_fewer_budgets_has_no_empty_rows(four):
    part = replace(four, records=tuple(r for r in four.records if r.model == "olmoe-tiny" or r.budget != "16GiB"))
    rows = overview.verdicts(part, content.tomllib.loads(content.PAPER.read_text()), trusted=True).rows
    assert all(row[5] != "MISSING" for row in rows)
    assert {row[2] for row in rows if "16GiB" in row[3]} == {"olmoe-tiny"}


def test_seeds_stand_in_one_table_and_have_no_chapter():
    found = results(Rule(models=SEEDS))
    table = scores.by_seed(found, found.families["olmoe"], 1.0)
    assert [row[1] for row in table.rows] == ["0", "1", "2", "-"]
    assert table.rows[-1][table.head.index("full K %")] == "92.5 ± 0.0"
    page = content.build(found)
    assert "olmoe-tiny-seed1" not in {section.heading for section in page.sections}
    assert any(section.heading == "Seeds" for section in page.sections)


def test_examples_are_two_lost_and_what_fell_back_is_marked():
    found = disagreements(results(Rule()), "olmoe-tiny", "arithmetic")
    assert [example.title.split(":")[0] for example in found] == ["arithmetic 2", "arithmetic 7"]
    assert all(example.full_k_right and not example.mobile_right for example in found)
    assert [(run.text, run.fell_back) for run in found[0].mobile[:5]] == [
        (" ", False),
        ("2 ", True),
        ("+", False),
        (" ", True),
        ("1 = 2. So the answer is 2.", False),
    ]


@given(some.text(max_size=30), some.lists(some.tuples(some.integers(0, 35), some.integers(0, 35)), max_size=5))
def test_marking_loses_no_character(text, spans):
    runs = cut_at_spans(text, tuple(spans))
    assert "".join(run.text for run in runs) == text
    at = 0
    for run in runs:
        for position in range(at, at + len(run.text)):
            assert run.fell_back == any(start <= position < end for start, end in spans)
        at += len(run.text)


@pytest.mark.parametrize(
    ("rule", "alarm"),
    [
        (Rule(), None),
        (Rule(canary_correct=ITEMS), "accuracy did not collapse"),
        (Rule(canary_slowdown=1.2), "time changed"),
        (Rule(canary_slowdown=1.03), None),
        (Rule(overrides={"checks": {"mobile: tokens alone equal tokens in the batch": False}}), "mobile: tokens alone"),
        (Rule(overrides={"ceiling_tokens_per_s": 3.0}), "passed its bandwidth ceiling"),
    ],
)
def test_a_broken_control_is_the_first_line_and_no_verdict_survives_it(rule, alarm):
    found = results(replace(rule, scope="gpu+pcie", weights="real"))
    page = content.build(found)
    verdicts = next(section for section in page.sections if section.heading == "Verdicts").tables[0].rows
    if alarm is None:
        assert page.alarm is None
        assert "REPRODUCED" in {row[5] for row in verdicts}
        return
    assert page.alarm.startswith("Nothing below can be trusted")
    assert alarm in page.alarm
    assert {row[5] for row in verdicts} == {"FAILED"}
    assert write.markdown(page).startswith(f"**{page.alarm}**")


def test_a_model_that_guesses_cannot_tell_whether_the_canary_fell():
    found = results(Rule(tasks=("web_of_lies",), wrong=tuple(range(0, ITEMS, 2))))
    assert [(canary.passed, canary.result) for canary in controls.canaries(found)] == [
        (None, "cannot tell: the sound score is near guessing")
    ]
    assert content.build(found).alarm is None


def test_controls_are_in_no_other_table():
    found = results(Rule())
    with_controls, without = content.build(found), content.build(replace(found, controls=()))
    drop = ("Controls",)
    kept = [[s for s in page.sections if s.heading not in drop] for page in (with_controls, without)]
    assert kept[0] == kept[1]
    assert with_controls.opening == without.opening


@pytest.mark.parametrize("weights", ["real", "synthetic", "shipped-tiny"])
@pytest.mark.parametrize("scope", ["cpu+virtual", "gpu+throttled", "gpu+pcie"])
def test_no_output_calls_a_projection_reproduced(tmp_path, scope, weights):
    found = results(Rule(tasks=("arithmetic",), scope=scope, weights=weights, lost=()))
    page = content.build(found)
    write.write(page, found, tmp_path)
    rule = next(section for section in page.sections if section.heading == "Verdicts").paragraphs[-1]
    measured = (scope, weights) == ("gpu+pcie", "real")
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        text = path.read_text(encoding="utf-8")
        if path.name in ("report.html", "report.md"):
            assert text.count("REPRODUCED:") == 1, "the rule is printed"
            text = text.replace("REPRODUCED:", "")
            assert ("REPRODUCED" in text) == measured, path
            assert f"{scope}, {weights}" in text
        else:
            assert "REPRODUCED" not in text, path
    assert "REPRODUCED" in rule


class Tags(HTMLParser):
    """A parser that raises where a tag is not closed by its own, and keeps the ids."""

    VOID = ("meta", "br", "use", "path", "rect", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_every_output_of_one_record_set_can_be_read(four, page_of_four, tmp_path):
    page = page_of_four
    write.write(page, four, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids)), "an id stands twice"
    loaded = re.sub(r'<a href="https:[^"]*">', "", html)  # a link of ours loads nothing
    assert not re.search(r"""(src|href)=["']?https?:|url\(https?:|@import""", loaded), "the page must open offline"
    assert "What is 2 + 1? &lt;b&gt;&amp;" in html
    assert "<mark>2 </mark>" in html
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "⟦2 ⟧" in text
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (tmp_path / name).is_file()
    assert len(list((tmp_path / "figures").glob("*.svg"))) == len(page.figures) == html.count("<svg")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "cells.csv").read_text())))
    assert len(rows) == len(four.records) + len(four.controls)
    assert {row["control"] for row in rows} == {"", "canary"}
    names = ("id", "model", "task", "strategy", "budget")  # from a number of the page to its record: reports/README.md
    cells = [tuple(getattr(record, name) for name in names) for record in four.all_records]
    assert [tuple(row[name] for name in names) for row in rows] == cells
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} >= {
        "olmoe-tiny arithmetic mobile (gamma 0.7)",
        "qwen3-moe-tiny arithmetic on-demand",
    }


def test_the_latex_tables_compile(four, page_of_four, tmp_path):
    write.write(page_of_four, four, tmp_path)
    text = (tmp_path / "tables.tex").read_text()
    assert text.count("\\toprule") == text.count("\\bottomrule") == 2
    assert "static-half" in text
    for table in text.split("\\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(l?r+)\}", table).group(1))
        for row in re.findall(r"^(.*?) \\\\$", table, re.MULTILINE)[1:]:
            assert row.count(" & ") == columns - 1, row
    if not shutil.which("pdflatex"):
        pytest.skip("there is no LaTeX here: the rows were counted, not compiled")
    page = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\\input{tables}\\end{document}"
    (tmp_path / "page.tex").write_text(page)
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "page.tex"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_every_figure_carries_its_numbers_and_the_text_colour_of_its_page(page_of_four):
    for figure in page_of_four.figures:
        assert figure.data.rows, figure.name
        assert "currentColor" in figure.svg
        assert figure.link.startswith("data:text/csv")
        ids = re.findall(r'\bid="([^"]+)"', figure.svg)
        assert all(name.startswith(f"{figure.name}-") for name in ids)


def test_the_front_holds_what_nothing_beats():
    assert front([(1, 0), (2, 0), (3, -1), (2.5, -2), (3, -3)]) == [(2, 0), (3, -1)]


def test_a_trained_predictor_stands_with_its_price():
    found = results(Rule())
    trained = [
        replace(record(Rule(), MODEL, task, "lru", None, "smallest"), strategy="trained-predictor")
        for task in ("arithmetic", "web_of_lies")
    ]
    took = {"seconds": 6.0, "tokens": 500, "fits": 4, "parameters": 64, "nbytes": 256, "online": True}
    trained = [replace(r, environment={**r.environment, "training": took}) for r in trained]
    table = speed.by_strategy(replace(found, records=(*found.records, *trained)), "olmoe-tiny", "smallest")
    assert table.note.startswith("trained-predictor learnt from 1,000 decode tokens as it went: 8 fits in 12.00 s of")


def test_unknown_times_are_dashes_and_never_zero():
    """Cells that were scored and not timed."""
    rule = Rule()
    found = results(rule)
    untimed = tuple(
        replace(r, items=tuple(replace(i, decode_ns=None) for i in r.items)) if r.strategy == "mobile" else r
        for r in found.records
    )
    table = speed.by_strategy(replace(found, records=untimed), "olmoe-tiny", "smallest")
    own = next(dict(zip(table.head, row, strict=True)) for row in table.rows if row[0] == "mobile (gamma 0.7)")
    times = ("tokens/s", "over on-demand", "over on-demand-overlap", "over lru")
    assert [own[name] for name in times] == ["-", "-", "-", "-"]
    assert content.build(replace(found, records=untimed)).alarm is None


def test_what_a_card_told_is_printed_and_what_it_did_not_is_a_dash():
    spread = {"min": 3.0, "mean": 4.0, "max": 5.0}
    told = {
        "energy_joules": 80.0,
        "power_milliwatts": {**spread, "mean": 250_000.0},
        "sm_clock_mhz": None,
        "temperature_celsius": spread,
        "link_generation": spread,
        "link_width": {**spread, "min": 16},
        "link_received_kb_per_s": {**spread, "mean": 2e7},
        "clock_limits": {"power cap": 0.25},
    }
    page = content.build(results(Rule(scope="gpu+pcie", gpu={"name": "a card"}, telemetry=told)))
    table = next(section for section in page.sections if section.heading == "What the card did").tables[0]
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row["strategy"] == "resident, all"
    assert row["power W"] == "250"
    assert row["J/token"] == f"{160 / 800:.2f}"
    assert row["SM clock MHz, least"] == "-"
    assert row["hottest °C"] == "5"
    assert row["link"] == "3 x16"
    assert row["clocks held down"] == "power cap 25.0 %"
    assert row["link MB/s: card"] == "20,000"


def test_a_failed_cell_is_printed_with_its_reason_and_the_end_of_its_log():
    why = tuple((f"cell {n}", "FAILED: it broke") for n in range(3))
    found = replace(results(Rule()), absent=why, logs=tuple((label, "Traceback <x>\nit broke") for label, _ in why))
    page = content.build(found)
    section = next(s for s in page.sections if s.heading == "Failed and missing cells")
    assert section.tables[0].rows == why
    assert section.logs == (("cell 0 and 2 more", "Traceback <x>\nit broke"),)
    assert "    it broke\n" in write.markdown(page)


def test_lines_that_end_together_all_keep_their_names():
    lines = {name: [(0.0, 1.0), (1.0, 2.0)] for name in ("first", "second", "third", "fourth")}
    drawn = curves("same", "a caption", lines, "x", "y")
    assert all(f">{name}</text>" in drawn.svg for name in lines)


def test_labels_of_points_that_lie_together_do_not_cover_each_other():
    drawn, axes = plt.subplots(figsize=(7.5, 4.8))
    points = [(f"label {n}", 1 + n / 100, n / 1000) for n in range(8)]
    axes.plot([1, 3], [-20, 2])
    label_points(axes, points)
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    plt.close(drawn)
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_page_says_where_experts_were_copied_from_memory_that_was_not_page_locked():
    def limits(**config: object) -> str:
        made = results(Rule())
        records = tuple(replace(record, config={**record.config, **config}) for record in made.records)
        return write.markdown(content.build(replace(made, records=records)))

    assert "did not page-lock the experts' host memory" in limits(link_page_locked=False)
    assert "did not page-lock" not in limits(link_page_locked=True)
    assert "did not page-lock" not in limits()
