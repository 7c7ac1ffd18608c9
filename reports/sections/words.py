"""The words of a page, each with a few words on it where it first stands.

A word counts as standing where its pattern is found in a sentence, a caption or a table of the section.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from reports.elements.page import FirstScreen, Report, Section, Table

GLOSSES: tuple[tuple[str, str, str], ...] = (  # word, pattern, gloss
    ("expert", r"experts?", "one of a layer's many small networks, of which a router chooses K for each token"),
    ("on-demand", r"on-demand(?!-overlap)", "plain offloading: each chosen expert is copied, then computed, in turn"),
    (
        "on-demand-overlap",
        r"on-demand-overlap|overlapped plain",
        "plain offloading that computes one expert while it copies the next",
    ),
    ("projected", r"project(?:ed|ion)", "counted loads and computes, timed by a cost model on a virtual clock"),
    ("virtual clock", r"virtual clock", "a simulation of link and GPU, in whole nanoseconds"),
    ("slot", r"slots?", "a place for one expert in the fast memory"),
    ("lossless", r"lossless", "gives the answers of the model with all K experts, token for token"),
    ("full K", r"full K", "every token runs with all K experts that its router chose, the reference"),
    ("static K/2", r"static(?: K/2|-half)", "every token runs with half of them, never with all"),
    ("points", r"points", "percentage points of questions answered rightly"),
    (
        "paired difference",
        r"paired|less full K|difference to full K",
        "between two runs on the same questions: gained less lost, over all",
    ),
    ("gamma", r"gamma", "the confidence below which MoBiLE runs a token again with all K experts"),
    ("fallback", r"fallbacks?|f[ae]lls? back", "a token that MoBiLE ran again with all K experts"),
    ("lru", r"lru", "keeps the experts that were used last, which changes no answer"),
    ("lfu", r"lfu", "keeps the experts that are used most often, which changes no answer"),
    ("cpu-hybrid", r"cpu-hybrid", "computes some absent experts on the processor instead of copying them"),
    ("MoE layer", r"MoE layers?", "a layer with experts"),
    ("geometry", r"geometr(?:y|ies)", "the sizes and numbers of layers and experts of a real model"),
    (
        "rows",
        r"rows as they are|packed rows|int[48]|row formats?",
        "the weights of an expert as they are stored: as they are, or packed into int8 or int4",
    ),
    ("hits", r"hits?", "experts that were in a slot already when they were needed"),
    ("TPOT", r"TPOT", "time per output token, decode only"),
    ("TTFT", r"TTFT", "time to first token: prefill"),
    ("canary", r"canar(?:y|ies)", "a cell with a scrambled router, whose accuracy must collapse"),
    ("belady", r"belady|oracle-prefetch", "limits that know the future, which no system does"),
    ("recall", r"recall", "the share of the needed experts that was foreseen"),
)
PATTERNS = tuple(
    (word, re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE), gloss) for word, pattern, gloss in GLOSSES
)


def with_words(report: Report) -> Report:
    """Return the report with each word explained in the part where it first stands: the opening, or a section."""
    left = list(PATTERNS)

    def new(texts: Iterator[str]) -> tuple[tuple[str, str], ...]:
        text = "\n".join(texts)
        found = [each for each in left if each[1].search(text)]
        for each in found:
            left.remove(each)
        return tuple((word, gloss) for word, _, gloss in found)

    opening = new(_opening(report))
    sections = tuple(replace(section, words=new(_texts(section))) for section in report.sections)
    return replace(report, words=opening, sections=sections)


def _opening(report: Report) -> Iterator[str]:
    yield from _first(report.first) if report.first else ()
    yield from report.opening


def _first(first: FirstScreen) -> Iterator[str]:
    yield first.verdict
    for tile in first.tiles:
        yield tile.name
        for line in tile.lines:
            yield from line


def _texts(section: Section) -> Iterator[str]:
    yield section.heading
    yield from section.paragraphs
    for table in section.tables:
        yield from _cells(table)
    for figure in section.figures:
        yield figure.caption


def _cells(table: Table) -> Iterator[str]:
    yield table.caption
    yield from table.head
    yield table.note
    for row in table.rows:
        yield from row
