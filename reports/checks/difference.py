"""Difference of two runs: the cells that changed, the kind of each change, and whether it matters."""

from __future__ import annotations

from dataclasses import dataclass

from reports.data.compare import seconds_per_token, speedup
from reports.data.fingerprint import VIRTUAL, changed_outputs, fingerprints, label
from reports.data.results import Results
from reports.elements.page import Table
from reports.verdict import machine, machine_identity
from suites.record import Record

NOISE = 0.02  # a wall time that moved by less is not told from noise


@dataclass(frozen=True)
class Difference:
    """The difference of two runs: of their environments, of their cells, and a line for each kind that matters."""

    surroundings: Table
    cells: Table
    matters: tuple[str, ...]


def difference(first: Results, second: Results) -> Difference:
    """Compare two runs cell by cell, paired by label: ids change with the code."""
    old, new = ({label(r): r for r in run.all_records} for run in (first, second))
    ones, others = fingerprints(first), fingerprints(second)
    rows, matters = [], []
    for cell in dict.fromkeys((*old, *new)):
        if cell not in old or cell not in new:
            rows.append((cell, "only in the second run" if cell in new else "only in the first run", "-", "-", "cells"))
            continue
        found = _compare_cells(old[cell], new[cell], ones[cell] == others[cell])
        if found:
            rows.append((cell, *found))
    kinds = {row[-1] for row in rows}
    meanings = {
        "cells": "the runs do not hold the same cells",
        "outputs": "texts changed: accuracies are of different answers, and counters need not agree",
        "counters": "the texts are the same and the work is not: a change of the engine, not of the model",
        "time": "the work is the same and the time is not",
    }
    matters = [
        f"{sum(row[-1] == kind for row in rows)} cells: {meaning}"
        for kind, meaning in meanings.items()
        if kind in kinds
    ]
    head = ("cell", "what changed", "speed, second over first", "texts changed", "kind")
    return Difference(_surroundings(first, second), Table("Cells that differ", head, tuple(rows)), tuple(matters))


def _compare_cells(old: Record, new: Record, same: bool) -> tuple[str, str, str, str] | None:
    """Return a cell's change as (description, ratio of times, changed texts, kind); None if it did not change."""
    changed, shared = changed_outputs(old, new)
    texts = f"{changed} of {shared}"
    if old.scope != new.scope:
        return f"scope {old.scope} became {new.scope}", "not compared", texts, "cells"
    if len(old.items) != len(new.items) or shared < len(old.items):
        return f"{len(old.items)} items became {len(new.items)}", _ratio(old, new), texts, "cells"
    if changed:
        return "texts", _ratio(old, new), texts, "outputs"
    moved = [
        f"{counter} {old.counters.get(counter)} to {new.counters.get(counter)}"
        for counter in sorted({*old.counters, *new.counters})
        if old.counters.get(counter) != new.counters.get(counter) and not counter.endswith("seconds")
    ]
    if moved:
        return "; ".join(moved[:4]), _ratio(old, new), texts, "counters"
    if old.scope == VIRTUAL:
        return None if same else ("virtual time", _ratio(old, new), texts, "time")
    ratio = speedup([new], [old]) if machine_identity(old) == machine_identity(new) else None
    if ratio is None or (ratio.low <= 1 + NOISE and ratio.high >= 1 - NOISE):
        return None
    return "wall time", _ratio(old, new), texts, "time"


def _ratio(old: Record, new: Record) -> str:
    """Write the ratio of times; none across unlike machines unless the clock is virtual and does not depend on them."""
    if old.scope != VIRTUAL and machine_identity(old) != machine_identity(new):
        return "not compared: unlike machines"
    if not any(map(seconds_per_token, old.items)):
        return "-"
    ratio = speedup([new], [old])
    return "-" if ratio is None else f"{ratio.value:.4f}x"


def _surroundings(first: Results, second: Results) -> Table:
    one, other = first.all_records[0], second.all_records[0]
    facts = [
        ("preset", first.preset, second.preset),
        ("scope", one.scope, other.scope),
        ("machine", machine(one), machine(other)),
        *(
            (fact, one.environment.get(fact), other.environment.get(fact))
            for fact in ("python", "platform", "git_commit", "git_dirty")
        ),
    ]
    packages = one.environment["packages"], other.environment["packages"]
    facts += [(f"package {n}", packages[0].get(n), packages[1].get(n)) for n in sorted({*packages[0], *packages[1]})]
    rows = tuple((fact, str(a), str(b)) for fact, a, b in facts if a != b)
    return Table("What the runs were made with, where it differs", ("what", "first", "second"), rows)
