"""What is left to do of a run, cut into jobs; and how a job is done: by a child process that leaves files behind."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

from suites.plan.cells import Cell, Generation, Preset
from suites.record import VIRTUAL, Finished, RunFolder, sound
from suites.run.worker import TAIL, ending
from suites.synthetic.cells import SyntheticCell
from suites.synthetic.reference_cells import ReferenceCell
from suites.tasks.paper_tasks import locate

RUNS_A_JOB = 15  # live runs in one child, which takes seconds to import what answers and scores
FEWEST_JOBS = 8  # that live runs are cut into if there are so many, for machines with some processors
CELLS_A_JOB = 12  # of one live run, timed by one child that reads the trace once
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Job:
    """One child process: what it reads on standard input, and the label of each thing it is to do, by its id.

    `needs` is a file it cannot do without. A job that is `alone` is timed on the wall clock: nothing else may run on
    its machine.
    """

    spec: dict[str, Any]
    labels: dict[str, str]
    log: Path
    needs: Path | None = None
    alone: bool = False
    online: bool = False  # it may read from the hub

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables of its process; the one that is alone may use all cores."""
        return {**({} if self.alone else QUIET), **({} if self.online else OFFLINE)}


def generation_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """The live runs not done yet, several in one process, since starting one is slow; few are spread over several."""
    missing = [generation for generation in preset.generations if not run.answers(generation.id).is_file()]
    return [
        _job(
            some,
            "generate",
            run,
            {"hardware": preset.cells[0].hardware},
            online=any(not locate(one.task, one.folder) for one in some),
        )
        for some in _pieces(missing, min(RUNS_A_JOB, ceil(len(missing) / FEWEST_JOBS)))
    ]


def cell_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """The replayed cells not done yet, a few of one live run in one job."""

    def shared(cell: Cell) -> str:
        return cell.generation.id

    jobs = []
    missing = [cell for cell in preset.replayed if not run.record(cell.id).is_file()]
    for generation, members in groupby(sorted(missing, key=shared), shared):
        for some in _pieces(list(members), CELLS_A_JOB):
            jobs.append(_job(some, "time", run, needs=run.answers(generation)))
    return jobs


def live_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """The cells to be timed live that are not done yet, all tasks of one attached model in one job."""

    def attached(cell: Cell) -> tuple:
        model = cell.generation.model.name
        return model, cell.generation.seed, cell.strategy, cell.gamma or 0, cell.hardware, cell.budget, cell.scope

    missing = [cell for cell in preset.live if not run.record(cell.id).is_file()]
    together = [list(members) for _, members in groupby(sorted(missing, key=attached), attached)]
    return [_job(cells, "live", run, alone=cells[0].scope != VIRTUAL, online=True) for cells in together]


def shape_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """The shapes not done yet, all of one made model in one job: making 61 GB of experts takes longer than a cell."""

    def made(shape: SyntheticCell) -> tuple:
        return shape.model.name, shape.layers or 0, shape.shrink, shape.link

    missing = [shape for shape in preset.shapes if not run.record(shape.id).is_file()]
    together = [list(members) for _, members in groupby(sorted(missing, key=made), made)]
    return [_job(shapes, "shapes", run, alone=shapes[0].scope != VIRTUAL) for shapes in together]


def beside_jobs(preset: Preset, run: RunFolder) -> list[Job]:
    """What is measured beside shapes and not done yet, each in a process of its own: each makes a model of its own."""
    missing = [beside for beside in preset.besides if not run.record(beside.id).is_file()]
    return [_job([beside], "beside", run, alone=True) for beside in missing]


def _pieces(things: list[Any], size: int) -> list[list[Any]]:
    return [things[begin : begin + size] for begin in range(0, len(things), max(size, 1))]


def _job(
    things: Sequence[Generation | Cell | SyntheticCell | ReferenceCell],
    kind: str,
    run: RunFolder,
    about: dict[str, Any] | None = None,
    **options: Any,
) -> Job:
    """The job that does these, of one type; `about` is what else its child is told."""
    labels = {one.id: one.label for one in things}
    named = {Generation: "generations", SyntheticCell: "shapes", ReferenceCell: "besides"}.get(type(things[0]), "cells")
    return Job(
        spec={"run": str(run.path), "ids": list(labels), named: list(map(asdict, things)), **(about or {})},
        labels=labels,
        log=run.log(f"{kind}-{next(iter(labels))}"),
        **options,
    )


def put_damaged_aside(preset: Preset, run: RunFolder) -> Iterator[Path]:
    """Rename what is not as it was written, so that it is done again; tells the new names."""
    for cell in preset.cells:
        path = run.record(cell.id)
        if path.exists() and not sound(path):
            yield path.replace(path.with_suffix(".damaged"))
    for generation in preset.generations:
        path = run.answers(generation.id)
        if path.exists() and not (sound(path) and _unpacks(run.trace(generation.id))):
            yield path.replace(path.with_suffix(".damaged"))


def _unpacks(path: Path) -> bool:
    """Whether every member of a zip file has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def work(job: Job) -> list[Finished]:
    """Run one child process to its end, on whichever machine this is. What it left undone has a reason."""

    def undone(why: str, seconds: float = 0.0) -> Finished:
        return Finished("", "", seconds, why)

    said, log_tail, begun = b"", None, time.monotonic()
    if not Path(job.spec["run"]).is_dir():
        rest = undone(f"{platform.node()} sees no folder {job.spec['run']}; put the run where every machine can see it")
    elif job.needs is not None and not job.needs.is_file():
        rest = undone(f"the live run it is timed from failed ({job.needs.name} is missing)")
    else:
        job.log.parent.mkdir(exist_ok=True)
        # The child ends when its standard input does, so that stays open for as long as this process lives.
        with (
            job.log.open("wb") as log,
            suppress(BrokenPipeError),
            subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "suites.run.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **job.settings},
            ) as child,
        ):
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(job.spec).encode() + b"\n")
            child.stdin.flush()
            said = child.stdout.read()
        rest = undone(ending(child.returncode), time.monotonic() - begun)
        log_tail = job.log.read_text(errors="replace")[-TAIL:] or None
    told = [Finished(**json.loads(line)) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]
    told += [replace(rest, id=name, label=job.labels[name]) for name in job.labels.keys() - {one.id for one in told}]
    return [one if one.error is None or one.log_tail else replace(one, log_tail=log_tail) for one in told]
