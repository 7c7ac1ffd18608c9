"""Threads that make jobs in turn, and a channel whose copies are made on such, each row on one of them."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mobile.ledger import Key

Fill = Callable[[Key, int], None]  # copies the row of a key into a slot


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class Job:
    """Work that a thread does by `work`; `bell` is released once it is over, to wake who waits."""

    work: Callable[[], None]
    over: bool = False
    bell: threading.Lock = field(default_factory=_locked)
    error: Exception | None = None
    span: tuple[int, int] = (0, 0)

    def make(self) -> None:
        """Do the work, and note when that was."""
        begun = time.perf_counter_ns()
        try:
            self.work()
        except Exception as error:
            self.error = error
        self.span = begun, time.perf_counter_ns()
        self.over = True
        self.bell.release()

    def wait(self) -> None:
        """Wait until it is over; one thread at a time. Ctrl-C may break it off anywhere, unlike an Event's wait."""
        while not self.over:
            self.bell.acquire()


def _make_in_turn(work: queue.SimpleQueue[Job | None]) -> None:
    """Make jobs until None comes, which is left for the next thread, so that one None ends all of them.

    Between two jobs this holds nothing of an engine, so that one can be freed.
    """
    while (job := work.get()) is not None:
        job.make()
        del job
    work.put(None)


class Threads:
    """So many threads that make jobs in the order they are given, until closed, or forgotten."""

    def __init__(self, name: str, count: int = 1) -> None:
        self._work: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=_make_in_turn, args=(self._work,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        self._end = weakref.finalize(self, self._work.put, None)  # one call, which Ctrl-C cannot halve
        for thread in self.threads:
            thread.start()

    def add(self, job: Job) -> None:
        """Have a thread make it, after those added before."""
        self._work.put(job)

    def close(self) -> None:
        """Wait until all jobs are over and the threads have ended."""
        self._end()
        for thread in self.threads:
            thread.join()


class ThreadChannel:
    """A channel that makes copies by `fill` on so many threads, which end when it is closed, or forgotten."""

    def __init__(self, fill: Fill, threads: int = 1) -> None:
        self._fill = fill
        self._threads = Threads("mobile-link", threads)
        self._last: dict[int, Job] = {}  # by slot
        self._stalled = 0

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that copy."""
        return self._threads.threads

    def begin(self, key: Key, slot: int) -> None:
        self._last[slot] = copy = Job(partial(self._fill, key, slot))
        self._threads.add(copy)

    def ended(self, slot: int) -> bool:
        copy = self._last[slot]
        if copy.over and copy.error is not None:
            raise copy.error
        return copy.over

    def finish(self, slot: int) -> None:
        begun = time.perf_counter_ns()
        self._last[slot].wait()
        self._stalled += time.perf_counter_ns() - begun

    def fence(self, slot: int) -> None:
        self.finish(slot)
        self.ended(slot)

    def used(self, slots: Sequence[int]) -> None:
        """Do nothing: kernels run when they are called."""

    def join(self) -> None:
        """Do nothing: what was launched is over."""

    def follow(self) -> None:
        """Do nothing: there is one stream."""

    def stalled_ns(self) -> int:
        stalled, self._stalled = self._stalled, 0
        return stalled

    def span(self, slot: int) -> tuple[int, int]:
        return self._last[slot].span

    def close(self) -> None:
        self._threads.close()
