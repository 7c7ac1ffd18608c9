"""Expected results of a preset, small enough to commit, and the gate that compares a run with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from reports.data import groups
from reports.data.compare import speedup, strategy_name
from reports.data.fingerprint import TIMES, VIRTUAL, fingerprints
from reports.data.results import Results
from reports.elements.slug import slug
from suites.strict_json import called, parse, read_bytes
from suites.typed_json import Count, Holding, typed

FOLDER = Path(__file__).parents[1] / "expected"
MEASURED = Path(__file__).parents[1] / "measured"  # runs that are kept with their records
CELLS = "cells.json"


def folder_of(preset: str) -> Path:
    """Return where what a preset should give is kept: inside `MEASURED` or `FOLDER`, whatever the preset is called."""
    kept = MEASURED / slug(preset)
    return kept if kept.is_dir() else FOLDER / slug(preset)


class NoExpectation(ValueError):
    """There is no expectation to compare the run with."""


@dataclass(frozen=True)
class Gate:
    """The facts that are not as expected, a line each: `t0` tokens and counters, `t1` virtual times and speedups."""

    cells: int
    speedups: int
    t0: tuple[str, ...]
    t1: tuple[str, ...]


@dataclass(frozen=True)
class _Facts:
    """The facts of a cell that counters belong to; those of `fingerprint` beside them may be any."""

    counters: dict[str, Count]


@dataclass(frozen=True)
class _Kept:
    """An expectation, as far as the gate reads it."""

    cells: dict[str, Annotated[dict[str, Any], Holding(_Facts)]]
    speedups: dict[str, float]


def expectation(results: Results) -> dict[str, Any]:
    """Return the expectation of a run, JSON-ready: each cell's fingerprint, and the virtual speedups of the report."""
    record = results.all_records[0]
    return {
        "preset": results.preset,
        "made_on": {"cpu": record.environment["cpu"], "packages": record.environment["packages"]},
        "cells": fingerprints(results),
        "speedups": speedups(results),
    }


def speedups(results: Results) -> dict[str, float]:
    """Return virtual speedups of every strategy over every baseline, all tasks together, by label; no wall times.

    Nine digits: the times they are made of are integers and held exactly, while the last bits of a logarithm depend on
    the processor.
    """
    found = {}
    for model in results.distinct("model"):
        for budget in results.budgets(model):
            bases = groups.baselines(results, budget, model)
            for group in groups.by_strategy(results, budget, model):
                for base, reference in bases.items():
                    ratio = speedup(group, reference)
                    if ratio and group != reference and all(r.scope == VIRTUAL for r in (*group, *reference)):
                        found[f"{model} / {strategy_name(group[0])} / {budget} / over {base}"] = float(
                            f"{ratio.value:.9g}"
                        )
    return found


def save(results: Results, page: str, folder: Path) -> list[Path]:
    """Write the expectation, a line a cell, and the page beside it; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data = expectation(results)
    lines = [
        f" {json.dumps(name)}: {_block(value) if name in ('cells', 'speedups') else json.dumps(value, sort_keys=True)}"
        for name, value in data.items()
    ]
    (folder / CELLS).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    (folder / "report.md").write_text(page, encoding="utf-8")
    return [folder / CELLS, folder / "report.md"]


def _block(entries: dict[str, Any]) -> str:
    inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in entries.items())
    return "{\n" + inner + "\n }" if inner else "{}"


def gate(results: Results, against: Path) -> Gate:
    """Compare a run with an expectation, tolerance zero. Raise NoExpectation if there is none at that path."""
    path = against / CELLS if against.is_dir() else against
    try:
        expected = typed(parse(read_bytes(path), called(path)), Annotated[dict[str, Any], Holding(_Kept)], called(path))
        cells, ratios = expected["cells"], expected["speedups"]
    except (OSError, ValueError) as error:
        raise NoExpectation(
            f"{path} holds no expectation ({error}); make one with: python -m reports expect RUN"
        ) from error
    found = fingerprints(results)
    t1 = [*_unlike_facts(cells, found, TIMES), *_unlike_speedups(ratios, speedups(results))]
    return Gate(len(cells), len(ratios), tuple(_unlike_work(cells, found)), tuple(t1))


def _unlike_work(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the differing cells, then tokens and scores, then counters."""
    lines = [f"{cell}: not expected" for cell in found if cell not in expected]
    lines += [f"{cell}: no record" for cell in expected if cell not in found]
    lines += _unlike_facts(expected, found, ("items", "outputs", "correct"))
    wanted, here = ({cell: facts["counters"] for cell, facts in side.items()} for side in (expected, found))
    return lines + _unlike_facts(wanted, here)


def _unlike_facts(expected: dict[str, Any], found: dict[str, Any], names: tuple[str, ...] | None = None) -> list[str]:
    """Return a line for each differing fact of the cells that both have; without `names`, of all facts."""
    return [
        f"{cell}: {fact} is {found[cell].get(fact, 0)}, expected {expected[cell].get(fact, 0)}"
        for cell in expected
        if cell in found
        for fact in names or sorted({*expected[cell], *found[cell]})
        if expected[cell].get(fact, 0) != found[cell].get(fact, 0)
    ]


def _unlike_speedups(expected: dict[str, float], found: dict[str, float]) -> list[str]:
    return [
        f"{label}: speedup is {found.get(label)}, expected {expected.get(label)}"
        for label in dict.fromkeys((*expected, *found))
        if expected.get(label) != found.get(label)
    ]
