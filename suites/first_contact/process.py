"""A command with a time limit: its output goes to the log as it comes, and nothing that it started outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import IO

HEAD_NBYTES, TAIL_NBYTES = 96 * 2**10, 96 * 2**10  # of one command's output, that the log keeps
MOST_LOG_NBYTES = 4 * 10**6  # beyond which it keeps no more of any
MOST_ANSWER_NBYTES = 4 * 2**20  # of standard output, that the caller gets
GRACE_SECONDS = 3.0  # between asking a command to end and ending it
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: a signal's number), whether its time was up, and its output."""

    code: int
    late: bool
    seconds: float
    answer: bytes
    last_lines: str


class Log:
    """A file that keeps the beginning of what each command says, as it comes, and the end once that is over."""

    def __init__(self, path: Path) -> None:
        """Open the file, to append to it."""
        self._file = path.open("ab", buffering=0)
        self._head, self._tail, self._left_out = 0, deque[bytes](), 0
        self._full = False
        self._lock = Lock()  # a command has two streams, a thread each

    def begin(self, title: str) -> None:
        self._full = self._file.tell() > MOST_LOG_NBYTES - HEAD_NBYTES - 2 * TAIL_NBYTES
        self._head, self._left_out = 0, 0
        self._tail.clear()
        if not self._full:
            self._file.write(f"\n===== {title}\n".encode())

    def say(self, chunk: bytes) -> None:
        with self._lock:
            if self._full:
                return
            room = HEAD_NBYTES - self._head
            if room > 0:
                self._file.write(chunk[:room])
                self._head += len(chunk[:room])
            self._tail.append(chunk[max(0, room) :])
            while sum(map(len, self._tail)) > TAIL_NBYTES + len(self._tail[0]):
                self._left_out += len(self._tail.popleft())

    def end(self) -> None:
        if self._full:
            return
        kept = b"".join(self._tail)
        if self._left_out:
            self._file.write(b"\n[... %d bytes are left out here ...]\n" % self._left_out)
        self._file.write(kept)

    def close(self) -> None:
        self._file.close()


def run(
    words: Sequence[str],
    log: Log,
    *,
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    meanwhile: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command in `folder` for at most so many seconds, and call `meanwhile` a few times a second.

    An exception of ours, Ctrl-C among them, ends the command before it goes on.
    """
    begun = time.monotonic()
    command = subprocess.Popen(
        words,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that all that it starts can be ended with it, and a Ctrl-C is ours alone
        preexec_fn=_end_with_parent if LIBC is not None else None,
    )
    answer, last = bytearray(), deque[bytes](maxlen=8)
    assert command.stdout is not None
    assert command.stderr is not None
    readers = [
        Thread(target=_read, args=(stream, log, last, kept), daemon=True)
        for stream, kept in ((command.stdout, answer), (command.stderr, None))
    ]
    for reader in readers:
        reader.start()
    late = False
    try:
        while command.poll() is None:
            late = time.monotonic() - begun > seconds
            if late:
                break
            meanwhile()
            with suppress(subprocess.TimeoutExpired):
                command.wait(POLL_SECONDS)
    finally:
        end(command)
        for reader in readers:
            reader.join(GRACE_SECONDS)
    lines = b"".join(last)[-4000:].decode(errors="replace")
    return Ended(command.returncode, late, time.monotonic() - begun, bytes(answer), lines)


def _end_with_parent() -> None:
    """Have Linux end this process when the one that started it is gone, however that ended."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # type: ignore[union-attr]


def end(command: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started: an interrupt first, if it runs, so that it may clean up."""
    if command.poll() is None:
        _signal(command, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            command.wait(GRACE_SECONDS)
    _signal(command, getattr(signal, "SIGKILL", signal.SIGTERM))
    command.wait()


def _signal(command: subprocess.Popen[bytes], which: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(command.pid, which)  # whose leader the command is
        elif command.poll() is None:
            command.terminate()


def _read(stream: IO[bytes], log: Log, last: deque[bytes], answer: bytearray | None) -> None:
    """Read one stream of a command to its end, into the log."""
    while chunk := stream.read1(2**16):  # type: ignore[attr-defined]
        log.say(chunk)
        last.append(chunk)
        if answer is not None and len(answer) < MOST_ANSWER_NBYTES:
            answer += chunk
