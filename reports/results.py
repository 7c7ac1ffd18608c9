"""A run folder read back: what was planned, what has a record, what failed and what is missing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from suites.record import LATEST, Record, RunFolder, load


@dataclass(frozen=True)
class Results:
    """Records in the order of the plan; `absent` are planned cells without one, with the reason if there is one.

    `controls` are cells run to fail (a scrambled router); no table but their own may hold them.
    """

    preset: str
    records: tuple[Record, ...]
    absent: tuple[tuple[str, str], ...]
    controls: tuple[Record, ...] = ()

    def pick(self, **wanted: Any) -> list[Record]:
        """Records whose fields all equal what is wanted, in order."""
        return [r for r in self.records if all(getattr(r, name) == value for name, value in wanted.items())]

    def pool(self, **wanted: Any) -> list[Record]:
        """The same, if every task that the model was given (or the one wanted) is among them; otherwise none.

        Strategies are compared on the same items, so a pool that lacks a task is no pool; the page lists what failed.
        """
        found = self.pick(**wanted)
        given = self.pick(model=wanted["model"]) if "model" in wanted else self.records
        tasks = {wanted["task"]} if "task" in wanted else {record.task for record in given}
        return found if {record.task for record in found} == tasks else []

    def values(self, name: str) -> list[Any]:
        """The different values of a field, in order of first appearance."""
        return list(dict.fromkeys(getattr(record, name) for record in self.records))

    def budgets(self, model: str) -> list[str]:
        """Memory budgets every strategy of a model was given; shares of the experts and `resident`'s own are not."""
        found = dict.fromkeys(record.budget for record in self.pick(model=model))
        return [budget for budget in found if budget != "all" and not budget.endswith("%")]

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """Models of each family, the one the page is about first; the others are further trainings of it."""
        found: dict[str, list[str]] = {}
        for record in self.records:
            models = found.setdefault(family(record), [])
            if record.model not in models:
                models.append(record.model)
        return found

    @property
    def models(self) -> list[str]:
        """One model a family."""
        return [models[0] for models in self.families.values()]

    def tasks(self, model: str) -> list[str]:
        """The tasks a model was given, in order."""
        return list(dict.fromkeys(record.task for record in self.pick(model=model)))


def family(record: Record) -> str:
    """The architecture a model belongs to; seeds of one training recipe share it."""
    return record.config.get("family") or re.sub(r"-seed-?\d+$", "", record.model)


class NoResults(ValueError):
    """The folder holds no run that can be reported on; the message says what to do."""


def latest_run() -> Path:
    """The folder of the run that was started last from here. Raises NoResults if there is none."""
    if not LATEST.is_file():
        raise NoResults("There has been no run here; make one with: python -m suites run")
    return Path(LATEST.read_text().strip())


def read(run: Path) -> Results:
    """Raises NoResults if the folder is no run, or has no record at all."""
    folder = RunFolder(run)
    if not folder.plan.is_file():
        raise NoResults(f"{run} is not a run folder (it has no run.json); make one with: python -m suites run")
    planned = json.loads(folder.plan.read_text())
    records, absent = [], []
    for cell in planned["cells"]:
        path, failure = folder.record(cell["id"]), folder.failure(cell["id"])
        if not path.is_file():
            told = failure.is_file()
            why = f"FAILED: {json.loads(failure.read_text())['error']}" if told else "MISSING: not run yet"
            absent.append((cell["label"], why))
            continue
        try:
            records.append(load(path))
        except ValueError as error:
            absent.append((cell["label"], f"FAILED: {error}"))
    if not records:
        raise NoResults(f"No cell of {run} has a record; look at {run}/logs and run again.")
    controls = tuple(record for record in records if record.config.get("control"))
    return Results(planned["preset"], tuple(r for r in records if r not in controls), tuple(absent), controls)
