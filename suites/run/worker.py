"""One worker process of a run: it does the pieces of work of one job, which are of one kind.

It reads its job as a line of JSON on standard input and answers on standard output with a line of JSON for each piece
done; all else that is printed goes to standard error. It ends when its standard input does: whoever started it is
gone, and no process of theirs may write into a run folder that another run may have taken over.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from mobile.errors import OutOfReach
from suites.record import Finished, RunFolder
from suites.run.work import KINDS, Work
from suites.scoring.sandbox.run import walls_optional

LOG_TAIL_CHARACTERS = 4000  # of a log, that a failure keeps
NOT_AS_PLANNED = (
    "the code, packages, task or model files here are not those that the run was planned with; "
    "make them the same on every machine and run the same command again"
)


def attempt(name: str, label: str, action: Callable[[], Any]) -> Finished:
    """Call `action`. The traceback of an exception goes to the log, and its end into what is returned.

    One that says that this machine is too small for the piece is no failure, and has no traceback.
    """
    begun = time.monotonic()
    try:
        action()
    except OutOfReach as beyond:
        return Finished(name, label, time.monotonic() - begun, str(beyond), left_out=True)
    except Exception as error:
        with suppress(OSError):  # the log's disk may be what is full
            traceback.print_exc()
        log_tail = traceback.format_exc()[-LOG_TAIL_CHARACTERS:]
        return Finished(name, label, time.monotonic() - begun, f"{type(error).__name__}: {error}", log_tail)
    return Finished(name, label, time.monotonic() - begun)


def measuring(pieces: Sequence[Work], run: RunFolder) -> Callable[[Work], Finished]:
    """Return what measures a piece of a job, having loaded what it shares with those that come before and after it.

    Where loading fails, each of them fails so.
    """
    kind = KINDS[pieces[0].kind]
    measurer, measure = kind.measurer(), in_fork if kind.forked else measure_here
    loaded: dict[tuple, tuple[Finished, Any]] = {}

    def load(key: tuple) -> tuple[Finished, Any]:
        found: list[Any] = []
        alike = [piece for piece in pieces if piece.shared == key]
        loading = attempt("", "", lambda: found.append(measurer.load(alike, run)))
        return loading, found[0] if found else None

    def loading_first(piece: Work) -> Finished:
        if piece.shared not in loaded:
            loaded.clear()  # what pieces before shared is not kept
            loaded[piece.shared] = load(piece.shared)
        loading, shared = loaded[piece.shared]
        if loading.error is not None:
            return replace(loading, id=piece.id, label=piece.label, seconds=0.0)
        return measure(piece, shared, run)

    return loading_first


def measure_here(piece: Work, loaded: Any, run: RunFolder) -> Finished:
    """Measure one piece in this process."""
    measurer = KINDS[piece.kind].measurer()
    return attempt(piece.id, piece.label, partial(measurer.measure, piece, loaded, run))


def in_fork(piece: Work, loaded: Any, run: RunFolder) -> Finished:
    """Measure one piece in a process of its own, which shares what is loaded where the system can fork."""
    ways = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in ways else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(piece, loaded, run, theirs))
    begun = time.monotonic()
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        child.join()
        return Finished(piece.id, piece.label, time.monotonic() - begun, ending(child.exitcode))
    finally:
        child.join()


def _answer(piece: Work, loaded: Any, run: RunFolder, pipe: Any) -> None:
    end_after(multiprocessing.parent_process().join)  # type: ignore[union-attr]
    pipe.send(measure_here(piece, loaded, run))


def ending(code: int | None) -> str:
    """Return what became of a process that ended without an answer."""
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name} (SIGKILL may mean that memory ran out)"
    return f"its process ended with code {code} and said nothing"


def end_after(wait: Callable[[], Any]) -> None:
    """End this process, whatever it is doing, once `wait` returns."""

    def watch() -> None:
        wait()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def read_job() -> dict[str, Any]:
    """Read the line on standard input.

    It is not buffered: a thread that waits in a buffer's lock would hold that lock in every fork.
    """
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 2**16)
        if not more:
            sys.exit("no job on standard input")
        line += more
    return json.loads(line)


def main() -> None:
    """Do the pieces of the job on standard input, in order, and answer for each."""
    job = read_job()
    end_after(partial(os.read, 0, 1))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # from here on, whatever a library prints goes to the log
    run = RunFolder(Path(job["run"]))
    pieces = [KINDS[job["kind"]].read(fields) for fields in job["pieces"]]
    walls_optional.set(job["walls_optional"])
    measure = measuring(pieces, run)
    for name, piece in zip(job["ids"], pieces, strict=True):
        if piece.id != name:
            done = Finished(name, piece.label, 0.0, NOT_AS_PLANNED)
        elif piece.intact(run):  # by a machine that was lost before it could say so
            done = Finished(name, piece.label, 0.0)
        else:
            done = measure(piece)
        print(json.dumps(asdict(done)), file=answers, flush=True)


if __name__ == "__main__":
    main()
