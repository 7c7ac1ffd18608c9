"""Jobs of a run: some pieces of work each, done by a worker process that leaves files behind."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from suites.record import VIRTUAL, Finished, RunFolder
from suites.run.work import Work, batches
from suites.run.worker import LOG_TAIL_CHARACTERS, ending
from suites.scoring.sandbox.run import walls_optional

QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Whatever the surroundings: Transformers reads docstrings, which -OO drops; lm-eval reads files as the locale says.
ALIKE = {"PYTHONOPTIMIZE": "", "PYTHONUTF8": "1"}


@dataclass(frozen=True)
class Job:
    """One worker process: the JSON that it reads on standard input, and by its id the label of each piece it does.

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
        """Return the environment variables of its process; the one that is alone may use all cores."""
        return {**ALIKE, **({} if self.alone else QUIET), **({} if self.online else OFFLINE)}


def jobs(pieces: Sequence[Work], run: RunFolder) -> list[Job]:
    """Return the jobs of the pieces that have no output yet, kind by kind."""
    return [_job(batch, run) for batch in batches(pieces, run)]


def _job(batch: Sequence[Work], run: RunFolder) -> Job:
    """Return the job that does these pieces, which are of one kind."""
    first, labels = batch[0], {piece.id: piece.label for piece in batch}
    fields = [asdict(cast(Any, piece)) for piece in batch]
    return Job(
        spec={
            "run": str(run.path),
            "kind": first.kind,
            "ids": list(labels),
            "pieces": fields,
            "walls_optional": walls_optional.get(),
        },
        labels=labels,
        log=run.log(f"{first.kind}-{first.id}"),
        needs=first.needs(run),
        alone=first.scope != VIRTUAL,
        online=any(piece.online for piece in batch),
    )


def put_damaged_aside(pieces: Iterable[Work], run: RunFolder) -> Iterator[Path]:
    """Rename outputs that are not as they were written, so that they are made again. Yield the new names."""
    for piece in pieces:
        path = piece.output(run)
        if path.exists() and not piece.intact(run):
            aside, number = path.with_suffix(".damaged"), 1
            while aside.is_dir() or (path.is_dir() and aside.exists()):  # what a folder cannot replace, nor be replaced
                number += 1
                aside = path.with_suffix(f".damaged-{number}")
            yield path.replace(aside)


def do(job: Job) -> list[Finished]:
    """Run one worker process to its end, on whichever machine this is. A piece that it left undone has a reason."""
    answered, log_tail, seconds = b"", None, 0.0
    # 1. Refuse a job whose folder or input is not there.
    if not Path(job.spec["run"]).is_dir():
        why = f"{platform.node()} sees no folder {job.spec['run']}; put the run where every machine can see it"
    elif job.needs is not None and not job.needs.is_file():
        why = f"the live run it is timed from failed ({job.needs.name} is missing)"
    else:
        # 2. Start the worker and read its answers until it ends. It ends when its standard input does, so that stays
        # open for as long as this process lives.
        job.log.parent.mkdir(exist_ok=True)
        begun = time.monotonic()
        with (
            job.log.open("wb") as log,
            suppress(BrokenPipeError),
            subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "suites.run.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **job.settings},
            ) as worker,
        ):
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(json.dumps(job.spec).encode() + b"\n")
            worker.stdin.flush()
            answered = worker.stdout.read()
        why, seconds = ending(worker.returncode), time.monotonic() - begun
        log_tail = job.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:] or None
    # 3. Take its whole lines; a piece without one failed as the worker did.
    done = [Finished(**json.loads(line)) for line in answered.splitlines(keepends=True) if line.endswith(b"\n")]
    undone = job.labels.keys() - {one.id for one in done}
    done += [Finished(name, job.labels[name], seconds, why) for name in undone]
    return [replace(one, log_tail=one.log_tail or log_tail) if one.failed else one for one in done]
