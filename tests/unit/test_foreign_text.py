"""Text of a record, whoever wrote it, is shown by every format and every console as it is, and obeyed by none."""

from __future__ import annotations

import csv
import io
import re
import sys
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.text import Text

import mobile.visible
from mobile.cli.terminal import session, show
from mobile.errors import Refused
from reports.checks import expected
from reports.data.markdown_tables import read_tables
from reports.data.results import read
from reports.elements import console as reports_console
from reports.elements import escapes
from reports.elements.page import Example, Report, Section, Span, Table
from reports.elements.slug import slug
from reports.pages import content, write
from reports.plots.style import curves
from suites.identity import LONGEST_NAME, check_name
from suites.plan.preset import read_preset
from suites.record import RunFolder, read_json
from suites.run.jobs import Job
from suites.run.runner import _show
from suites.run.worker import attempt
from tests import report_runs
from tests.report_runs import Rule

PIECES = (
    *"\\`*_~$#<>&|[](){}!+-=@:;'\".,/?%^\t\n\r\v\f\0\x1b\x07\x08\x7f\x85\u2028\u202e\u2066\ud800\udcff é😀x1",
    *(
        "org/model",
        "../../x",
        r"\w",
        r"\g<0>",
        "=cmd()",
        "+1",
        "-2+3",
        "@x",
        "[/x]",
        "[bold]",
        ":tada:",
        "$x^{2}$",
        "\\frac",
    ),
    *(
        '"><script>alert(1)</script>',
        "<img src=x onerror=y>",
        "<!--",
        "</pre>",
        "&lt;",
        "&#60;",
        "{{ 1 }}",
        "{% raw %}",
    ),
    *(
        "[a](http://b)",
        "![a](b)",
        "[a]: b",
        "[^1]:",
        "# h",
        "1. x",
        "- x",
        "> x",
        "---",
        "===",
        "```",
        "| a |",
        "**b**",
        "_c_",
    ),
    *(
        "\x1b[31m",
        "\x1b]0;title\x07",
        "\x9b2J",
        "\\\\[1ex]",
        "\\input{x}",
        "^^M",
        "FAILED: ",
        "NO:",
        "word",
        "a_b",
        "  ",
    ),
)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def hostile(count: int = 1000, seed: int = 17) -> list[str]:
    rng = Random(seed)
    made = ["".join(rng.choices(PIECES, k=rng.randint(1, 6))) for _ in range(count)]
    return [*PIECES, *made][:count]


def shown(text: str) -> str:
    """A text as a reader sees it in one line, whatever its spaces."""
    return " ".join(escapes.visible(text).split())


def test_both_rooms_make_the_same_characters_visible():
    for text in map(chr, range(sys.maxunicode + 1)):
        assert mobile.visible.visible(text) == escapes.visible(text)
    assert escapes.visible("\x1b[31m\u202e\udcff\t\n") == "\\x1b[31m\\u202e\\udcff\t\n"


# --- names of files ----------------------------------------------------------------------------------


def test_any_text_is_a_file_name_of_its_own():
    texts = {*hostile(), *("a/b", "a-b", "A-b", "a--b", slug("a/b"), "x" * 81, "x" * 300, "", ".", "..", "con.", "a.")}
    names = {text: slug(text) for text in texts}
    assert len(set(names.values())) == len(texts)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", name) and ".." not in name for name in names.values())


def test_a_plain_name_stays():
    for name in ("smoke", "cpu", "pareto-qwen1.5-moe-a2.7b", "band-olmoe_tiny"):
        assert slug(name) == name


def test_an_expectation_stays_in_its_folder():
    assert expected.folder_of("cpu") == expected.FOLDER / "cpu"
    for preset in ("../../x", "/etc", "..", "", "a/b", "\0", *hostile(100)):
        assert expected.folder_of(preset).parent == expected.FOLDER
        assert expected.folder_of(preset).name not in ("", ".", "..", "cpu", "smoke")


# --- escapes, one a format ---------------------------------------------------------------------------


def words(token) -> str:
    return "".join(child.content if not child.type.endswith("break") else " " for child in token.children or ())


@pytest.mark.parametrize(
    "text", ["object_counting", "0.9 [0.8, 1.0]", "< 0.001", "a (b)", "mobile (gamma 0.7)", "x | y"]
)
def test_markdown_leaves_what_it_would_not_obey(text):
    assert escapes.markdown(text) == text


@pytest.mark.parametrize(
    ("escape", "text", "made"),
    [
        (escapes.markdown, "$x$ `a` *b* _c_ ~d~ \\w", r"\$x\$ \`a\` \*b\* \_c\_ \~d\~ \\w"),
        (escapes.markdown, "[a](b) <i> &lt;", r"[a\](b) \<i> \&lt;"),
        (escapes.markdown_paragraph, "12. a\n# b", r"12\. a # b"),
        (escapes.markdown_cell, "a|b\\|c", r"a\|b\\\|c"),
        (escapes.latex, "\\input{x} [1] 5% a_b $", r"\textbackslash{}input\{x\} {[}1{]} 5\% a\_b \$"),
        (escapes.csv_cell, "=cmd()", "'=cmd()"),
        (escapes.csv_cell, " @x", "' @x"),
    ],
)
def test_an_escape_is_what_its_format_says(escape, text, made):
    assert escape(text) == made


def test_markdown_shows_every_text_and_obeys_none():
    for text in hostile():
        page = (
            f"{escapes.markdown_paragraph(text)}\n\n"
            f"## A {escapes.markdown(text)} z\n\n- n: {escapes.markdown(text)}\n\n"
            f"| a | b |\n| --- | --- |\n| {escapes.markdown_cell(text)} | z |\n\nend\n\n{escapes.markdown_code(text)}\n"
        )
        tokens = MARKDOWN.parse(page)
        inline = [token for token in tokens if token.type == "inline"]
        used = {child.type for token in inline for child in token.children}
        assert used <= {"text", "text_special", "softbreak"}, (text, used)
        kinds = [token.type for token in tokens if token.level == 0 and token.nesting >= 0]
        first = ["paragraph_open"] if shown(text) else []
        whole = [*first, "heading_open", "bullet_list_open", "table_open", "paragraph_open", "code_block"]
        assert kinds == (whole if escapes.markdown_code(text).strip() else whole[:-1]), text
        said = [" ".join(words(token).split()) for token in inline]
        asked = [shown(text), f"A {shown(text)} z", f"n: {shown(text)}", "a", "b", shown(text), "z", "end"]
        assert said == [" ".join(one.split()) for one in asked[len(asked) - len(said) :]], text


def test_a_table_is_read_back_from_markdown_as_it_was():
    texts = [shown(text) for text in hostile() if shown(text)]
    table = Table("a *caption*", ("what | else", "b_"), tuple(("n", text) for text in texts))
    page = write.markdown(Report("t", (), None, (Section("A `head`", (), (table,)),), ()))
    found = read_tables(page)["A `head`", "a *caption*"]
    assert found.head == table.head
    assert found.rows == table.rows


def test_csv_computes_no_text_and_keeps_numbers():
    texts = hostile()
    numbers = ("-1", "+2.5", "-1e-05", "1E3", "-inf", "nan", "", "-", "0")
    rows = [*((text, "1") for text in texts), *((number, number) for number in numbers)]
    read_back = list(csv.reader(io.StringIO(Table("t", ("=a", "b"), tuple(rows)).csv, newline="")))
    assert read_back[0] == ["'=a", "b"]
    for (text, _), (cell, _) in zip(rows, read_back[1:], strict=True):
        assert cell.removeprefix("'") == escapes.visible(text).removeprefix("'")
        if text in numbers:
            assert cell == text
        elif cell not in numbers:
            assert not re.match(r"[\s]*[=+\-@]|[\t\r\n]", cell) or re.fullmatch(r"[+-]?[\d.]+", cell), text


def test_latex_shows_every_text_and_obeys_none():
    back = {shown: char for char, shown in escapes.LATEX.items()}
    known = re.compile("|".join(map(re.escape, sorted(back, key=len, reverse=True))))
    for text in hostile():
        made = escapes.latex(text)
        left = known.sub("", made)
        assert not set(left) & set("\\{}$&#^_~%[]*\n\r"), text
        assert known.sub(lambda found: back[found[0]], made) == escapes.on_one_line(text)


# --- whole pages -------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page with the names of their attributes, its ids, and the text of its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[tuple[str, str]] = set()
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id"]
        self.hrefs += [value for name, value in attrs if name in ("href", "xlink:href", "src")]


def page_of(texts: list[str]) -> Report:
    """A page that holds each text in every place there is."""
    sections = tuple(
        Section(
            text,
            (text,),
            (Table(text, (text, text), ((text, text), ("x", text)), text),),
            (),
            (Example(text, text, text, True, (Span(text, True), Span(text, False)), False),),
            ((text, text),),
            level=2 + number % 2,
            folded=number % 3 == 0,
        )
        for number, text in enumerate(texts)
    )
    return Report(texts[0], tuple(texts[:5]), texts[1], sections, tuple(("n", text) for text in texts))


def test_a_page_has_the_same_elements_whatever_its_texts_say():
    texts = hostile()
    plain, odd = (Tags(write._render("report.html.j2", page_of(each))) for each in (["a word"] * len(texts), texts))
    assert odd.tags == plain.tags
    assert odd.attributes <= plain.attributes | {("td", "class"), ("th", "class")}
    assert len(set(odd.ids)) == len(odd.ids) > len(texts)
    assert all(href.startswith("#") for href in odd.hrefs)
    assert not CONTROL.search(write._render("report.html.j2", page_of(texts)))


def test_a_page_in_markdown_has_the_same_blocks_whatever_its_texts_say():
    texts = [text for text in hostile() if shown(text)]  # of an empty paragraph nothing is left
    plain, odd = (MARKDOWN.parse(write.markdown(page_of(each))) for each in (["a word"] * len(texts), texts))
    assert [token.type for token in odd] == [token.type for token in plain]
    used = {child.type for token in odd for child in token.children or ()}
    assert used <= {"text", "text_special", "strong_open", "strong_close"}


def spoilt(value, text: str, kept: tuple[str, ...] = ()):
    """A record, or a part of one, with `text` for every string, its keys included, but in the fields that are kept."""
    if isinstance(value, str):
        return text
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: spoilt(one, text, kept) for name, one in named.items() if name not in kept})
    if isinstance(value, dict):
        return {name: one if name in kept else spoilt(one, text, kept) for name, one in value.items()}
    return type(value)(spoilt(one, text, kept) for one in value) if isinstance(value, list | tuple) else value


EVERYWHERE = "=1 <script>a</script> [/x] ../../y `z` $\\frac$ \x1b[31m\u202e\ud800 \\w | *b* [c](d) \"e' &amp; \n# f"
# By these a page tells strategies, budgets and clocks apart, and finds a record; another test spoils them, too.
TOLD_APART = ("id", "strategy", "scope", "budget", "counters", "control", "timeline", "prompt_sha256")


@pytest.mark.parametrize("kept", [TOLD_APART, ("id", "counters", "control", "timeline", "prompt_sha256")])
def test_a_run_with_foreign_text_in_every_field_gives_a_page_that_obeys_none_of_it(tmp_path, kept):
    run = tmp_path / "outer" / "run"
    report_runs.write(Rule(tasks=("one",)), run)
    found = read(run)
    for room in ("records", "controls", "synthetic", "references"):
        found = replace(found, **{room: tuple(spoilt(record, EVERYWHERE, kept) for record in getattr(found, room))})
    found = replace(found, preset=EVERYWHERE, absent=((EVERYWHERE, EVERYWHERE),), logs=((EVERYWHERE, EVERYWHERE),))
    report = content.build(found)
    paths = write.write(report, found, run)
    assert all(path.resolve().is_relative_to(run) for path in paths)
    assert {path.name for path in tmp_path.rglob("*")} >= {path.name for path in paths}
    assert [path.name for path in (tmp_path / "outer").iterdir()] == ["run"]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    assert not any(CONTROL.search(text) for text in texts.values())
    page = Tags(texts[run / "report.html"])
    assert page.tags.count("script") == 1
    assert page.tags.count("svg") == len(report.figures)
    assert not any(name.startswith("on") for _, name in page.attributes)
    ours = {address for _, address in report.first.links}
    assert all(href in ours or href.startswith(("#", "data:text/csv;")) for href in page.hrefs)
    assert len(set(page.ids)) == len(page.ids)
    inline = [child for token in MARKDOWN.parse(texts[run / "report.md"]) for child in token.children or ()]
    assert {child.type for child in inline} <= {
        *("text", "text_special", "strong_open", "strong_close"),
        *("image", "link_open", "link_close"),  # of figures
    }
    assert sum(child.type == "image" for child in inline) == len(report.figures)
    for path, text in texts.items():
        if path.suffix == ".csv":
            cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
            assert not any(re.match(r"[=@]|[+-](?![\d.])", cell) for cell in cells if cell != "-"), path
        if path.suffix == ".svg":
            assert not list(ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}script"))
    assert "\\frac$" not in texts[run / "tables.tex"]


def test_a_figure_takes_a_name_as_text_and_prefixes_ids_in_its_tags_alone():
    label = '$\\frac$ id="a url(#b href="#c #010203'
    drawn = curves(r"hits-\w/\g<0>", "c", {label: [(0.0, 1.0), (1.0, 2.0)]}, "x", "y")
    assert re.fullmatch(r"hits-w-g-0--[0-9a-f]{16}", drawn.name)
    texts = [one.text for one in ElementTree.fromstring(drawn.svg).iter("{http://www.w3.org/2000/svg}text")]
    assert label in texts
    assert all(one.startswith(drawn.name) for one in re.findall(r'\bid="([^"]+)', re.sub(r">[^<]*<", "><", drawn.svg)))


def test_a_link_in_a_run_folder_is_replaced_and_not_followed(tmp_path):
    run = report_runs.write(Rule(), tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("kept")
    (run / "report.md").symlink_to(outside / "precious.txt")
    (run / "figures").symlink_to(outside)
    found = read(run)
    write.write(content.build(found), found, run)
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("precious.txt", "kept")]
    assert not (run / "report.md").is_symlink()


# --- consoles ----------------------------------------------------------------------------------------


def terminal(monkeypatch) -> io.StringIO:
    """Make standard output a stream that says it is a terminal with colours, and return it."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100000")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


OWN = re.compile(r"\x1b\[[\d;]*[mKA]|\x1b\[\?25[lh]|\r")  # colours and the bar's own movements


@pytest.mark.parametrize("make", [show.console, reports_console.console])
def test_a_console_prints_every_text_and_obeys_none(monkeypatch, make):
    from rich.table import Table as Grid

    screen = terminal(monkeypatch)
    texts = hostile()
    out = make()
    for text in texts:
        out.print(text)
        out.print(Text.assemble(("failed", "red"), f" {text}"))
    grid = Grid(texts[3], title=texts[5])
    for text in texts:
        grid.add_row(text)
    out.print(grid)
    columns = TextColumn("{task.description}", markup=False)
    with Progress(columns, console=out) as bar:
        bar.add_task("turns")
        for text in texts:
            bar.console.print(text)
    said = OWN.sub("", screen.getvalue())
    assert not CONTROL.search(said)
    plain = " ".join(said.split())
    assert all(
        shown(text.replace("\t", " ").translate({8: None, 7: None, 11: None, 12: None, 13: None})) in plain
        for text in texts
        if "\t" not in text and not set(text) & set("\x07\x08\v\f\r")
    )


def test_what_a_model_writes_is_obeyed_by_no_terminal_and_kept_in_a_file(monkeypatch):
    screen = terminal(monkeypatch)

    class Streamer:
        def on_finalized_text(self, text, stream_end=False):
            print(text, end="")

    made = session.shown_on_terminal(Streamer)()
    made.on_finalized_text("a\x1b[31mb\n")
    screen.isatty = lambda: False
    made.on_finalized_text("a\x1b[31mb\n")
    assert screen.getvalue() == "a\\x1b[31mb\na\x1b[31mb\n"


def test_an_error_is_one_line(capsys):
    for text in ("a\nb", "a\x1b]0;t\x07\r\nb", "\ud800"):
        for error in (show.error, reports_console.error):
            error(ValueError(text))
            said = capsys.readouterr().err
            assert said.startswith("error: ")
            assert said.count("\n") == 1
            assert not CONTROL.search(said)


def test_torchs_own_message_comes_whole_to_console_failure_and_page(tmp_path):
    """It begins with brackets, as markup does: [enforce fail at alloc_cpu.cpp:117]."""
    run, stream = RunFolder(tmp_path), io.StringIO()
    done = attempt("one", "a [/x] cell", lambda: torch.empty(2**60, dtype=torch.uint8))
    assert "[enforce fail at alloc_cpu.cpp:" in done.error
    assert "tried to allocate" in done.error
    console = Console(file=stream, markup=False, soft_wrap=True, highlight=False)
    _show(done, Job({}, {"one": done.label}, run.log("a")), run, console)
    assert f"a [/x] cell: {done.error}" in stream.getvalue()
    assert read_json(run.failure("one"))["error"] == done.error
    failed = replace(report_runs.results(Rule()), absent=((done.label, f"FAILED: {done.error}"),))
    page = content.build(failed)
    text = " ".join(done.error.split())
    assert text in "".join(MARKDOWN_TEXT(write.markdown(page)))


def MARKDOWN_TEXT(page: str) -> list[str]:
    return [words(token) for token in MARKDOWN.parse(page) if token.type == "inline"]


# --- names that are refused --------------------------------------------------------------------------


def test_a_name_is_printable_or_refused_in_one_sentence():
    for name in [*hostile(), "", " ", "x" * 101, 3, None, ["a"]]:
        if isinstance(name, str) and name.isprintable() and name.strip() and len(name) <= LONGEST_NAME:
            check_name("A model", name)
        else:
            with pytest.raises(Refused) as refused:
                check_name("A model", name)
            assert str(refused.value).isprintable()
            assert len(str(refused.value)) < 250


@pytest.mark.parametrize("name", ["...toml", "..toml", "a\nb.toml", "\x1b[2J.toml", "x" * 101 + ".toml"])
def test_a_preset_that_cannot_name_a_folder_is_refused(tmp_path, name):
    from tiny_run import PRESET

    (tmp_path / name).write_text(PRESET)
    with pytest.raises(Refused, match="A preset cannot be called"):
        read_preset(str(tmp_path / name))


@pytest.mark.parametrize("name", ['""', '"a\\nb"', '"\\u202e"', '"\\u001b"', "3", f'"{"x" * 101}"'])
def test_a_model_that_cannot_be_printed_is_refused(tmp_path, name):
    from tiny_run import PRESET

    (tmp_path / "odd.toml").write_text(PRESET.replace('name = "olmoe-tiny"', f"name = {name}"))
    with pytest.raises(Refused, match=r"A model cannot be called|models\[0\]\.name must be text, not 3"):
        read_preset(str(tmp_path / "odd.toml"))


@pytest.mark.parametrize("name", ["org/model", "[/x]", r"\w", "模型", "=cmd()"])
def test_an_odd_name_is_a_name(tmp_path: Path, name):
    from tiny_run import PRESET

    (tmp_path / "odd.toml").write_text(PRESET.replace('name = "olmoe-tiny"', f"name = '{name}'"), encoding="utf-8")
    preset = read_preset(str(tmp_path / "odd.toml"))
    assert preset.cells[0].model.name == name
    assert preset.only(name) == preset
