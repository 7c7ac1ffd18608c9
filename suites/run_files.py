"""The other files of a run that people pass around, typed: its plan, its live runs' answers, and notes of failures.

Each is held to its name: a file that was copied over another says of which it is.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from suites.record import Record, RunFolder, read_json
from suites.strict_json import called, parse
from suites.typed_json import Amount, Count, Holding, Name, Sha256, Some, typed

MOST_HEADER_NBYTES = 2**20  # of a trace


@dataclass(frozen=True)
class PlannedCell:
    """A cell that a report expects; without `model` it says no more of itself than its label."""

    id: Name
    label: str
    model: str | None = None
    task: str | None = None
    strategy: str | None = None
    gamma: Amount | None = None
    budget: str | None = None

    def unlike(self, record: Record) -> str | None:
        """Return the first field in which the cell's record is of another cell; None where there is none."""
        if self.model is None:
            return None
        names = ("model", "task", "strategy", "gamma", "budget")
        return next((name for name in names if getattr(record, name) != getattr(self, name)), None)


@dataclass(frozen=True)
class Plan:
    """What a run is to do, and the minutes that it may take."""

    preset: str
    cells: tuple[PlannedCell, ...]
    minutes: Amount | None = None


@dataclass(frozen=True)
class Failure:
    """Why a piece of work left nothing behind: it failed, or was `left_out`, asking for more than its machine has."""

    id: Name
    label: str
    error: str
    log: str | None = None
    log_tail: str | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Answered:
    """One answer of a live run, with those fields of `Item` that do not depend on how it is timed."""

    doc: Count
    prompt_sha256: Sha256
    prompt: str | None
    output: str
    fallback_spans: tuple[tuple[Count, Count], ...]
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Answers:
    """What a live run wrote and scored; `generation` is its id, and like model and task it is null in older runs.

    `agreed` has by answer and fallback 1 where the little pass would have written the same token; null in older runs.
    """

    answers: tuple[Answered, ...]
    checks: dict[str, bool]
    batch: Some
    wall_seconds: Amount
    generation: Name | None = None
    model: str | None = None
    task: str | None = None
    agreed: tuple[tuple[Count, ...], ...] | None = None


@dataclass(frozen=True)
class TraceAbout:
    """What a trace says of itself, as far as it is set against the other files; null in older runs, or foreign ones."""

    generation: Name | None = None
    model: str | None = None
    task: str | None = None
    docs: tuple[Count, ...] | None = None


@dataclass(frozen=True)
class PlayedTimes:
    """The times and bytes of a turn that an item repeats."""

    prefill_ns: Count
    decode_ns: Count
    decode_bytes: Count


@dataclass(frozen=True)
class Turn:
    """One repeat of a cell that is timed in turn with others, as far as reports need it."""

    played: Annotated[dict[str, Any], Holding(PlayedTimes)]
    cell: Name | None = None
    repeat: Count | None = None


def read_plan(path: Path) -> Plan:
    """Read a plan. Raise ValueError (WrongField for a wrong field), OSError."""
    plan: Plan = typed(read_json(path), Plan, called(path))
    ids = [cell.id for cell in plan.cells]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{called(path)}: cells must not have the same id twice")
    return plan


def read_failure(folder: RunFolder, piece: str) -> Failure:
    """Read why a piece of work left nothing. Raise ValueError for a wrong field, or the note of another; OSError."""
    path = folder.failure(piece)
    note: Failure = typed(read_json(path), Failure, called(path))
    _held(note.id, piece, path)
    return note


def read_answers(folder: RunFolder, generation: str) -> Answers:
    """Read a live run's answers. Raise ValueError for a wrong field, or the answers of another live run; OSError."""
    path = folder.answers(generation)
    found: Answers = typed(read_json(path), Answers, called(path))
    _held(found.generation, generation, path)
    return found


def read_turn_times(folder: RunFolder, cell: str, repeat: int) -> tuple[int, int, int]:
    """Return a turn's nanoseconds of prefill and of decode, and its decode bytes.

    Raise ValueError for a wrong field, or another turn; OSError.
    """
    path = folder.turn(cell, repeat)
    data = typed(read_json(path), Annotated[dict[str, Any], Holding(Turn)], called(path))
    _held(f"{data.get('cell', cell)}-{data.get('repeat', repeat)}", path.stem, path)
    played = data["played"]
    return played["prefill_ns"], played["decode_ns"], played["decode_bytes"]


def read_trace_about(folder: RunFolder, generation: str) -> dict[str, Any]:
    """Return what a live run's trace says of itself, without its arrays, nor any check of them.

    Raise ValueError where it cannot be read, or is of another live run; OSError. `mobile.replay.trace_file` is the
    reader of the whole; this one needs neither numpy nor that room.
    """
    path, name = folder.trace(generation), called(folder.trace(generation))
    if not path.is_file():
        raise ValueError(f"{name} is not there, or no regular file")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("header.npy") as member:
            content = member.read(MOST_HEADER_NBYTES)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{name} is no complete trace") from error
    start = 10 + int.from_bytes(content[8:10], "little")  # numpy's own header: magic, version, length, a dict
    header = typed(parse(content[start:], name), dict[str, Any], name)
    about: dict[str, Any] = typed(header.get("about"), Annotated[dict[str, Any], Holding(TraceAbout)], name)
    _held(about.get("generation"), generation, path)
    return about


def _held(said: Any, named: str, path: Path) -> None:
    """Raise ValueError where a file is of another piece of work than its name says; one that says nothing may be."""
    if said is not None and said != named:
        raise ValueError(f"{called(path)} is of {str(said)[:64]!r}, not of what its name says; restore the right file")
