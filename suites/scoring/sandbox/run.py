"""The way into the sandbox: programs and their tests go in, outcomes come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from mobile.errors import Refused
from suites.scoring.sandbox import walls
from suites.scoring.sandbox.folder import remove
from suites.scoring.sandbox.server import MOST_REASON
from suites.scoring.sandbox.tester import PASSED
from suites.scoring.sandbox.values import send

ROOT = Path(__file__).parents[3]
START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from suites.scoring.sandbox.server import main; "
    "del sys.path[0]; main()"
)
TRIES = 2  # a server that was killed beside a program, as by a system short of memory, gets another try

# Whether programs may run where the kernel has no walls: then only Python's own hook and limits hold them.
walls_optional: ContextVar[bool] = ContextVar("walls_optional", default=False)


@dataclass(frozen=True)
class Submission:
    """A program, the name of the function in it that is tested, and tests that call it.

    `given` is run before the tests and not with the program: the tests may use its names.
    """

    program: str
    function: str
    tests: str
    given: str = ""


@dataclass(frozen=True)
class Outcome:
    """`reason` is "passed", or what went wrong and in which line of the tests."""

    passed: bool
    reason: str


def check_walls() -> None:
    """Raise Refused if the kernel of this machine lacks a wall, unless `walls_optional` is set."""
    _refuse_without_walls(None if walls_optional.get() else walls.missing())


def _refuse_without_walls(lacks: str | None) -> None:
    if lacks is not None:
        raise Refused(
            f"Written programs cannot be confined here: {lacks}. Leave the code tasks out, or allow them to run "
            "all the same with --without-kernel-walls, if nothing on this machine needs protection."
        )


def run_tests(submission: Submission, seconds: int = 3, memory_mb: int = 256) -> Outcome:
    """Return the outcome of one program. See `run_all`."""
    return run_all([submission], seconds, memory_mb)[0]


def run_all(submissions: Sequence[Submission], seconds: int = 3, memory_mb: int = 256) -> list[Outcome]:
    """Return an outcome for each, in order, as many at a time as there are cores. Tests pass if they raise nothing.

    `seconds` are of processor time, for the program and for its tests, so that a busy machine changes no outcome; four
    times as many may pass on the clock. `memory_mb` is address space of each process, the interpreter's 30 MB included.
    Hashes and `random` are seeded: the same program has the same outcome. Raise SyntaxError for tests that do not
    compile, Refused where there is no fork, or where the kernel lacks a wall (unless `walls_optional` is set).
    """
    if os.name != "posix":
        raise Refused("Running generated code needs a Unix (it forks and sets limits); leave the code tasks out.")
    for text in (text for one in submissions for text in (one.given, one.tests)):
        _check_compiles(text)
    workers = max(1, min(os.cpu_count() or 1, len(submissions)))
    shares = [range(first, len(submissions), workers) for first in range(workers)]
    outcomes: dict[int, Outcome] = {}

    def work(share: range) -> None:
        left = list(share)
        tries = 0
        while left:
            try:
                with _server() as (server, tests):
                    while left:
                        outcomes[left[0]] = _judge(server, tests, submissions[left[0]], seconds, memory_mb)
                        left, tries = left[1:], 0
            except (EOFError, BrokenPipeError):
                tries += 1
                if tries == TRIES:
                    outcomes[left[0]] = Outcome(False, f"crashed: {TRIES} times, the sandbox ended with the program")
                    left, tries = left[1:], 0

    with ThreadPoolExecutor(workers) as pool:
        contexts = [copy_context() for _ in shares]
        list(pool.map(lambda context, share: context.run(work, share), contexts, shares))
    return [outcomes[index] for index in range(len(submissions))]


def _check_compiles(text: str) -> None:
    """Raise SyntaxError for a text that is no Python, whatever about it is wrong."""
    try:
        compile(text, "<tests>", "exec", dont_inherit=True)
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise SyntaxError(f"tests that do not compile: {error}") from error


@contextmanager
def _server() -> Iterator[tuple[subprocess.Popen, int]]:
    """Yield a server that is ready, and the pipe that brings it tests. Raise Refused if the kernel lacks a wall."""
    reads, writes = os.pipe()
    folder = mkdtemp(prefix="sandbox-")
    arguments = [str(ROOT), folder, str(reads), "yes" if walls_optional.get() else "no"]
    try:
        server = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
            pass_fds=(reads,),
        )
        os.close(reads)
        try:
            _refuse_without_walls(_answer(server)["lacks"])
            yield server, writes
        finally:
            os.close(writes)
            with server:
                pass
    finally:
        remove(folder)


def _judge(server: subprocess.Popen, tests: int, one: Submission, seconds: int, memory_mb: int) -> Outcome:
    assert server.stdin is not None
    print(json.dumps([one.program, one.function, seconds, memory_mb]), file=server.stdin, flush=True)
    send(tests, [one.tests, one.given])
    answer = _answer(server)
    reason, line = answer["reason"], answer["line"]
    if line is not None:
        lines = one.tests.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        reason = f"{reason} at {lines[line - 1].strip()!r}"[:MOST_REASON]
    return Outcome(reason == PASSED, reason)


def _answer(server: subprocess.Popen) -> dict:
    """Return the server's next answer. Raise RuntimeError if it says that it cannot go on, EOFError if it is gone."""
    assert server.stdout is not None
    line = server.stdout.readline()
    if line:
        return json.loads(line)
    code = server.wait()
    if code < 0:
        raise EOFError
    raise RuntimeError(f"the sandbox ended with code {code}; what it printed says why")
