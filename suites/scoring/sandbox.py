"""The sandbox: Python that a model wrote runs against tests in child processes that can do little else.

A program may compute, import the standard library and read files. It gets an empty environment and a temporary folder
of its own, and it may not write outside that folder, open a socket, start or signal a process, use more than its
processor time, memory and file size, or say itself that it passed. Its output goes nowhere.

Two guards stand behind each other: an audit hook in the child's interpreter, on any Unix, and on Linux the kernel's
own seccomp and Landlock where it has them. This stops accidents of generated code. It is not a jail for an attacker:
a program shares its process with its tests, so one written to deceive them can, and files are readable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mobile.errors import Refused

WORKER = Path(__file__).with_name("sandbox_worker.py")
PASSED = "passed"


@dataclass(frozen=True)
class Outcome:
    """`reason` is "passed", or what went wrong and in which line of the tests."""

    passed: bool
    reason: str


def run_tests(program: str, tests: str, seconds: int = 3, memory_mb: int = 256) -> Outcome:
    """Run `tests` after `program`, with its names; they pass if they raise nothing. See `run_all`."""
    return run_all([(program, tests)], seconds, memory_mb)[0]


def run_all(pairs: Sequence[tuple[str, str]], seconds: int = 3, memory_mb: int = 256) -> list[Outcome]:
    """Return an outcome for every (program, tests), in order, as many at a time as there are cores.

    `seconds` are of processor time, so that a busy machine changes no outcome; four times as many may pass on the
    clock. `memory_mb` is address space, the interpreter's 30 MB included. Hashes and `random` are seeded: the same
    program has the same outcome. Raise SyntaxError for tests that do not compile, Refused where there is no fork.
    """
    if os.name != "posix":
        raise Refused("Running generated code needs a Unix (it forks and sets limits); leave the code tasks out.")
    for _, tests in pairs:
        compile(tests, "<tests>", "exec", dont_inherit=True)
    workers = max(1, min(os.cpu_count() or 1, len(pairs)))
    shares = [range(first, len(pairs), workers) for first in range(workers)]
    outcomes: dict[int, Outcome] = {}

    def work(share: range) -> None:
        with TemporaryDirectory(prefix="sandbox-") as folder:
            command = [sys.executable, "-P", "-s", "-S", "-X", "utf8", str(WORKER), folder]
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            ) as worker:
                assert worker.stdin is not None
                assert worker.stdout is not None
                try:
                    for index in share:
                        program, tests = pairs[index]
                        job = {"program": program, "tests": tests, "seconds": seconds, "memory_mb": memory_mb}
                        print(json.dumps(job), file=worker.stdin, flush=True)
                        line = worker.stdout.readline()
                        if not line:
                            raise RuntimeError(f"the sandbox ended with code {worker.wait()} before program {index}")
                        outcomes[index] = Outcome(**json.loads(line))
                finally:
                    worker.stdin.close()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, shares))
    return [outcomes[index] for index in range(len(pairs))]
