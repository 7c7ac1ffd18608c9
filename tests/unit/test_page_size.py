"""A page is small and fits a narrow screen: short paths, one a kind of event, and rows that become cards."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from reports.elements.page import Report, Section, Table
from reports.pages import write
from reports.plots.compact import compact
from reports.plots.timeline import token_timeline
from tests.report_runs import Rule, results

MODEL = "olmoe-tiny"


def with_timeline(events):
    found = results(Rule())
    return replace(found, records=tuple(replace(r, timeline=events) if r.timeline else r for r in found.records))


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("M 1.2345 2 \nL 3.999999 2 \nL 3.999999 7.5 \nL 1.2345 7.5 \nz\n", "M1.23 2H4V7.5H1.23z"),
        ("M 1 2 L 3 2 L 3 4 L 1 5 z", "M1 2L3 2L3 4L1 5z"),
        ("M -0.001 10 \nC 1.005 2.25 3 4 -5.128 6 ", "M-0 10C1 2.25 3 4 -5.13 6"),
    ],
)
def test_path_data_is_shortened_and_nothing_else_of_a_tag(path, short):
    assert compact(f'<path d="{path}" id="d=1.23456" style="stroke-width: 1.23456"/>') == (
        f'<path d="{short}" id="d=1.23456" style="stroke-width: 1.23456"/>'
    )


def test_a_timeline_has_one_path_a_kind_however_many_events_there_are():
    def paths(events):
        drawn = token_timeline(with_timeline(events), MODEL)
        return len(re.findall(r'clip-path="url', drawn.svg)), drawn

    few, _ = paths((("load", 0, 500, "a"), ("stall", 0, 500, "a"), ("compute", 500, 900, "b")))
    busy = tuple(
        event
        for at in range(0, 400_000, 1000)
        for event in (("load", at, at + 500, "a"), ("stall", at, at + 500, "a"), ("compute", at + 500, at + 900, "b"))
    )
    many, drawn = paths(busy)
    assert many == few == 2 * 3  # two strategies, three kinds
    assert drawn.svg.count("z") > 2 * 2 * 400, "every load and every compute is drawn"
    assert len([row for row in drawn.data.rows if row[1] == "load"]) == 2 * 400


def test_stalls_are_what_is_left_of_a_bar_under_the_computing():
    events = (("stall", 0, 500_000, "a"), ("compute", 500_000, 900_000, "b"), ("stall", 900_000, 1_000_000, "a"))
    rows = token_timeline(with_timeline(events), MODEL).data.rows
    own = [row[1:] for row in rows if row[0] == "on-demand-overlap"]
    assert own == [("compute or stall", "0.0000", "1.0000"), ("compute", "0.5000", "0.4000")]


class Cells(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.cells, self.tables = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "td":
            self.cells.append(dict(attrs).get("data-label"))
        if tag == "table":
            self.tables.append(dict(attrs).get("class"))


def test_a_cell_carries_its_column_for_the_card_that_a_narrow_screen_makes_of_its_row():
    narrow = Table("n", ("name", "a & b"), (("x", "1"), ("y", "2")))
    wide = Table("w", tuple("abcdefgh"), (tuple("12345678"),))
    html = write._render("report.html.j2", Report("t", (), None, (Section("s", (), (narrow, wide)),), ()))
    found = Cells(html)
    assert found.cells == [None, "a & b", None, "a & b", None, *"bcdefgh"]
    assert found.tables == ["cards", "cards wide"]
    assert re.search(r"@media screen and \(max-width: 40rem\) \{\s*table\.cards", html)
    assert re.search(r"@media screen and \(max-width: 56rem\) \{\s*table\.wide", html)
    assert "attr(data-label)" in html
