"""Runs a preset: what is done is skipped, each job is a child process, a failure stops nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from suites.matrix import Cell, Generation, Preset
from suites.record import Finished, RunFolder, write_json

CELLS_A_JOB = 12  # of one live run, timed by one child that reads the trace once


@dataclass(frozen=True)
class Job:
    """One child process: its name on the screen, what it reads on standard input, what it is to leave behind."""

    id: str
    label: str
    spec: dict[str, Any]
    proof: dict[str, Path]  # by the id of a live run or a cell, the file that proves it done
    log: Path
    needs: Path | None = None

    @property
    def done(self) -> bool:
        return all(path.is_file() for path in self.proof.values())


def generation_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """The live runs not done yet, all tasks of one model and gating in one process, since starting one is slow."""
    hardware = preset.cells[0].hardware

    def gating(generation: Generation) -> tuple:
        return generation.model.name, generation.scrambled, generation.strategy, generation.gamma or 0, generation.seed

    jobs = []
    for _, members in groupby(sorted(preset.generations, key=gating), gating):
        missing = [g for g in members if not run.answers(g.id).is_file()]
        if missing:
            first = missing[0]
            shown = f"{first.model.name} {first.label.removeprefix(f'{first.model.name} {first.task} ')}"
            jobs.append(
                Job(
                    id=f"generate-{first.id}", label=f"live {shown}", log=run.log(f"generate-{first.id}"),
                    spec={"run": str(run.path), "generations": [asdict(g) for g in missing], "hardware": hardware},
                    proof={g.id: run.answers(g.id) for g in missing},
                )
            )  # fmt: skip
    return jobs


def cell_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """The cells not done yet, a few of one live run in one job."""
    jobs = []
    missing = [cell for cell in preset.cells if not run.record(cell.id).is_file()]
    for generation, members in groupby(sorted(missing, key=lambda c: c.generation.id), lambda c: c.generation):
        cells_left = list(members)
        while cells_left:
            cells, cells_left = cells_left[:CELLS_A_JOB], cells_left[CELLS_A_JOB:]
            jobs.append(
                Job(
                    id=f"time-{cells[0].id}", label=f"time {generation.label}", log=run.log(f"time-{cells[0].id}"),
                    spec={"run": str(run.path), "cells": [asdict(cell) for cell in cells]},
                    proof={cell.id: run.record(cell.id) for cell in cells}, needs=run.answers(generation.id),
                )
            )  # fmt: skip
    return jobs


def describe(preset: Preset, run: RunFolder) -> str:
    """What a run would do, in a few lines, before it does it."""
    cells, generations = preset.cells, preset.generations
    timed = sum(run.record(cell.id).is_file() for cell in cells)
    answered = sum(run.answers(generation.id).is_file() for generation in generations)
    items = sum(generation.items for generation in generations)
    megabytes = 0.2 * len(generations) + 0.15 * len(cells)
    return (
        f"{preset.name}: {len(cells)} cells, {timed} done; "
        f"{len(generations)} live runs ({items:,} answers), {answered} done\n"
        f"allowed: {preset.minutes} minutes on 2 cores; disk about {megabytes:.0f} MB; no GPU and no network needed\n"
        f"folder: {run.path}"
    )


def execute(preset: Preset, run: RunFolder, console: Console) -> int:
    """Do what is missing; returns how many cells have no record at the end."""
    begun = time.monotonic()
    write_json(run.plan, {"preset": preset.name, "minutes": preset.minutes, "cells": _expected(preset)})
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for phase, plan in (("live runs", generation_jobs), ("cells", cell_jobs)):
            jobs = plan(preset, run)
            bar = progress.add_task(phase, total=sum(len(job.proof) for job in jobs))
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                waiting = {pool.submit(work, job): job for job in jobs}
                for future in _as_they_finish(waiting):
                    for done in future.result():
                        _show(done, waiting[future].log, run, console)
                        progress.advance(bar)
    missing = [cell for cell in preset.cells if not run.record(cell.id).is_file()]
    seconds = time.monotonic() - begun
    console.print(
        f"{preset.name}: {len(preset.cells) - len(missing)} of {len(preset.cells)} cells have records; "
        f"took {seconds:.0f} s of the {preset.minutes * 60} s it is allowed"
    )
    return len(missing)


def _as_they_finish(futures: Iterable[Future]) -> Iterator[Future]:
    """On Ctrl-C those that have not begun are dropped, so that finished cells stay finished."""
    try:
        yield from as_completed(futures)
    except KeyboardInterrupt:
        for future in futures:
            future.cancel()
        raise


def _expected(preset: Preset) -> list[dict[str, Any]]:
    def named(cell: Cell) -> dict[str, Any]:
        return {"id": cell.id, "label": cell.label, "model": cell.generation.model.name, "task": cell.generation.task,
                "strategy": cell.strategy, "gamma": cell.gamma, "budget": cell.budget}  # fmt: skip

    return [named(cell) for cell in preset.cells]


def work(job: Job) -> list[Finished]:
    """Run one child process to its end. What it printed goes to its log; what it left undone has a reason."""
    if job.needs is not None and not job.needs.is_file():
        why = f"the live run it is timed from failed ({job.needs.name} is missing)"
        return [Finished(name, job.label, 0.0, why) for name in job.proof]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.monotonic()
    with job.log.open("w") as log:
        child = subprocess.run(
            [sys.executable, "-m", "suites.cell"], input=json.dumps(job.spec), text=True, stdout=subprocess.PIPE,
            stderr=log, env={**os.environ, **quiet},
        )  # fmt: skip
    told = [Finished(**json.loads(line)) for line in child.stdout.splitlines()]
    silent = set(job.proof) - {done.id for done in told}
    why = _last_line(job.log, child.returncode)
    return told + [Finished(name, job.label, time.monotonic() - begun, why) for name in job.proof if name in silent]


def _show(done: Finished, log: Path, run: RunFolder, console: Console) -> None:
    """Say what became of it; a failure leaves a note that the report prints."""
    failure = run.failure(done.id)
    if done.error is None:
        failure.unlink(missing_ok=True)
        console.print(f"[green]done[/]   {done.seconds:5.1f} s  {done.label}", highlight=False)
    else:
        write_json(failure, {"id": done.id, "label": done.label, "error": done.error, "log": str(log)})
        console.print(f"[red]failed[/] {done.seconds:5.1f} s  {done.label}: {done.error} (log: {log})", highlight=False)


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with code {code} and said nothing"
