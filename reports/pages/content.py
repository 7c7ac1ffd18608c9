"""The report's content, built once for every output format: overview, a chapter a family, controls, provenance."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from reports.data.results import Results
from reports.elements.page import Report, Section, Table
from reports.plots import forest, summary
from reports.sections import accuracy, clock, controls, past_paper, references, sentences, signals, synthetic, verdicts
from reports.sections.family_sections import family_sections
from reports.sections.first_screen import first_screen
from reports.sections.words import with_words
from reports.tables import overview, own, rivals, scores, telemetry
from reports.verdict import machine_identity

ALARMS = 5  # that the first line names
PAPER = Path(__file__).parents[1] / "paper.toml"


def build(results: Results) -> Report:
    """Build the report of a run."""
    paper = tomllib.loads(PAPER.read_text(encoding="utf-8"))
    broken = controls.broken(results)
    sections = [
        *(_overview(results, paper, trusted=not broken) if results.records else ()),
        *accuracy.sections(results),
        *accuracy.cited(results),
        *(section for model in results.models for section in family_sections(results, model, paper)),
        *past_paper.sections(results, paper["accuracy"]["margin_points"]),
        *synthetic.sections(results, paper, trusted=not broken),
        *clock.sections(results),
        *references.sections(results),
        *signals.sections(results),
        *_by_seed(results, paper["accuracy"]["margin_points"]),
        _controls(results),
        _telemetry(results),
        _absent(results),
        _provenance(paper),
        Section("Limits", (*sentences.limits(results), *(synthetic.LIMITS if results.synthetic else ()))),
    ]
    report = Report(
        title=f"How far does MoBiLE hold? ({results.preset})",
        opening=_opening(results, paper),
        alarm=_alarm(broken),
        sections=tuple(section for section in sections if not section.empty),
        facts=_facts(results),
        first=first_screen(results, paper, trusted=not broken),
    )
    return with_words(report)


def _opening(results: Results, paper: dict[str, Any]) -> tuple[str, str]:
    """Return two paragraphs: what MoBiLE is, and what this run found, whatever kinds of cells it has."""
    introduction, found = sentences.opening(results, paper)
    past = past_paper.opening(results, paper["accuracy"]["margin_points"])
    scripted = synthetic.opening(results) if results.synthetic else ""
    more = [each for each in (accuracy.opening(results), past, scripted) if each]
    if found == sentences.LACKS and more:
        return introduction, " ".join(more)
    return introduction, " ".join((found, *more))


def _alarm(broken: list[str]) -> str | None:
    """Return the first line of a page that cannot be trusted; None if no control is broken."""
    if not broken:
        return None
    more = f"; and {len(broken) - ALARMS} more under Controls" if len(broken) > ALARMS else ""
    return f"Nothing below can be trusted: {'; '.join(broken[:ALARMS])}{more}."


def _overview(results: Results, paper: dict[str, Any], trusted: bool) -> list[Section]:
    margin = paper["accuracy"]["margin_points"]
    figures = (summary.of_run(results, paper), forest.speedups(results, paper))
    beside = rivals.beside_lossless(results)
    return [
        Section(
            "Overview",
            (
                f"The margin was fixed before the run: a loss is negligible if the whole 95 % interval of the paired "
                f'difference to full K lies above -{margin:g} point. "Not shown" means that it reaches below. No '
                "speed stands here without its accuracy.",
                *((rivals.in_words(beside.rows),) if beside.rows else ()),
            ),
            (overview.families(results, margin), own.families(results, margin), beside),
            tuple(figure for figure in figures if figure),
        ),
        verdicts.section("Verdicts", overview.verdicts(results, paper, trusted)),
        Section(
            "What so many questions can show", (), (overview.power_of_items(results, margin),), level=3, folded=True
        ),
    ]


def _by_seed(results: Results, margin_points: float) -> list[Section]:
    families = [models for models in results.families.values() if len(models) > 1]
    tables = tuple(scores.by_seed(results, models, margin_points) for models in families)
    text = "The same recipe trained from other seeds: how much of a result is the luck of one training."
    return [Section("Seeds", (text,), tables)] if any(table.rows for table in tables) else []


def _controls(results: Results) -> Section:
    text = (
        "Each live run begins its first item again, alone, at batch 1: under its own strategy, or for full K under "
        "some of those that it stands for, so that each of them is tried with every model on one of its tasks. The "
        "tokens must equal the batch's, and every counter of the live ledger, times included, the replayed one's. "
        "Offloaded full K must equal the resident model, token for token."
    )
    if not results.records:
        text = synthetic.CHECKS
    tables = tuple(table for table in (controls.canary_table(results), controls.checks(results)) if table.rows)
    nothing = (
        ()
        if results.controls or not results.records
        else ("This run has no canary cell: that a scrambled router fails is not shown.",)
    )
    return Section("Controls", (text, *nothing), tables)


def _telemetry(results: Results) -> Section:
    table = telemetry.by_strategy(results)
    text = (
        "Sampled while the cells ran. The card's own count of what came over the link is held against the ledger's: it "
        "looks at 20 ms at a time, so it is a check of the order, not of the byte."
    )
    return Section("What the card did", (text,) if table.rows else (), (table,))


def _absent(results: Results) -> Section:
    found = {
        "Cells without a record": results.absent,
        "Cells that ask for more than this machine has, and were left out": results.left_out,
    }
    tables = tuple(Table(title, ("cell", "why"), rows) for title, rows in found.items() if rows)
    return Section("Failed and missing cells", () if tables else ("None.",), tables, logs=_logs(results))


def _logs(results: Results) -> tuple[tuple[str, str], ...]:
    """Return (cells, end of their log) of failed cells, each text once."""
    cells: dict[str, list[str]] = {}
    for label, tail in results.logs:
        cells.setdefault(tail, []).append(label)
    return tuple(
        (labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more", tail)
        for tail, labels in cells.items()
    )


def _provenance(paper: dict[str, Any]) -> Section:
    known = paper["known"]
    return Section(
        "Whose is what",
        tuple(
            f"{who}: {'; '.join(known[key])}."
            for who, key in (
                (f"The paper's ({paper['citation']})", "paper"),
                ("Reported second-hand", "secondary"),
                ("Ours", "ours"),
                ("Unknown to us", "unknown"),
            )
        ),
    )


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    """Return the (name, value) facts that a reader needs to repeat the run; none changes when it is repeated."""
    record = results.all_records[0]
    packages = record.environment["packages"]
    made = (*results.scored, *results.scripted, *results.references, *results.signals, *results.accuracy)
    machines = {machine_identity(r) for r in made}
    dirty = any(r.environment["git_dirty"] for r in made)
    commits = dict.fromkeys(str(r.environment["git_commit"]) for r in made)
    left_out = f", {len(results.left_out)} left out" if results.left_out else ""
    return (
        ("preset", results.preset),
        ("cells", f"{len(made)} recorded, {len(results.absent)} without a record{left_out}"),
        ("scope", "; ".join(dict.fromkeys(f"{r.scope}, weights {r.weights}" for r in made))),
        ("code", f"{', '.join(commits)}{' (with changes not committed)' if dirty else ''}"),
        (
            "machine",
            f"{record.environment['cpu']}, {record.environment['cores']} cores, GPU {record.environment['gpu']}"
            if len(machines) == 1
            else f"{len(machines)} unlike machines",
        ),
        ("packages", ", ".join(f"{name} {number}" for name, number in packages.items() if number)),
        *((("time and bandwidth", "; ".join(sources)),) if (sources := record.config["profile_sources"]) else ()),
    )
