"""The server: it forks two children for each program, one that runs it and one that tests it, and ends them both.

Standard library only, so that it starts fast and its children have nothing of ours to reach. It reads a JSON list a
line, a `Job`, and answers each with a reason and the number of the line of the tests where it ended, or null; its first
line says that it is ready, or which walls are missing. The tests come on another pipe, which only the child that runs
them reads, and no text of them comes back: whatever is in the memory of this process, programs can look for.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from suites.scoring.sandbox import audit_hook, program, tester, walls
from suites.scoring.sandbox.folder import TOO_MUCH, holds_too_much, remove
from suites.scoring.sandbox.values import receive, send

PRELOADED = (
    "bisect collections copy datetime decimal fractions functools hashlib heapq itertools math operator re statistics "
    "string typing"
)
FILE_NBYTES, DESCRIPTORS = 2**20, 32
THREADS = 100
LOOK_SECONDS = 0.02  # between two looks at what a program has made
WALL_SECONDS_PER_CPU_SECOND = 4  # a busy machine must not turn a right answer into a wrong one
MOST_TESTS, MOST_REASON, MOST_VERDICT = 2**26, 500, 4096  # bytes, characters, bytes
TOO_LONG = f"time limit: still there after {WALL_SECONDS_PER_CPU_SECOND} times its seconds"
TOO_MANY = f"thread limit: more than {THREADS} threads were started"
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


def judge(job: Job, folder: str, tests: int, *, walled: bool) -> tuple[str, int | None]:
    """Run one program in a child and its tests, which the pipe `tests` brings, in another.

    Return the reason, and the number of the line of the tests where they ended. The program begins when its tests have
    been read: it cannot end them earlier, which would leave them to the next. Raise RuntimeError if a child could not
    be set up.
    """
    os.mkdir(folder)
    around = walls.Walls(folder) if walled else None
    calls, answers, verdicts = Pipe(*os.pipe()), Pipe(*os.pipe()), Pipe(*os.pipe())

    def run_program(refused: Callable[[], str | None]) -> None:
        send(answers.writes, BEGUN)
        receive(calls.reads, MOST_VERDICT)
        program.serve(job.source, job.function, calls.reads, answers.writes, refused)

    def run_tests(_: Callable[[], str | None]) -> None:
        text, given = receive(tests, MOST_TESTS)
        if receive(answers.reads, MOST_VERDICT) == BEGUN:
            os.write(verdicts.writes, _line(BEGUN))
            send(calls.writes, BEGUN)
            reason, line = tester.verdict(text, given, job.function, calls.writes, answers.reads)
            os.write(verdicts.writes, _line([reason[:MOST_REASON], line]))

    tester_keeps = [tests, calls.writes, answers.reads, verdicts.writes]
    runs = _fork(lambda: _child(job, folder, around, [calls.reads, answers.writes], run_program))
    judges = _fork(lambda: _child(job, folder, around, tester_keeps, run_tests))
    for number in (*calls, *answers, verdicts.writes, *(() if around is None else (around.rules,))):
        os.close(number)
    deadline = time.monotonic() + WALL_SECONDS_PER_CPU_SECOND * job.seconds
    said, beyond = _read(verdicts.reads, folder, runs, deadline)
    os.close(verdicts.reads)
    gone = said[1:] == [[tester.GONE, None]]
    program_ended = _ended(runs, deadline if gone else 0.0)
    tester_ended = _ended(judges, 0.0)
    if beyond is None and holds_too_much(folder):
        beyond = TOO_MUCH
    with suppress(OSError):
        remove(folder)
    if said[:1] != [BEGUN]:
        raise RuntimeError("the sandbox could not set itself up")
    if beyond is not None:
        return beyond, None
    if len(said) == 2 and isinstance(said[1], list) and not gone:
        reason, line = said[1]
        return reason, line
    return _why(program_ended if gone else tester_ended, job.seconds), None


def _fork(work: Callable[[], NoReturn]) -> int:
    pid = os.fork()
    if pid == 0:
        work()
    return pid


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read(pipe: int, folder: str, pid: int, deadline: float) -> tuple[list[Any], str | None]:
    """Return what comes on the pipe, a line each, and which limit the program `pid` passed before its end, if any."""
    data, beyond = b"", None
    while beyond is None and len(data) <= MOST_VERDICT:
        if select.select([pipe], [], [], LOOK_SECONDS)[0]:
            part = os.read(pipe, MOST_VERDICT)
            if not part:
                break
            data += part
        elif time.monotonic() >= deadline:
            beyond = TOO_LONG
        elif holds_too_much(folder):
            beyond = TOO_MUCH
        elif _threads(pid) > THREADS:
            beyond = TOO_MANY
    with suppress(ValueError):
        return [json.loads(line) for line in data.split(b"\n")[:-1]], beyond
    return [], beyond


def _threads(pid: int) -> int:
    """Return how many threads a process has; 0 where that is not to be seen."""
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/task").st_nlink - 2  # a folder each, and two of its own
    return 0


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
    folder, given, walls_optional = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "yes"
    tests = os.dup(given)  # at the lowest free number: children close all of the low ones that they do not keep
    os.close(given)
    lacks = walls.missing()
    if lacks is not None and not walls_optional:
        print(json.dumps({"lacks": lacks}), flush=True)
        return
    for name in PRELOADED.split():
        import_module(name)
    print(json.dumps({"lacks": None}), flush=True)
    for number, line in enumerate(sys.stdin):
        job, place = Job(*json.loads(line)), os.path.join(folder, str(number))
        reason, where = judge(job, place, tests, walled=lacks is None)
        print(json.dumps({"reason": reason, "line": where}), flush=True)
