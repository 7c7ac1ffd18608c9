"""Number tables of the READMEs, and their figure, made from the committed reports of presets: cpu, past and accuracy.

A table stands between `<!-- NAME: python -m reports readme -->` and `<!-- /NAME -->`. Nobody copies a number by hand:
the command rewrites what stands between, and a test fails where it would change something.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from reports.checks.expected import FOLDER, NoExpectation, folder_of
from reports.data.markdown_tables import columns, interval, read_tables
from reports.elements.page import Figure, Table
from reports.pages.content import PAPER
from reports.plots.summary import Line, speed_and_accuracy
from reports.tables.scores import ALIKE, FEWER, SUMMED

ROOT = Path(__file__).parents[2]
SOURCE, PAST = FOLDER / "cpu" / "report.md", FOLDER / "past" / "report.md"
ACCURACY = folder_of("accuracy") / "report.md"
FIGURES = FOLDER / "cpu"
INKS = {"light": "#1f2328", "dark": "#e6edf3"}  # text on GitHub's pages
GLANCE, SEEDS = ("Overview", "The families at a glance"), ("Seeds", "Trainings of one family")
SMALLEST, CARD = ("Decode speed, the fewest slots each strategy needs", "Decode speed, a card of 8GiB")
OVER = "over on-demand-overlap"
ON_DISK = ("olmoe-1b-7b, synthetic: speed", "Decode speed, link as it is")
CLOCK = ("Virtual clock against wall clock", "The virtual clock's error of TPOT")
PEERS = ("Beside what a user would run instead from a disk", "From the same disk")
RIVALS = ("Overview", "MoBiLE beside the fastest that loses nothing")
LOSS = ("Is the loss negligible?", "The verdict on negligible loss")
FASTEST = ("Past the paper", "The fastest of each kind")
MEASURED_ON = "olmoe-tiny"  # the model that every strategy runs on
CAPTION = (
    "Decode speed over on-demand-overlap and accuracy less full K's, by family, with 95 % intervals, crosses the worst "
    "task; a projection, beside the published band and never judged by it."
)

Tables = Mapping[tuple[str, str], Table]


def texts() -> dict[Path, str]:
    """Return what each generated file should hold, by path. Raise NoExpectation if the report lacks a table."""
    try:
        # Of the runs of past and accuracy only their own chapters are quoted, whose headings no other page has.
        tables: dict[tuple[str, str], Table] = {}
        for page in (ACCURACY, PAST, SOURCE):
            tables |= read_tables(page.read_text(encoding="utf-8"))
        made = {path: _filled(path, tables) for path in dict.fromkeys(path for path, _ in BLOCKS)}
        figure = _figure(tables)
    except (OSError, KeyError, ValueError) as error:
        raise NoExpectation(
            f"{SOURCE}, {PAST} or {ACCURACY} lacks what the READMEs quote ({error!r}); keep runs of these first."
        ) from error
    return {ROOT / path: text for path, text in made.items()} | {
        FIGURES / f"summary-{theme}.svg": _standalone(figure, ink) for theme, ink in INKS.items()
    }


def stale() -> list[Path]:
    """Return the files that show other numbers than the report. Of a figure its numbers count, not how it is drawn."""
    return [
        path for path, text in texts().items() if not path.is_file() or _said(path.read_text("utf-8")) != _said(text)
    ]


def write() -> list[Path]:
    """Rewrite every file that is stale, and return these paths."""
    made = texts()
    changed = stale()
    for path in changed:
        path.write_text(made[path], encoding="utf-8")
    return changed


def _said(text: str) -> str:
    found = re.search(r"<desc>.*?</desc>", text, re.DOTALL)
    return found[0] if found else text


def _filled(path: str, tables: Tables) -> str:
    """Return a README with its tables in place. Raise ValueError where a pair of markers is missing."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for (place, name), block in BLOCKS.items():
        if place == path:
            pattern = rf"(<!-- {name}: [^>]* -->\n)(.*?)(<!-- /{name} -->)"
            found = re.search(pattern, text, re.DOTALL)
            if found is None:
                raise ValueError(f"no <!-- {name}: ... --> in {path}")
            text = text[: found.start(2)] + block(found[2], tables) + text[found.end(2) :]
    return text


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _quoted(key: tuple[str, str], *names: str) -> Callable[[str, Tables], str]:
    """Return what writes some columns of one table of the report, whatever stood there before."""
    return lambda _, tables: _markdown(names, columns(tables[key], *names))


def _whole(key: tuple[str, str]) -> Callable[[str, Tables], str]:
    """Return what writes one table of the report as it is, whatever stood there before."""
    return lambda _, tables: _markdown(tables[key].head, list(tables[key].rows))


def _measured_here(before: str, tables: Tables) -> str:
    """Return the table of approaches with its last column anew: speed at both budgets, and points where lossy.

    Rows and the other columns are written by hand. A strategy that the report lacks gets dashes.
    """
    speeds = [
        {_bare(name): over for name, over in columns(tables[f"{MEASURED_ON}: speed", caption], "strategy", OVER)}
        for caption in (SMALLEST, CARD)
    ]
    lost = _lost(tables)
    lines = before.splitlines(keepends=True)
    for place, line in enumerate(lines):
        if named := re.match(r"\| `([\w-]+)` \|", line):
            strategy = named[1]
            seen = " / ".join(over.get(strategy, "-").split(" ")[0] for over in speeds)
            seen += f", {lost[strategy]}" if strategy in lost else ""
            lines[place] = f"{line.rpartition('|')[0].rpartition('|')[0]}| {seen} |\n"
    return "".join(lines)


def _lost(tables: Tables) -> dict[str, str]:
    """Return the points that each lossy strategy loses, and those of its worst task, all over the same items."""
    page = f"{MEASURED_ON}: accuracy"
    table = tables.get((page, FEWER)) or tables[page, ALIKE]
    by_strategy: dict[str, list[tuple[float, str]]] = {}
    pooled: dict[str, str] = {}
    for task, name, points in columns(table, "task", "strategy", POINTS):
        found = interval(points)
        if found and task == SUMMED:
            pooled[_bare(name)] = f"{found.value:+.1f} points"
        elif found:
            by_strategy.setdefault(_bare(name), []).append((found.value, f"{task.split(' (')[0]} {found.value:+.1f}"))
    return {
        name: f"{points} ({min(by_strategy[name], key=lambda pair: pair[0])[1]})" if name in by_strategy else points
        for name, points in pooled.items()
    }


def _bare(name: str) -> str:
    """Return a strategy's name without its threshold."""
    return name.split(" (")[0]


def _figure(tables: Tables) -> Figure:
    lines = []
    for model, geometry, half, mobile, worst in columns(tables[GLANCE], "model", "timed as", *LESS, WORST):
        lost = {"static-half": interval(half), "mobile": interval(mobile)}
        worse = {"mobile": interval(worst.partition(" ")[2])}
        for name, over in columns(tables[f"{model}: speed", SMALLEST], "strategy", OVER):
            speedup = interval(over)
            if speedup and _bare(name) in ("lru", *lost):
                lines.append(Line(geometry, _bare(name), speedup, lost.get(_bare(name)), worse.get(_bare(name))))
    return speed_and_accuracy(lines, tomllib.loads(PAPER.read_text(encoding="utf-8")), CAPTION)


def _standalone(figure: Figure, ink: str) -> str:
    """Return the SVG in one text colour, with its caption and its numbers inside for readers that show no picture."""
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", figure.svg.replace("currentColor", ink), flags=re.DOTALL)
    words = f"<title>{escape(figure.caption)}</title><desc>{escape(figure.data.csv)}</desc>"
    text = svg.replace(">", f">{words}", 1)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


POINTS, WORST = "difference to full K", "worst task"
LESS = ("static K/2 less full K", "MoBiLE less full K")
BLOCKS: dict[tuple[str, str], Callable[[str, Tables], str]] = {
    ("README.md", "families"): _quoted(
        GLANCE,
        "model",
        "MoBiLE less full K",
        WORST,
        "static K/2 less full K",
        "MoBiLE less static K/2",
        "fallbacks",
        "over on-demand",
        OVER,
        "over lru",
        "over lru, same memory",
        "n",
    ),
    ("README.md", "loss"): _quoted(
        LOSS,
        "family",
        "within 1 point",
        "MoBiLE 0.7 less full K",
        WORST,
        "static K/2 less full K",
        "MoBiLE 0.7 less static K/2",
        "MoBiLE 0.7 less random fallback",
        "items",
    ),
    ("README.md", "disk"): _quoted(
        ON_DISK, "strategy", "TPOT ms", "over on-demand", OVER, "fallbacks", "MB/token", "hits", "slots"
    ),
    ("suites/README.md", "clock"): _whole(CLOCK),
    ("suites/README.md", "peers"): _quoted(PEERS, "what", "TPOT ms", "tokens/s", "MB/token", "routing", "memory"),
    ("baselines/README.md", "measured"): _measured_here,
    ("baselines/README.md", "speeds"): _quoted(
        (f"{MEASURED_ON}: speed", SMALLEST), "strategy", "tokens/s", OVER, "GB/token", "hits", "fallbacks", "slots"
    ),
    ("baselines/README.md", "rivals"): _quoted(
        RIVALS, "model", "memory", "fastest that answers as full K", "MoBiLE over it", "faster"
    ),
    ("suites/README.md", "past"): _quoted(
        FASTEST,
        "model",
        "memory",
        "MoBiLE",
        "fastest with full K's answers",
        "fastest that loses at most 1 point, rows as they are",
        "the same, any rows",
        "shown to be within 1 point",
        "fastest if all rows are int4 for everyone",
    ),
    ("suites/README.md", "past over the disk"): _quoted(
        ("Past the paper, measured over the disk", "Measured over the disk: the fastest"),
        "geometry",
        "MoE layers made",
        "memory",
        "MoBiLE",
        "fastest",
        "fastest that loses at most 1 point",
        "worst task of each",
    ),
    ("suites/README.md", "seeds"): _quoted(
        SEEDS,
        "model",
        "training seed",
        "MoBiLE less full K",
        WORST,
        "static K/2 less full K",
        "MoBiLE less static K/2",
        OVER,
        "fallbacks",
        "full K %",
        "n",
    ),
}
