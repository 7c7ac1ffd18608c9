"""The server: it forks two children for each program, one that runs it and one that tests it, and ends them both.

Standard library only, so that it starts fast and its children have nothing of ours to reach. It reads a JSON list a
line, a `Job`, and answers each with a reason; its first line says that it is ready, or which walls are missing. The
tests come on another pipe, which only the child that runs them reads: whatever is in the memory of this process,
programs can look for.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import NamedTuple, NoReturn

from suites.scoring.sandbox import audit_hook, program, tester, walls
from suites.scoring.sandbox.values import receive, send

PRELOADED = (
    "bisect collections copy datetime decimal fractions functools hashlib heapq itertools math operator re statistics "
    "string typing"
)
FILE_NBYTES, DESCRIPTORS = 2**20, 32
FOLDER_NBYTES, FOLDER_ENTRIES = 2**25, 1000
LOOK_SECONDS = 0.02  # between two looks at what a program has written
WALL_SECONDS_PER_CPU_SECOND = 4  # a busy machine must not turn a right answer into a wrong one
MOST_TESTS, MOST_REASON, MOST_VERDICT = 2**26, 500, 4096  # bytes, characters, bytes
TOO_LONG = f"time limit: still there after {WALL_SECONDS_PER_CPU_SECOND} times its seconds"
BEGUN = "begun"  # the first message of a child


class Job(NamedTuple):
    """A program, the name of its function, and the limits of each of its two processes."""

    source: str
    function: str
    seconds: int
    memory_mb: int


class Pipe(NamedTuple):
    """The two ends of a pipe."""

    reads: int
    writes: int


# --- the children --------------------------------------------------------------------------------------


def _child(
    job: Job, folder: str, around: walls.Walls | None, keep: list[int], work: Callable[[Callable], None]
) -> NoReturn:
    """Confine this process, which keeps the descriptors `keep` and no others; then do the work, and exit."""
    leave = os._exit  # the program may replace it in `os`
    try:
        os.setsid()
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        first = 3
        for number in sorted([*keep, *(() if around is None else (around.rules,))]):
            os.closerange(first, number)
            first = number + 1
        os.closerange(first, 256)
        _limit(job, threads=around is not None)  # before the walls, which keep limits as they are
        if around is not None:
            around.put_up()
        for name in [name for name in sys.modules if name.partition(".")[0] in audit_hook.HIDDEN]:
            del sys.modules[name]
        os.environ.clear()
        random.seed(0)
        work(audit_hook.put_on(folder))
    finally:
        leave(0)


def _limit(job: Job, *, threads: bool) -> None:
    limits = [
        (resource.RLIMIT_CPU, job.seconds, job.seconds + 1),  # the first is a signal that a program may catch
        (resource.RLIMIT_AS, job.memory_mb * 2**20, job.memory_mb * 2**20),
        (resource.RLIMIT_FSIZE, FILE_NBYTES, FILE_NBYTES),
        (resource.RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    if not threads:  # it counts them like processes, and does not bind root
        limits.append((resource.RLIMIT_NPROC, 0, 0))
    for limit, soft, hard in limits:
        resource.setrlimit(limit, (soft, hard))


# --- one program ---------------------------------------------------------------------------------------


def judge(job: Job, folder: str, around: walls.Walls | None, tests: int) -> str:
    """Run one program in a child and its tests, which the pipe `tests` brings, in another; return the reason.

    Raise RuntimeError if a child could not be set up.
    """
    os.mkdir(folder)
    calls, answers, verdicts = Pipe(*os.pipe()), Pipe(*os.pipe()), Pipe(*os.pipe())

    def run_program(refused: Callable[[], str | None]) -> None:
        send(answers.writes, BEGUN)
        program.serve(job.source, job.function, calls.reads, answers.writes, refused)

    def run_tests(_: Callable[[], str | None]) -> None:
        text, given = receive(tests, MOST_TESTS)
        if receive(answers.reads, MOST_VERDICT) == BEGUN:
            os.write(verdicts.writes, _line(BEGUN))
            reason = tester.verdict(text, given, job.function, calls.writes, answers.reads)
            os.write(verdicts.writes, _line(reason[:MOST_REASON]))

    tester_keeps = [tests, calls.writes, answers.reads, verdicts.writes]
    runs = _fork(lambda: _child(job, folder, around, [calls.reads, answers.writes], run_program))
    judges = _fork(lambda: _child(job, folder, around, tester_keeps, run_tests))
    for number in (*calls, *answers, verdicts.writes):
        os.close(number)
    deadline = time.monotonic() + WALL_SECONDS_PER_CPU_SECOND * job.seconds
    said, beyond = _read(verdicts.reads, folder, deadline)
    os.close(verdicts.reads)
    program_ended = _ended(runs, deadline if said[1:] == [tester.GONE] else 0.0)
    tester_ended = _ended(judges, 0.0)
    shutil.rmtree(folder, ignore_errors=True)
    if said[:1] != [BEGUN]:
        raise RuntimeError("the sandbox could not set itself up")
    if beyond is not None:
        return beyond
    if said[1:] and said[1] != tester.GONE:
        return said[1]
    return _why(program_ended if said[1:] else tester_ended, job.seconds)


def _fork(work: Callable[[], NoReturn]) -> int:
    pid = os.fork()
    if pid == 0:
        work()
    return pid


def _line(text: str) -> bytes:
    return json.dumps(text).encode() + b"\n"


def _read(pipe: int, folder: str, deadline: float) -> tuple[list[str], str | None]:
    """Return the lines that come on the pipe, and which limit was passed before the pipe's end, if any."""
    data, beyond = b"", None
    while beyond is None and len(data) <= MOST_VERDICT:
        if select.select([pipe], [], [], LOOK_SECONDS)[0]:
            part = os.read(pipe, MOST_VERDICT)
            if not part:
                break
            data += part
        elif time.monotonic() >= deadline:
            beyond = TOO_LONG
        elif _too_much(folder):
            beyond = f"disk limit: more than {FOLDER_NBYTES >> 20} MiB or {FOLDER_ENTRIES} files were written"
    with suppress(ValueError):
        return [str(json.loads(line)) for line in data.split(b"\n")[:-1]], beyond
    return [], beyond


def _too_much(folder: str) -> bool:
    """Return whether the files in the folder, however deep, are too many or too large."""
    nbytes = entries = 0
    for place, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        with suppress(OSError):
            nbytes += sum(os.lstat(os.path.join(place, name)).st_blocks * 512 for name in files)
        if entries > FOLDER_ENTRIES or nbytes > FOLDER_NBYTES:
            return True
    return False


def _ended(pid: int, deadline: float) -> int | None:
    """Return how the child ended, before the deadline; None if it had to be killed."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() >= deadline:
            break
        time.sleep(0.0005)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _why(status: int | None, seconds: int) -> str:
    """Return why a child that ended so gave no verdict."""
    if status is None:
        return TOO_LONG
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return f"time limit: {seconds} s of computing were not enough"
    if os.WIFSIGNALED(status):
        return f"crashed: {signal.Signals(os.WTERMSIG(status)).name}"
    return "ended: the process left before its tests were done"


def main() -> None:
    """Judge the jobs on standard input. Arguments: a folder, the tests' pipe, and "yes" if walls may be missing."""
    folder, tests, walls_optional = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "yes"
    lacks = walls.missing()
    if lacks is not None and not walls_optional:
        print(json.dumps({"lacks": lacks}), flush=True)
        return
    around = None if lacks is not None else walls.Walls(folder)
    for name in PRELOADED.split():
        import_module(name)
    print(json.dumps({"lacks": None}), flush=True)
    for number, line in enumerate(sys.stdin):
        reason = judge(Job(*json.loads(line)), os.path.join(folder, str(number)), around, tests)
        print(json.dumps({"reason": reason}), flush=True)
