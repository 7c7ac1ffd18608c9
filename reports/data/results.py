"""A run folder read back: the planned cells, those with a record, and why the others have none."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from reports.data.compare import strategy_name
from suites.record import LATEST, Record, RunFolder, load
from suites.run_files import PlannedCell, read_failure, read_plan
from suites.strict_json import read_bytes
from suites.typed_json import WrongField

AS_IS = "as-is"  # rows of the weights' own numbers


@dataclass(frozen=True)
class Results:
    """The records of a run in the order of the plan, by the tables that may hold them.

    `records` are scored cells, `controls` cells that must fail (a scrambled router), `synthetic` cells that played a
    script on synthetic weights, `references` plain Transformers on the same sizes, `signals` cells that compare
    confidence signals, `accuracy` rounds of fresh items under several gatings. `packed` and `packed_synthetic` are the
    cells of the first and the third kind whose rows are packed. `absent` are planned cells without a record as (label,
    reason), `logs` the ends of failed cells' logs as (label, text); `left_out` are, as (label, reason), those that the
    machine was too small for.
    """

    preset: str
    records: tuple[Record, ...]
    absent: tuple[tuple[str, str], ...]
    controls: tuple[Record, ...] = ()
    logs: tuple[tuple[str, str], ...] = ()
    synthetic: tuple[Record, ...] = ()
    references: tuple[Record, ...] = ()
    signals: tuple[Record, ...] = ()
    accuracy: tuple[Record, ...] = ()
    packed: tuple[Record, ...] = ()
    packed_synthetic: tuple[Record, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def all_records(self) -> tuple[Record, ...]:
        """Return every record of the run."""
        return (*self.scored, *self.controls, *self.scripted, *self.references, *self.signals, *self.accuracy)

    @property
    def scored(self) -> tuple[Record, ...]:
        """Return all scored cells, whatever their rows."""
        return (*self.records, *self.packed)

    @property
    def scripted(self) -> tuple[Record, ...]:
        """Return all cells that played a script, whatever their rows."""
        return (*self.synthetic, *self.packed_synthetic)

    def select(self, **wanted: Any) -> list[Record]:
        """Return the records whose fields equal `wanted`, in order."""
        found = self._of(wanted["model"]) if "model" in wanted else self.records
        for name, value in wanted.items():
            found = [record for record in found if getattr(record, name) == value]
        return list(found)

    def select_complete(self, **wanted: Any) -> list[Record]:
        """Return the same records if they cover every task of the model (or the wanted one); otherwise none.

        Strategies are compared on the same items, so a selection that lacks a task is none; the page lists what failed.
        """
        found = self.select(**wanted)
        given = self._of(wanted["model"]) if "model" in wanted else self.records
        tasks = {wanted["task"]} if "task" in wanted else {record.task for record in given}
        return found if {record.task for record in found} == tasks else []

    def _of(self, model: str) -> list[Record]:
        return self._by_model.get(model, [])

    @cached_property
    def _by_model(self) -> dict[str, list[Record]]:
        """Index the records by model: a page selects cells of a model thousands of times."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            found.setdefault(record.model, []).append(record)
        return found

    def distinct(self, name: str) -> list[Any]:
        """Return the distinct values of a record field, in order of first appearance."""
        return list(dict.fromkeys(getattr(record, name) for record in self.records))

    def budgets(self, model: str) -> list[str]:
        """Return the memory budgets that every strategy of a model was given: no shares of experts, no `resident`."""
        found = dict.fromkeys(record.budget for record in self.select(model=model))
        return [budget for budget in found if budget != "all" and not budget.endswith("%")]

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """Return the models of each family, first the one the page is about, then its other trainings."""
        found: dict[str, list[str]] = {}
        for record in self.records:
            models = found.setdefault(family(record), [])
            if record.model not in models:
                models.append(record.model)
        return found

    @property
    def models(self) -> list[str]:
        """Return one model a family."""
        return [models[0] for models in self.families.values()]

    def tasks(self, model: str) -> list[str]:
        """Return the tasks a model was given, in order."""
        return list(dict.fromkeys(record.task for record in self.select(model=model)))


def family(record: Record) -> str:
    """Return the family of a record's model; seeds of one training recipe share it."""
    return record.config.get("family") or re.sub(r"-seed-?\d+$", "", record.model)


def rows_of(record: Record) -> str:
    """Return the row format of a record's experts."""
    return record.config.get("rows") or AS_IS


def strategy_and_rows(record: Record) -> str:
    """Return a record's strategy as tables write it, and its rows where they are packed."""
    return strategy_name(record) if rows_of(record) == AS_IS else f"{strategy_name(record)}, {rows_of(record)}"


class NoResults(ValueError):
    """The folder holds no run that can be reported on; the message says what to do."""


def latest_run() -> Path:
    """Return the folder of the run that was started last from here. Raise NoResults if there is none."""
    if not LATEST.is_file():
        raise NoResults("There has been no run here; make one with: python -m suites run")
    try:
        return Path(os.fsdecode(read_bytes(LATEST)).rstrip("\r\n"))
    except ValueError as error:
        raise NoResults(f"{error}; name the folder of a run.") from error


def read(run: Path) -> Results:
    """Read a run folder. Raise NoResults if it is no run, or has no record at all."""
    folder = RunFolder(run)
    if not folder.plan.is_file():
        raise NoResults(f"{run} is not a run folder (it has no run.json); make one with: python -m suites run")
    try:
        plan = read_plan(folder.plan)
    except WrongField as error:
        why = f"({error.field!r}): {error}" if error.field else f"({error})"
        raise NoResults(f"{folder.plan} is no plan {why}; run the suite again, what is done is kept.") from error
    except ValueError as error:
        raise NoResults(f"{folder.plan} is no plan ({error}); run the suite again, what is done is kept.") from error
    records, absent, left_out = [], [], []
    with _no_collection():
        for cell in plan.cells:
            found = _record(folder, cell)
            if isinstance(found, Record):
                records.append(found)
            elif found.left_out:
                left_out.append((cell.label, found.reason))
            else:
                absent.append((cell.label, found))
    if not records:
        raise NoResults(f"No cell of {run} has a record; look at {run}/logs and run again.")
    controls = tuple(record for record in records if record.config.get("control"))
    synthetic = [record for record in records if record.config.get("kind") == "shape"]
    references = tuple(record for record in records if record.config.get("kind") == "beside")
    signals = tuple(record for record in records if record.config.get("kind") == "signals")
    accuracy = tuple(record for record in records if record.config.get("kind") == "accuracy")
    apart = {record.id for record in (*controls, *synthetic, *references, *signals, *accuracy)}
    scored = [record for record in records if record.id not in apart]
    return Results(
        plan.preset,
        tuple(record for record in scored if rows_of(record) == AS_IS),
        tuple((label, gap.reason) for label, gap in absent),
        controls,
        tuple((label, gap.log_tail) for label, gap in absent if gap.log_tail),
        tuple(record for record in synthetic if rows_of(record) == AS_IS),
        references,
        signals,
        accuracy,
        tuple(record for record in scored if rows_of(record) != AS_IS),
        tuple(record for record in synthetic if rows_of(record) != AS_IS),
        tuple(left_out),
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from going over a million new tuples again and again: half of the time of reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class NoRecord(NamedTuple):
    """The reason why a cell has no record, and the end of its log; or why its machine was too small for it."""

    reason: str
    log_tail: str | None = None
    left_out: bool = False


def _record(folder: RunFolder, cell: PlannedCell) -> Record | NoRecord:
    path, failure = folder.record(cell.id), folder.failure(cell.id)
    try:
        if os.path.lexists(path):
            record = load(path)
            if field := cell.unlike(record):
                ours, planned = getattr(record, field), getattr(cell, field)
                return NoRecord(f"FAILED: record {cell.id} has the {field} {ours!r}, and {planned!r} was planned")
            return record
        if os.path.lexists(failure):
            note = read_failure(folder, cell.id)
            if note.left_out:
                return NoRecord(note.error, left_out=True)
            return NoRecord(f"FAILED: {note.error}", note.log_tail)
    except (ValueError, OSError) as error:
        return NoRecord(f"FAILED: {error}")
    return NoRecord("MISSING: not run yet")
