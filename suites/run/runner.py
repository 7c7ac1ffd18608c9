"""Runs a preset: what is done is kept, each job is a child process, a failure stops nothing else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, as_completed
from contextlib import contextmanager
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
from suites.plan import preflight
from suites.plan.cells import Cell, Preset
from suites.record import Finished, RunFolder, sound, write_json
from suites.run.executors import Workers
from suites.run.jobs import Job, beside_jobs, cell_jobs, generation_jobs, live_jobs, put_damaged_aside, shape_jobs, work
from suites.synthetic import plan
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.reference_cells import ReferenceCell

FULL_NBYTES = 2**20  # a disk with less room than this may not hold another record
RATE_OVER_SECONDS = 600


class DiskFull(RuntimeError):
    """The run cannot go on; the message says what to do."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(
            f"The disk that holds {run.path} is full; free some space and run the same command again: "
            "what is finished is kept."
        )


class PerMinute(ProgressColumn):
    """How many are done a minute, over the last ten."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed * 60:.0f}/min")


def describe(preset: Preset, run: RunFolder) -> str:
    """What a run would do, in a few lines, before it does it."""
    cells, generations = preset.cells, preset.generations
    timed = sum(sound(run.record(cell.id)) for cell in cells)
    answered = sum(sound(run.answers(generation.id)) for generation in generations)
    items = sum(generation.items for generation in generations)
    megabytes = 0.2 * len(generations) + 0.15 * len(cells)
    if preset.shapes:
        told = plan.describe([(shape, sound(run.record(shape.id))) for shape in preset.shapes])
        if preset.besides:
            left = [beside for beside in preset.besides if not sound(run.record(beside.id))]
            told.append(
                f"{len(preset.besides)} of the cells are plain Transformers, and what the engine costs a layer: about "
                f"{plan.beside_seconds(left) / 60:.0f} minutes more"
            )
        return "\n".join([f"{preset.name}: {len(cells)} cells, {timed} done", *told, f"folder: {run.path}"])
    lines = [
        f"{preset.name}: {len(cells)} cells, {timed} done; "
        f"{len(generations)} live runs ({items:,} answers), {answered} done"
    ]
    if preset.live:
        answers = sum(cell.generation.items for cell in preset.live)
        lines.append(
            f"{len(preset.live)} of the cells are timed live, on what they answer themselves ({answers:,} answers)"
        )
    else:
        lines.append(
            f"allowed: {preset.minutes} minutes on 2 cores; disk about {megabytes:.0f} MB; no GPU and no network needed"
        )
    return "\n".join([*lines, *preflight.describe(preset), f"folder: {run.path}"])


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Keep other runs out of the folder. The system drops the lock of a process that is gone."""
    run.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.path / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise Refused(
            f"Another run is at work in {run.path}; wait until it has ended, or give another folder with --out."
        ) from error
    try:
        yield
    finally:
        lock.release()


def execute(preset: Preset, run: RunFolder, console: Console, workers: Workers, chosen: Preset | None = None) -> int:
    """Do what is missing of the preset (of the part `chosen`, if given); returns how many cells of it have no record
    at the end. A report expects the whole preset either way. Raises DiskFull.
    """
    begun = time.monotonic()
    write_json(run.plan, {"preset": preset.name, "minutes": preset.minutes, "cells": _expected(preset)})
    _tidy(preset, run)
    for aside in put_damaged_aside(preset, run):
        console.print(f"[yellow]damaged[/] put aside as {aside}; it is done again", highlight=False)
    preset = chosen or preset
    before = _recorded(preset, run)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
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
        _phase("live runs", generation_jobs(preset, run), workers.many, run, progress)
        cells = [*cell_jobs(preset, run), *live_jobs(preset, run), *shape_jobs(preset, run)]
        cells += beside_jobs(preset, run)
        _phase("cells", [job for job in cells if not job.alone], workers.many, run, progress)
        _phase("cells timed alone", [job for job in cells if job.alone], workers.alone, run, progress)
    recorded = _recorded(preset, run)
    seconds = time.monotonic() - begun
    rate = f" ({60 * (recorded - before) / seconds:.0f} cells a minute)" if recorded > before else ""
    console.print(
        f"{preset.name}: {recorded} of {len(preset.cells)} cells have records; "
        f"took {seconds:.0f} s of the {preset.minutes * 60} s it is allowed{rate}",
        highlight=False,
    )
    return len(preset.cells) - recorded


def _tidy(preset: Preset, run: RunFolder) -> None:
    """Throw away what a killed run left: half-written files, and notes of failures that have been made good since."""
    for leftover in run.path.glob("*/*.partial"):
        leftover.unlink(missing_ok=True)
    done = {cell.id: run.record(cell.id) for cell in preset.cells}
    done |= {generation.id: run.answers(generation.id) for generation in preset.generations}
    for name, left_behind in done.items():
        if left_behind.is_file():
            run.failure(name).unlink(missing_ok=True)


def _recorded(preset: Preset, run: RunFolder) -> int:
    return sum(run.record(cell.id).is_file() for cell in preset.cells)


def _phase(name: str, jobs: list[Job], pool: Executor, run: RunFolder, progress: Progress) -> None:
    """Do these jobs, and say what became of each as it ends. What has not begun when this is left is dropped."""
    if not jobs:
        return
    bar = progress.add_task(name, total=sum(len(job.labels) for job in jobs))
    waiting = {pool.submit(work, job): job for job in jobs}
    try:
        for future in as_completed(waiting):
            for done in _told(future, waiting[future]):
                _show(done, waiting[future], run, progress.console)
                progress.advance(bar)
    finally:
        for future in waiting:
            future.cancel()


def _told(future: Future, job: Job) -> list[Finished]:
    try:
        return future.result()
    except Exception as error:  # an executor's own: its worker died too often, its cluster is gone
        why = f"no worker finished it ({type(error).__name__}: {error})"
        return [Finished(name, label, 0.0, why) for name, label in job.labels.items()]


def _show(done: Finished, job: Job, run: RunFolder, console: Console) -> None:
    """Say what became of it; a failure leaves a note that the report prints."""
    failure = run.failure(done.id)
    if done.error is None:
        failure.unlink(missing_ok=True)
        console.print(f"[green]done[/]   {done.seconds:5.1f} s  {done.label}", highlight=False)
        return
    console.print(f"[red]failed[/] {done.seconds:5.1f} s  {done.label}: {done.error} (log: {job.log})", highlight=False)
    if shutil.disk_usage(run.path).free < FULL_NBYTES:
        raise DiskFull(run)
    note = {"id": done.id, "label": done.label, "error": done.error, "log": str(job.log), "log_tail": done.log_tail}
    write_json(failure, note)


def _expected(preset: Preset) -> list[dict[str, Any]]:
    def named(cell: Cell | SyntheticCell | ReferenceCell) -> dict[str, Any]:
        of = cell if isinstance(cell, SyntheticCell | ReferenceCell) else cell.generation
        return {
            "id": cell.id,
            "label": cell.label,
            "model": of.model.name,
            "task": of.task,
            "strategy": cell.strategy,
            "gamma": cell.gamma,
            "budget": cell.budget,
        }

    return [named(cell) for cell in preset.cells]
