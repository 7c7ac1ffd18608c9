"""Judges programs that a model wrote, one forked child each. A script: `sandbox` starts it and talks to it.

Reads a JSON object a line (`program`, `tests`, `seconds`, `memory_mb`) and answers each with `passed` and `reason`.
Standard library only, so that it starts fast and a child has nothing of ours to reach.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module

PRELOADED = (
    "bisect collections copy datetime decimal fractions functools hashlib heapq itertools math operator re statistics "
    "string typing"
)
FILE_NBYTES, FILES = 2**20, 32
WALL_SECONDS_PER_CPU_SECOND = 4  # a busy machine must not turn a right answer into a wrong one
LONGEST_REASON = 500

# Audit events (a table in Python's documentation) of what no program under test may do, whatever it is about ...
REFUSED = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "fcntl.",
    "pty.",
    "syslog.",
    "resource.setrlimit",
    "resource.prlimit",
    "signal.pthread_kill",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.putenv",
    "gc.get_",
    "sys.settrace",
    "sys.setprofile",
    "sys._current_frames",
)
# ... and of what it may do inside its folder only.
CONFINED = (
    "os.chflags",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.lockf",
    "os.mkdir",
    "os.remove",
    "os.removexattr",
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.symlink",
    "os.truncate",
    "os.utime",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HIDDEN = ("ctypes", "_ctypes", "_xxsubinterpreters", "_interpreters")


# --- the child ---------------------------------------------------------------------------------------


def _refuse_by_hook(folder: str) -> None:
    """Make Python itself refuse from here on; an audit hook cannot be taken off again."""
    inside = os.path.realpath(folder)
    real, text, prefix = os.path.realpath, os.fsdecode, inside + os.sep

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not (flags or 0) & WRITING:
                return
            paths = [path]
        elif event == "import":
            if args[0].partition(".")[0] in HIDDEN:
                raise PermissionError(f"the sandbox refuses to import {args[0]}")
            return
        elif event.startswith(REFUSED):
            raise PermissionError(f"the sandbox refuses {event}")
        elif event in CONFINED:
            paths = [value for value in args if isinstance(value, str | bytes | os.PathLike)]
        else:
            return
        for path in paths:
            if not (real(text(path)) + os.sep).startswith(prefix):
                raise PermissionError(f"the sandbox refuses {event} outside its folder")

    sys.addaudithook(hook)


def _limit(seconds: int, memory_mb: int, *, threads: bool) -> None:
    limits = [
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # the first is a signal that a program may catch
        (resource.RLIMIT_AS, memory_mb * 2**20, memory_mb * 2**20),
        (resource.RLIMIT_FSIZE, FILE_NBYTES, FILE_NBYTES),
        (resource.RLIMIT_NOFILE, FILES, FILES),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    if not threads:  # it counts them like processes, and does not bind root
        limits.append((resource.RLIMIT_NPROC, 0, 0))
    for what, soft, hard in limits:
        resource.setrlimit(what, (soft, hard))


def _told(error: BaseException, tests: str) -> str:
    """Return what went wrong, and in which line of the tests."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    said = type(error).__name__
    with suppress(BaseException):
        said += f": {error}" if str(error) else ""
    return said if line is None else f"{said} at {tests.split(chr(10))[line - 1].strip()!r}"


def _verdict(program: str, tests: str) -> str:
    """Run the program and its tests here, in this process; return "passed", or why not."""
    names = {"__name__": "program"}
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), names)
    except BaseException as error:
        return f"program failed: {_told(error, tests)}"
    try:
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), names)
    except BaseException as error:
        return f"tests failed: {_told(error, tests)}"
    return "passed"


def _child(job: dict, folder: str, answer: int, seal: bytes, walls: Walls) -> None:
    """Run a job and exit. Write that it is ready, then the verdict; the seal shows that the program wrote neither."""
    write, leave = os.write, os._exit  # the program may replace those in `os`
    try:
        os.setsid()
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.closerange(3, answer)
        os.closerange(answer + 1, 256)
        _limit(job["seconds"], job["memory_mb"], threads=walls.calls)  # before the walls, which keep limits as they are
        walls.put_up(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] in HIDDEN]:
            del sys.modules[name]
        os.environ.clear()
        random.seed(0)
        _refuse_by_hook(folder)
        write(answer, seal)
        reason = _verdict(job["program"], job["tests"])
        write(answer, seal + reason[:LONGEST_REASON].encode(errors="replace"))
    finally:
        leave(0)


# --- walls of the kernel's -----------------------------------------------------------------------------

# Linux system calls that start or disturb processes, open sockets or loosen limits. clone is allowed for threads.
CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        (41, 53, 57, 58, 59, 62, 101, 160, 161, 165, 166, 200, 234, 272, 302, 308, 311, 321, 322, 424, 425),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (198, 199, 221, 129, 130, 131, 117, 164, 51, 40, 39, 97, 261, 268, 271, 280, 281, 424, 425),
    ),
}
CLONE3, CLONE_THREAD, ENOSYS, EPERM = 435, 0x10000, 38, 1
RET_ALLOW, RET_ERRNO, RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
LANDLOCK_WRITES = 1 << 1 | sum(1 << right for right in range(4, 13))  # write, remove, make
LANDLOCK_LATER = {2: 1 << 13, 3: 1 << 14}  # by version: refer (link across folders), truncate


def call_filter(machine: str) -> bytes | None:
    """Return a classic BPF program for seccomp (struct sock_filter[]), or None for a machine we have no numbers of."""
    if machine not in CALLS:
        return None
    arch, clone, refused = CALLS[machine]
    load, equal, any_bit, ret = 0x20, 0x15, 0x45, 0x06
    rows = [(load, 0, 0, 4), (equal, 1, 0, arch), (ret, 0, 0, RET_KILL), (load, 0, 0, 0)]
    rows += [(equal, 0, 1, CLONE3), (ret, 0, 0, RET_ERRNO | ENOSYS)]  # so that threads are made with clone
    for number in refused:
        rows += [(equal, 0, 1, number), (ret, 0, 0, RET_ERRNO | EPERM)]
    rows += [(0x35, 0, 1, 0x40000000), (ret, 0, 0, RET_ERRNO | EPERM)]  # the x32 calls have other numbers
    rows += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), (ret, 0, 0, RET_ERRNO | EPERM)]
    rows += [(ret, 0, 0, RET_ALLOW)]
    return b"".join(struct.pack("<HBBI", *row) for row in rows)


@dataclass(frozen=True)
class Walls:
    """`put_up(folder)` lets this process write under one folder only, and refuses the calls above if `calls`."""

    put_up: Callable[[str], None]
    calls: bool


def kernel_walls() -> Walls:
    """Return what this kernel offers.

    Landlock (Linux 5.13) and seccomp, as far as the kernel has them; a kernel without leaves the hook and the limits.
    """
    if sys.platform != "linux":
        return Walls(lambda folder: None, calls=False)
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    code = call_filter(platform.machine())
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    rights = LANDLOCK_WRITES | sum(right for since, right in LANDLOCK_LATER.items() if version >= since)
    buffer = None if code is None else ctypes.create_string_buffer(code, len(code))

    def put_up(folder: str) -> None:
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            return
        if version >= 1:
            handled = ctypes.create_string_buffer(rights.to_bytes(8, "little"), 8)
            rules = libc.syscall(LANDLOCK_CREATE, handled, ctypes.c_size_t(8), 0)
            beneath = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            rule = ctypes.create_string_buffer(rights.to_bytes(8, "little") + beneath.to_bytes(4, "little"), 12)
            libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0)
            libc.syscall(LANDLOCK_RESTRICT, rules, 0)
            os.close(beneath)
            os.close(rules)
        if buffer is not None:
            head = len(buffer) // 8
            program = ctypes.create_string_buffer(
                head.to_bytes(8, "little") + ctypes.addressof(buffer).to_bytes(8, "little"), 16
            )
            libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)

    return Walls(put_up, calls=code is not None)


# --- the judge -----------------------------------------------------------------------------------------


def judge(job: dict, folder: str, walls: Walls) -> dict:
    """Run one program and its tests in a child; kill what is left of it."""
    os.mkdir(folder)
    seal = os.urandom(16)
    reading, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(job, folder, answer, seal, walls)
    os.close(answer)
    deadline = time.monotonic() + WALL_SECONDS_PER_CPU_SECOND * job["seconds"]
    said = b"".join(_read(reading, deadline))
    os.close(reading)
    status = _wait(pid, deadline)
    shutil.rmtree(folder, ignore_errors=True)
    reason = _reason(said, seal, status, job)
    return {"passed": reason == "passed", "reason": reason}


def _read(pipe: int, deadline: float) -> Iterator[bytes]:
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(pipe, 4096)
        if not part:
            return
        yield part[: 4 * LONGEST_REASON]


def _wait(pid: int, deadline: float) -> int | None:
    """Return how the child ended; None if it had to be killed."""
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


def _reason(said: bytes, seal: bytes, status: int | None, job: dict) -> str:
    ready, _, verdict = said.partition(seal)
    if ready or seal not in said:
        raise RuntimeError("the sandbox could not set itself up")
    if verdict.startswith(seal):
        return verdict[len(seal) :].decode(errors="replace")
    if status is None:
        return f"time limit: still there after {WALL_SECONDS_PER_CPU_SECOND * job['seconds']} s"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return f"time limit: {job['seconds']} s of computing were not enough"
    if os.WIFSIGNALED(status):
        return f"crashed: {signal.Signals(os.WTERMSIG(status)).name}"
    return "ended: the process left before its tests were done"


def main() -> None:
    for name in PRELOADED.split():
        import_module(name)
    walls = kernel_walls()
    for number, line in enumerate(sys.stdin):
        outcome = judge(json.loads(line), os.path.join(sys.argv[1], str(number)), walls)
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
