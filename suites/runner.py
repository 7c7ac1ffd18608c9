"""Runs a preset: what is done is skipped, each job is a child process, a failure stops nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from suites.matrix import Cell, Generation, Preset
from suites.record import RunFolder, write_json


@dataclass(frozen=True)
class Job:
    """One child process: its name on the screen, what it reads on standard input, the files that prove it done."""

    id: str
    label: str
    spec: dict[str, Any]
    proof: tuple[Path, ...]
    needs: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        return all(path.is_file() for path in self.proof)


def generation_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """The live runs not done yet, all tasks of one model and gating in one process, since starting one is slow."""
    hardware = preset.cells[0].hardware

    def gating(generation: Generation) -> tuple:
        return generation.model.name, generation.strategy, generation.gamma or 0, generation.seed

    jobs = []
    for (model, strategy, gamma, seed), members in groupby(sorted(preset.generations, key=gating), gating):
        missing = [g for g in members if not run.answers(g.id).is_file()]
        if missing:
            shown = f"{strategy} gamma {gamma}" if missing[0].gamma is not None else strategy
            jobs.append(
                Job(
                    id=f"generate-{model}-{strategy}-{gamma}-{seed}", label=f"generate {model} {shown}",
                    spec={"run": str(run.path), "generations": [asdict(g) for g in missing], "hardware": hardware},
                    proof=tuple(run.answers(g.id) for g in missing),
                )
            )  # fmt: skip
    return jobs


def cell_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """A job for every cell of the preset, done or not."""
    return [
        Job(
            id=cell.id, label=cell.label, spec={"run": str(run.path), "cell": asdict(cell)},
            proof=(run.record(cell.id),), needs=(run.answers(cell.generation.id),),
        )
        for cell in preset.cells
    ]  # fmt: skip


def describe(preset: Preset, run: RunFolder) -> str:
    """What a run would do, in a few lines, before it does it."""
    cells, live = cell_jobs(preset, run), generation_jobs(preset, run)
    generations = preset.generations
    waiting = sum(len(job.proof) for job in live)
    items = sum(generation.items for generation in generations)
    megabytes = 0.2 * len(generations) + 0.15 * len(cells)
    return (
        f"{preset.name}: {len(cells)} cells, {sum(job.done for job in cells)} done; "
        f"{len(generations)} live runs ({items:,} answers), {len(generations) - waiting} done\n"
        f"allowed: {preset.minutes} minutes on 2 cores; disk about {megabytes:.0f} MB; no GPU and no network needed\n"
        f"folder: {run.path}"
    )


def execute(preset: Preset, run: RunFolder, console: Console) -> int:
    """Do what is missing; returns how many cells have no record at the end."""
    begun = time.monotonic()
    cells = cell_jobs(preset, run)
    write_json(run.plan, {"preset": preset.name, "minutes": preset.minutes, "cells": _expected(preset)})
    workers = os.cpu_count() or 1
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for phase, jobs in (("live runs", generation_jobs(preset, run)), ("cells", [c for c in cells if not c.done])):
            bar = progress.add_task(phase, total=len(jobs))
            with ThreadPoolExecutor(workers) as pool:
                futures = [pool.submit(_run_job, job, run, progress, bar, console) for job in jobs]
                _finish(futures)
    missing = [cell for cell in cells if not cell.done]
    seconds = time.monotonic() - begun
    console.print(
        f"{preset.name}: {len(cells) - len(missing)} of {len(cells)} cells have records; took {seconds:.0f} s of the "
        f"{preset.minutes * 60} s it is allowed"
    )
    return len(missing)


def _finish(futures: list[Future]) -> None:
    """Wait for all; on Ctrl-C drop those that have not begun, so that finished cells stay finished."""
    try:
        wait(futures)
    except KeyboardInterrupt:
        for future in futures:
            future.cancel()
        raise
    for future in futures:
        future.result()


def _expected(preset: Preset) -> list[dict[str, Any]]:
    def named(cell: Cell) -> dict[str, Any]:
        return {"id": cell.id, "label": cell.label, "model": cell.generation.model.name, "task": cell.generation.task,
                "strategy": cell.strategy, "gamma": cell.gamma, "budget": cell.budget}  # fmt: skip

    return [named(cell) for cell in preset.cells]


def _run_job(job: Job, run: RunFolder, progress: Progress, bar: TaskID, console: Console) -> None:
    """One child process; its output goes to a log, and a failure leaves a note that the report prints."""
    log, failure = run.log(job.id), run.failure(job.id)
    log.parent.mkdir(parents=True, exist_ok=True)
    line = progress.add_task(job.label, total=1)
    begun = time.monotonic()
    absent = [path.name for path in job.needs if not path.is_file()]
    if absent:
        error: str | None = f"the live run it is timed from failed ({', '.join(absent)} is missing)"
    else:
        with log.open("w") as output:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            child = subprocess.run(
                [sys.executable, "-m", "suites.cell"], input=json.dumps(job.spec), text=True,
                stdout=output, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        error = None if child.returncode == 0 and job.done else _last_line(log, child.returncode)
    progress.remove_task(line)
    progress.advance(bar)
    took = f"{time.monotonic() - begun:5.1f} s"
    if error is None:
        failure.unlink(missing_ok=True)
        console.print(f"[green]done[/]   {took}  {job.label}", highlight=False)
    else:
        write_json(failure, {"id": job.id, "label": job.label, "error": error, "log": str(log)})
        console.print(f"[red]failed[/] {took}  {job.label}: {error} (log: {log})", highlight=False)


def _last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with code {code} and said nothing"
