"""One child process of a run: some live runs of a model, or the timing of cells that share one live run or model.

Reads its job as a line of JSON on standard input and answers on standard output with a line of JSON for each thing
done; all else that is printed goes to standard error. When its standard input ends, so does it: whoever started it is
gone, and nobody must go on writing into a run folder that another run may have taken over.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from mobile.replay import trace
from suites.environment import environment
from suites.measure.replayed import Trace, cell_from, generation_from, time_cell
from suites.plan.cells import Cell, Generation
from suites.record import Finished, RunFolder, sound
from suites.synthetic.cells import SyntheticCell, shape_from
from suites.synthetic.reference_cells import ReferenceCell, beside_from

TAIL = 4000  # characters of a log that a failure keeps
UNLIKE = (
    "the code, packages, task or model files here are not those that the run was planned with; "
    "make them the same on every machine and run the same command again"
)


def attempt(name: str, label: str, action: Callable[[], Any]) -> Finished:
    """Do one thing; an exception's traceback goes to the log and, its end, into the answer."""
    begun = time.monotonic()
    try:
        action()
    except Exception as error:
        with suppress(OSError):  # the log's disk may be what is full
            traceback.print_exc()
        told = traceback.format_exc()[-TAIL:]
        return Finished(name, label, time.monotonic() - begun, f"{type(error).__name__}: {error}", told)
    return Finished(name, label, time.monotonic() - begun)


def with_what(load: Callable[[], Any], do: Callable[[Any, Any], Finished]) -> Callable[[Any], Finished]:
    """`do` with what `load` gives, which is loaded once, now; where that fails, every cell fails as it did."""
    held: list[Any] = []
    opened = attempt("", "", lambda: held.append(load()))
    return lambda cell: do(cell, held[0]) if held else replace(opened, id=cell.id, label=cell.label, seconds=0.0)


def apart(cell: Cell, run: RunFolder, recorded: Trace) -> Finished:
    """Time one cell in a process of its own, which shares the loaded trace where the system can fork."""
    ways = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in ways else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_timed, args=(cell, run, recorded, theirs))
    begun = time.monotonic()
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        child.join()
        return Finished(cell.id, cell.label, time.monotonic() - begun, ending(child.exitcode))
    finally:
        child.join()


def _timed(cell: Cell, run: RunFolder, recorded: Trace, answer: Any) -> None:
    end_after(multiprocessing.parent_process().join)  # type: ignore[union-attr]
    answer.send(attempt(cell.id, cell.label, lambda: time_cell(cell, run, recorded).save(run.record(cell.id))))


def ending(code: int | None) -> str:
    """What became of a process that ended without an answer."""
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
    """The line on standard input. Unbuffered: a thread that waits in a buffer's lock would hold it in every fork."""
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 2**16)
        if not more:
            sys.exit("no job on standard input")
        line += more
    return json.loads(line)


def main() -> None:
    job = read_job()
    end_after(partial(os.read, 0, 1))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = RunFolder(Path(job["run"]))

    def say(done: Finished) -> None:
        print(json.dumps(asdict(done)), file=answers, flush=True)

    def undone(name: str, one: Generation | Cell | SyntheticCell | ReferenceCell, left_behind: Path) -> bool:
        """Whether it is to be done here; otherwise says why not."""
        if one.id != name:
            say(Finished(name, one.label, 0.0, UNLIKE))
            return False
        if sound(left_behind):  # by a machine that was lost before it could say so
            say(Finished(name, one.label, 0.0))
            return False
        return True

    do: Callable[[Any], Finished]
    left_behind: Callable[[str], Path]
    things: list[Any]
    if "generations" in job:
        from suites.measure import generate

        things, left_behind = list(map(generation_from, job["generations"])), run.answers

        def answered(one: Generation) -> Finished:
            return attempt(one.id, one.label, partial(generate.run, one, run, job["hardware"]))

        do = answered
    elif "besides" in job:
        from suites.synthetic import reference

        things, left_behind = list(map(beside_from, job["besides"])), run.record

        def measured(beside: ReferenceCell) -> Finished:
            return attempt(beside.id, beside.label, partial(reference.save, beside, run))

        do = measured
    elif "shapes" in job:
        from suites.synthetic import timing

        things, left_behind = list(map(shape_from, job["shapes"])), run.record
        do = with_what(
            partial(timing.load, things[0]),
            lambda shape, held: attempt(shape.id, shape.label, partial(timing.save, shape, held, run)),
        )
    else:
        things, left_behind = list(map(cell_from, job["cells"])), run.record
        first = things[0]
        if first.link is not None:
            from suites.measure import live

            do = with_what(
                partial(live.load, first),
                lambda cell, held: attempt(cell.id, cell.label, partial(live.save, cell, held, run)),
            )
        else:
            environment()  # once, for every fork
            do = with_what(
                partial(trace.load, run.trace(first.generation.id)), lambda cell, held: apart(cell, run, held)
            )
    for name, one in zip(job["ids"], things, strict=True):
        if undone(name, one, left_behind(name)):
            say(do(one))


if __name__ == "__main__":
    main()
