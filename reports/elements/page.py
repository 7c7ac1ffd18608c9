"""The parts of a page: tables, figures, examples and sections, independent of any output format."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from urllib.parse import quote

from reports.elements.escapes import csv_cell


@dataclass(frozen=True)
class Table:
    """A caption, column heads and rows, all of them text; `note` stands below."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def text_columns(self) -> tuple[bool, ...]:
        """Return, by column, whether it holds words rather than numbers and is aligned left."""
        return tuple(any(row[i][:1].isalpha() for row in self.rows) for i in range(len(self.head)))

    @property
    def grouped(self) -> bool:
        """Return whether several rows share a first cell, so that they belong together."""
        return len({row[0] for row in self.rows}) < len(self.rows)

    @property
    def csv(self) -> str:
        """Return the table as comma-separated values, heads first."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(map(csv_cell, row) for row in (self.head, *self.rows))
        return out.getvalue()


@dataclass(frozen=True)
class Figure:
    """An SVG picture and the numbers it was drawn from. `name` is a file's, as `slug` makes it."""

    name: str
    caption: str
    svg: str
    data: Table

    @property
    def link(self) -> str:
        """Return the numbers as a data: link, so that the page needs no other file."""
        return f"data:text/csv;charset=utf-8,{quote(self.data.csv, safe='/,()+:;=')}"


@dataclass(frozen=True)
class Span:
    """A span of an answer; `fell_back` where the big pass wrote it."""

    text: str
    fell_back: bool


@dataclass(frozen=True)
class Example:
    """One item on which two runs disagree: the prompt, what each wrote, and which of them was right."""

    title: str
    prompt: str
    full_k: str
    full_k_right: bool
    mobile: tuple[Span, ...]
    mobile_right: bool


@dataclass(frozen=True)
class Section:
    """A heading and its content; `level` 2 is a chapter, 3 a part of one, which may be folded."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    examples: tuple[Example, ...] = ()
    logs: tuple[tuple[str, str], ...] = ()  # label, end of the log
    level: int = 2
    folded: bool = False
    words: tuple[tuple[str, str], ...] = ()  # that first stand here, each with a few words on it

    @property
    def empty(self) -> bool:
        """Return whether nothing stands below the heading."""
        return not (self.paragraphs or any(t.rows for t in self.tables) or self.figures or self.examples)

    @property
    def anchor(self) -> str:
        """Return the heading as an HTML id; `Report.anchored` tells equal ones apart."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.heading.lower()).split())


@dataclass(frozen=True)
class Tile:
    """A few numbers under one name; each line is a number and what it is of."""

    name: str
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FirstScreen:
    """The part of a page that answers in thirty seconds: one sentence, tiles, and where it all comes from.

    `made` says when and on which machine, `links` are (text, address) of our own, `command` repeats the run.
    """

    verdict: str
    tiles: tuple[Tile, ...]
    made: str
    links: tuple[tuple[str, str], ...]
    command: str


@dataclass(frozen=True)
class Report:
    """The whole page; `alarm` is set when nothing below it can be trusted."""

    title: str
    opening: tuple[str, ...]
    alarm: str | None
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...]
    first: FirstScreen | None = None
    words: tuple[tuple[str, str], ...] = ()  # of the first screen and the opening

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Return the figures of all sections."""
        return tuple(figure for section in self.sections for figure in section.figures)

    @property
    def anchored(self) -> tuple[tuple[str, Section], ...]:
        """Return every section with an HTML id that no other has."""
        found: dict[str, Section] = {}
        for section in self.sections:
            anchor, number = section.anchor, 2
            while not anchor or anchor == "repeat" or anchor in found:  # "repeat" is the page's own
                anchor, number = f"{section.anchor}-{number}", number + 1
            found[anchor] = section
        return tuple(found.items())
