"""Each word of a page is explained once, in the part where it first stands."""

from __future__ import annotations

from html import unescape

from reports.elements.page import FirstScreen, Report, Section, Table, Tile
from reports.pages import content, write
from reports.sections.words import GLOSSES, with_words
from tests.report_runs import Rule, results


def words(report):
    return [[word for word, _ in part] for part in (report.words, *(section.words for section in report.sections))]


def page(*sections, opening=(), first=None):
    return with_words(Report("t", opening, None, sections, (), first))


def test_a_word_is_explained_where_it_first_stands_and_nowhere_else():
    made = page(Section("a", ("Two slots.",)), Section("b", ("A slot and gamma.",)), opening=("Nothing.",))
    assert words(made) == [[], ["slot"], ["gamma"]]


def test_heads_cells_captions_and_tiles_count_and_parts_of_words_do_not():
    table = Table("Of fallbacks", ("TPOT ms",), (("lru",),), "a canary")
    assert words(page(Section("a", (), (table,))))[1] == ["fallback", "lru", "TPOT", "canary"]
    first = FirstScreen("It is lossless.", (Tile("Hits", (("1", "of full K"),)),), "", (), "")
    assert words(page(first=first)) == [["lossless", "full K", "hits"]]
    assert words(page(Section("a", ("slotted, sublru, lfu-like",)))) == [[], []]


def test_plain_offloading_and_its_overlapped_kind_are_two_words():
    assert words(page(Section("a", ("over on-demand-overlap",)), Section("b", ("over on-demand",)))) == [
        [],
        ["on-demand-overlap"],
        ["on-demand"],
    ]


def test_a_page_explains_what_it_says_in_html_and_in_markdown(tmp_path):
    found = results(Rule())
    report = content.build(found)
    write.write(report, found, tmp_path)
    explained = [each for part in (report.words, *(section.words for section in report.sections)) for each in part]
    assert len({word for word, _ in explained}) == len(explained)
    asked = {"slot", "full K", "static K/2", "fallback", "gamma", "on-demand", "on-demand-overlap", "lossless"}
    assert asked | {"paired difference", "projected", "virtual clock"} <= {word for word, _ in explained}
    html = unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for word, gloss in explained:
        assert html.count(f"<dfn>{word}</dfn> {gloss}") == 1
        assert text.count(f"**{word}**: {gloss}") == 1


def test_no_gloss_is_long():
    assert all(len(gloss.split()) <= 20 and not gloss.endswith(".") for _, _, gloss in GLOSSES)
