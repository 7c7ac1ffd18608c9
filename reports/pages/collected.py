"""The page of several machines' results: like runs side by side, a column a machine, and nothing pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_uppercase

from reports.data import groups
from reports.data.compare import accuracy, count, share, speedup
from reports.data.results import Results
from reports.elements.numbers import percent, points, ratio
from reports.elements.page import Report, Section, Table
from reports.pages.submitted import Submitted, alike, unlike
from reports.tables import synthetic

Cells = dict[tuple[str, ...], str]  # a value by the words of its row
HOW = (
    "Each archive was checked before it was counted: names, sizes and hashes of its files, the manifest of its run, "
    "and each record by what it says itself. What agrees everywhere and was made up is not found that way; only "
    "running the suite again finds it. Every number was computed here, from the records, and is one machine's: nothing "
    "is averaged over machines."
)
APART = (
    "Runs stand in one table only if preset, code, scope and cells are the same. Some of these are unlike, and no "
    "number of one group may be set beside one of another."
)
TWICE = "Counted once, since another archive holds the same records"
MEASURED = "Measured on the wall clock of each machine: differences between columns are differences of machines."
PROJECTED = (
    "Projected on a virtual clock, which is alike on every machine: columns differ only where processors round a "
    "model's arithmetic otherwise."
)


def report(submitted: Sequence[Submitted], twice: Sequence[str] = ()) -> Report:
    """Return the page. `twice` are archives that hold a run of another one, and are not counted again."""
    names = dict(zip((each.sha256 for each in submitted), _letters(len(submitted)), strict=True))
    found = alike(list(submitted))
    said = (*((APART,) if len(found) > 1 else ()), *((f"{TWICE}: {', '.join(twice)}.",) if twice else ()))
    about = (_submissions(submitted, names), _apart(found, names), _missing(submitted, names))
    sections = [Section("Submissions", said, tuple(table for table in about if table.rows))]
    for number, group in enumerate(found, 1):
        heading = f"Group {number}: {group[0].results.preset}, {_named(group, names)}"
        tables = tuple(
            table
            for table in (
                _side_by_side(
                    "Speedups of MoBiLE, computed on the virtual clock or timed live", group, names, _speedups
                ),
                _side_by_side("Speedups of MoBiLE over a link, real sizes, synthetic weights", group, names, _scripted),
                _side_by_side("MoBiLE's accuracy less full K's on the same items, points", group, names, _losses),
                _side_by_side("Tokens that fell back", group, names, _fallbacks),
            )
            if table.rows
        )
        nothing = () if tables else ("These runs hold no MoBiLE cell beside a baseline.",)
        sections.append(Section(heading, (*_clocks(group), *nothing), tables))
    return Report(
        title="MoBiLE on several machines",
        opening=(f"Runs: {len(submitted)}, in groups of like ones: {len(found)}. {HOW}",),
        alarm=None,
        sections=tuple(sections),
        facts=(
            ("archives", ", ".join(f"{names[each.sha256]}: {each.archive}" for each in submitted)),
            ("command", "python -m reports collect ARCHIVE ... --out FOLDER"),
        ),
    )


def _letters(number: int) -> list[str]:
    """Return A, B, ..., Z, A2, B2, ..."""
    rounds = range(1, 2 + number // len(ascii_uppercase))
    return [f"{letter}{'' if again == 1 else again}" for again in rounds for letter in ascii_uppercase][:number]


def _apart(found: Sequence[Sequence[Submitted]], names: dict[str, str]) -> Table:
    """Return in what the runs of each further group differ from the first one's."""
    first = found[0][0]
    rows = tuple((_named(group, names), "; ".join(unlike(first, group[0]))) for group in found[1:])
    return Table("Apart", ("", f"differs from {names[first.sha256]} by"), rows)


def _named(group: Sequence[Submitted], names: dict[str, str]) -> str:
    return " and ".join(names[each.sha256] for each in group)


def _submissions(submitted: Sequence[Submitted], names: dict[str, str]) -> Table:
    """Return a column an archive: whose it is, on what, and how it stands to what is here."""
    first_by_machine: dict[tuple[str, ...], str] = {}
    columns = []
    for each in submitted:
        name, environment = names[each.sha256], each.results.all_records[0].environment
        before = first_by_machine.setdefault(each.identities, name)
        columns.append(
            {
                "sent by": each.by or "-",
                "machine": "; ".join(each.machines) + ("" if before == name else f" (one like that of {before})"),
                "system": str(environment.get("platform") or "-"),
                "packages": ", ".join(
                    f"{k} {environment['packages'].get(k) or '-'}" for k in ("torch", "transformers")
                ),
                "scope, weights": "; ".join(each.scopes),
                "preset": each.results.preset,
                "cells": str(len(each.results.all_records)),
                "code": f"{each.code[:12]} ({'as' if each.same_code else 'not as'} here)",
                "commit": (environment["git_commit"] or "-")[:12]
                + (" with changes" if environment["git_dirty"] else ""),
                "records": each.sha256[:12],
                "held to what is expected here": each.gate,
                "lines of the checklist missing": str(len(each.missing)),
                "archive": each.archive,
            }
        )
    rows = tuple((fact, *(column[fact] for column in columns)) for fact in columns[0])
    note = "Code, commit and records are the beginnings of hashes. A machine is what its records say of it."
    return Table("Who ran what", ("", *(names[each.sha256] for each in submitted)), rows, note)


def _missing(submitted: Sequence[Submitted], names: dict[str, str]) -> Table:
    """Return one row for each line of the checklist that a sender found missing."""
    rows = tuple((names[each.sha256], *line.partition(": ")[::2]) for each in submitted for line in each.missing)
    return Table("Lines of the checklist that a sender found missing", ("", "line", "why"), rows)


def _clocks(group: Sequence[Submitted]) -> tuple[str, ...]:
    scopes = {record.scope for each in group for record in each.results.all_records}
    return (*((PROJECTED,) if "cpu+virtual" in scopes else ()), *((MEASURED,) if scopes != {"cpu+virtual"} else ()))


def _side_by_side(
    caption: str,
    group: Sequence[Submitted],
    names: dict[str, str],
    values: Callable[[Results], tuple[tuple[str, ...], Cells]],
) -> Table:
    """Return a table with a column a machine; a value that a machine lacks is a dash."""
    columns = [values(each.results) for each in group]
    head = next((words for words, cells in columns if cells), ())
    keys = dict.fromkeys(key for _, cells in columns for key in cells)
    rows = tuple((*key, *(cells.get(key, "-") for _, cells in columns)) for key in keys)
    return Table(caption, (*head, *(names[each.sha256] for each in group)), rows)


def _speedups(results: Results) -> tuple[tuple[str, ...], Cells]:
    found: Cells = {}
    for model in results.models:
        for budget in results.budgets(model):
            mobile = groups.mobile(results, model, budget)
            for base, group in groups.baselines(results, budget, model).items():
                if mobile and (measured := speedup(mobile, group)):
                    fits = " (holds all of it)" if groups.holds_all(mobile) else ""
                    found[model, mobile[0].scope, f"{budget}{fits}", base] = ratio(measured)
    return ("model", "scope", "budget", "over"), found


def _scripted(results: Results) -> tuple[tuple[str, ...], Cells]:
    found: Cells = {}
    for record in synthetic.on_recorded_routing(results.synthetic):
        others = [other for other in results.synthetic if other.model == record.model]
        for base in groups.BASELINES if record.strategy == "mobile" else ():
            if measured := synthetic.speedup_over(others, record, base):
                found[record.model, record.scope, synthetic.link_title(record), record.budget, base] = ratio(measured)
    return ("geometry", "scope", "link", "budget", "over"), found


def _losses(results: Results) -> tuple[tuple[str, ...], Cells]:
    """Return MoBiLE's loss of each model, all tasks together and then task by task."""
    found: Cells = {}
    for model in results.models:
        reference, mobile = groups.full_k(results, model), _own_answers(results, model)
        if not reference or not mobile:
            continue
        by_task = {record.task: accuracy([record], reference) for record in mobile}
        found[model, "all tasks", str(count(mobile))] = points(accuracy(mobile, reference).difference)
        for task, loss in by_task.items():
            if loss.items:
                found[model, task, str(loss.items)] = points(loss.difference)
    return ("model", "task", "n"), found


def _fallbacks(results: Results) -> tuple[tuple[str, ...], Cells]:
    found: Cells = {}
    for model in results.models:
        if mobile := _own_answers(results, model):
            found[model, f"{mobile[0].gamma:g}"] = percent(share(mobile, "fallbacks", "tokens"))
    return ("model", "gamma"), found


def _own_answers(results: Results, model: str) -> groups.Group:
    """Return MoBiLE's cells on the most items, whatever their budget: its answers do not depend on memory."""
    every = [groups.mobile(results, model, budget) for budget in results.budgets(model)]
    return max(every, key=count, default=[])
