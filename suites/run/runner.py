"""The runner of a preset: finished work is kept, each job is a process of its own, and a failure stops nothing else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mobile.errors import Refused
from mobile.outputs import printable
from mobile.visible import on_one_line
from suites.plan import preflight
from suites.plan.preset import Preset
from suites.record import Finished, RunFolder, sound, write_json
from suites.run.executors import Workers
from suites.run.jobs import Job, do, jobs, put_damaged_aside
from suites.run.work import Work
from suites.run_files import read_failure
from suites.synthetic import plan

FULL_NBYTES = 2**20  # a disk with less room than this may not hold another record
RATE_OVER_SECONDS = 600
LOOK_SECONDS = 1.0  # between two looks at how many turns have been played
TOLD_TIMES = 10  # that a log is told of them


class DiskFull(RuntimeError):
    """The run cannot go on; the message says what to do."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(
            f"The disk that holds {printable(run.path)} is full; free some space and run the same command again: "
            "what is finished is kept."
        )


class PerMinute(ProgressColumn):
    """A column of the progress bar: pieces of work done a minute, over the last ten minutes."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed * 60:.0f}/min")


def describe(preset: Preset, run: RunFolder) -> str:
    """Return a few lines that say what a run would do, before it does it."""

    def done(pieces: Iterable[Work]) -> int:
        return sum(sound(piece.output(run)) for piece in pieces)

    cells, generations = preset.cells, preset.generations
    lines = [f"{preset.name}: {len(cells)} cells, {done(cells)} done"]
    if preset.scored:
        items = sum(generation.items for generation in generations)
        lines[0] += f"; {len(generations)} live runs ({items:,} answers), {done(generations)} done"
    if preset.live:
        answers = sum(cell.generation.items for cell in preset.live)
        lines.append(
            f"{len(preset.live)} of the cells are timed live, on what they answer themselves ({answers:,} answers)"
        )
    elif preset.scored:
        megabytes = 0.2 * len(generations) + 0.15 * len(cells)
        lines.append(
            f"allowed: {preset.minutes} minutes on 2 cores; disk about {megabytes:.0f} MB; no GPU and no network needed"
        )
    if preset.scored:
        lines += preflight.describe(preset)
    if preset.synthetic:
        lines += plan.describe([(cell, sound(cell.output(run))) for cell in preset.synthetic])
    if preset.signals:
        lines.append(
            f"{len(preset.signals)} of the cells compare confidence signals: some answers more, not among the above"
        )
    if preset.accuracy:
        most = sum(cell.items for cell in preset.accuracy)
        lines.append(
            f"at most {most:,} fresh items, each answered by full K, static K/2, MoBiLE at "
            f"{len(preset.accuracy[0].gammas)} gammas and a control; a family whose verdict is settled is asked no more"
        )
        lines.append(f"allowed: {preset.minutes} minutes on 2 cores; no GPU and no network needed")
    if preset.references:
        left = [cell for cell in preset.references if not sound(cell.output(run))]
        lines.append(
            f"{len(preset.references)} of the cells are plain Transformers, and what the engine costs a layer: "
            f"about {plan.reference_seconds(left) / 60:.0f} minutes more"
        )
    return "\n".join([*lines, f"folder: {printable(run.path)}"])


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Keep other runs out of the folder. The system drops the lock of a process that is gone."""
    run.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.path / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Refused(
            f"Another run is at work in {printable(run.path)}; wait until it has ended, or give another folder with "
            "--out."
        ) from error
    try:
        yield
    finally:
        lock.release()


def execute(preset: Preset, run: RunFolder, console: Console, workers: Workers, chosen: Preset | None = None) -> int:
    """Do what is missing of the preset, or of its part `chosen`; return how many cells of that are missing then.

    Cells that this machine is too small for are left out and not missing, unless nothing else was asked for. A report
    expects the whole preset either way. Raise DiskFull.
    """
    begun = time.monotonic()
    # 1. Write the plan, then throw away or put aside what an earlier run left in no good state.
    write_json(run.plan, {"preset": preset.name, "minutes": preset.minutes, "cells": _expected(preset)})
    pieces: list[Work] = [*preset.cells, *preset.generations]
    _tidy(pieces, run)
    for aside in put_damaged_aside(pieces, run):
        _say(console, "damaged", "yellow", f" put aside as {printable(aside)}; it is done again")
    # 2. Do what is missing: live runs, whose traces cells replay; then cells; then those that want a machine each.
    preset = chosen or preset
    before = _recorded(preset, run)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        PerMinute(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=RATE_OVER_SECONDS
    ) as progress:
        _phase("live runs", jobs(preset.generations, run), workers.many, run, progress)
        timing = jobs(preset.cells, run)
        alone = [job for job in timing if job.alone]
        many = [job for job in timing if not job.alone]
        _phase("cells", many, workers.many, run, progress, ("rounds", _rounds(preset, many, run)))
        _phase("cells timed alone", alone, workers.alone, run, progress, ("turns", _turns(preset, alone, run)))
    # 3. Count the records that are there, and the cells that are none of this machine's.
    recorded, left_out = _recorded(preset, run), _left_out(preset, run)
    seconds = time.monotonic() - begun
    rate = f" ({60 * (recorded - before) / seconds:.0f} cells a minute)" if recorded > before else ""
    console.print(
        f"{preset.name}: {recorded} of {len(preset.cells)} cells have records"
        + (f", {left_out} are left out; " if left_out else "; ")
        + f"took {seconds:.0f} s of the {preset.minutes * 60} s it is allowed{rate}"
    )
    return len(preset.cells) - recorded - (left_out if recorded else 0)


def _tidy(pieces: Iterable[Work], run: RunFolder) -> None:
    """Delete what a killed run left: half-written files, and notes of failures that have been made good since."""
    for leftover in run.path.glob("*/*.partial"):
        leftover.unlink(missing_ok=True)
    for piece in pieces:
        if piece.output(run).is_file():
            run.failure(piece.id).unlink(missing_ok=True)


def _recorded(preset: Preset, run: RunFolder) -> int:
    return sum(cell.output(run).is_file() for cell in preset.cells)


def _left_out(preset: Preset, run: RunFolder) -> int:
    return sum(run.failure(cell.id).is_file() and read_failure(run, cell.id).left_out for cell in preset.cells)


def _turns(preset: Preset, todo: Iterable[Job], run: RunFolder) -> list[Path]:
    """Return the files of all turns that these jobs are to play: of a job, no cell is done before all of its turns."""
    asked = {name for job in todo for name in job.labels}
    in_turn = [cell for cell in preset.synthetic if cell.kind == "in turn" and cell.id in asked]
    return [run.turn(cell.id, repeat) for cell in in_turn for repeat in range(cell.repeats)]


def _rounds(preset: Preset, todo: Iterable[Job], run: RunFolder) -> list[Path]:
    """Return the records that jobs of many minutes write one by one: all rounds of a family are one job."""
    asked = {name for job in todo for name in job.labels}
    return [cell.output(run) for cell in preset.accuracy if cell.id in asked]


def _phase(
    name: str,
    todo: list[Job],
    pool: Executor,
    run: RunFolder,
    progress: Progress,
    meanwhile: tuple[str, Sequence[Path]] = ("", ()),
) -> None:
    """Do these jobs and print what became of each as it ends. On an error, drop those that have not begun.

    `meanwhile` names files that jobs write before they end, which are counted, so that something moves.
    """
    if not todo:
        return
    bar = progress.add_task(name, total=sum(len(job.labels) for job in todo))
    parts, files = meanwhile
    turning = progress.add_task(parts, total=len(files), visible=bool(files))
    waiting, told = {pool.submit(do, job): job for job in todo}, 0
    left: set[Future] = set(waiting)
    try:
        while left:
            ended, left = wait(left, LOOK_SECONDS if files else None, FIRST_COMPLETED)
            for future in ended:
                for done in _outcomes(future, waiting[future]):
                    _show(done, waiting[future], run, progress.console)
                    progress.advance(bar)
            played = sum(path.is_file() for path in files)
            progress.update(turning, completed=played)
            if progress.disable and played >= told + max(1, len(files) / TOLD_TIMES):
                told = played
                progress.console.print(f"{parts:6} {played:7} of {len(files)}")
    finally:
        for future in waiting:
            future.cancel()


def _outcomes(future: Future, job: Job) -> list[Finished]:
    """Return what became of each piece of the job, also where the executor itself lost it."""
    try:
        return future.result()
    except Exception as error:  # an executor's own: its worker died too often, its cluster is gone
        why = f"no worker finished it ({type(error).__name__}: {error})"
        return [Finished(name, label, 0.0, why) for name, label in job.labels.items()]


def _show(done: Finished, job: Job, run: RunFolder, console: Console) -> None:
    """Print what became of a piece; what has no output leaves a note that the report prints. Raise DiskFull."""
    failure, label = run.failure(done.id), on_one_line(done.label)
    if done.error is None:
        failure.unlink(missing_ok=True)
        _say(console, "done", "green", f"   {done.seconds:5.1f} s  {label}")
        return
    if done.left_out:
        _say(console, "left out", "yellow", f" {label}: {done.error}")
        write_json(failure, {"id": done.id, "label": done.label, "error": done.error, "left_out": True})
        return
    _say(console, "failed", "red", f" {done.seconds:5.1f} s  {label}: {done.error} (log: {printable(job.log)})")
    if shutil.disk_usage(run.path).free < FULL_NBYTES:
        raise DiskFull(run)
    note = {"id": done.id, "label": done.label, "error": done.error, "log": str(job.log), "log_tail": done.log_tail}
    write_json(failure, note)


def _expected(preset: Preset) -> list[dict[str, Any]]:
    """Return what a report says of each cell, whether or not it has a record."""
    return [
        {
            "id": cell.id,
            "label": cell.label,
            "model": cell.model.name,
            "task": cell.task,
            "strategy": cell.strategy,
            "gamma": cell.gamma,
            "budget": cell.budget,
        }
        for cell in preset.cells
    ]


def _say(console: Console, word: str, style: str, rest: str) -> None:
    """Print a line whose first word is coloured; brackets in the rest, an error's perhaps, are text and not markup."""
    console.print(Text.assemble((word, style), rest))
