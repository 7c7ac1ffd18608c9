"""A channel whose copies are made on threads of its own, each row on one of them."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mobile.ledger import Key

Fill = Callable[[Key, int], None]  # copies the row of a key into a slot


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class ThreadCopy:
    """A copy that a thread makes by `fill`; `bell` is released once it is over, to wake who waits."""

    key: Key
    slot: int
    fill: Fill
    over: bool = False
    bell: threading.Lock = field(default_factory=_locked)
    error: Exception | None = None
    span: tuple[int, int] = (0, 0)

    def make(self) -> None:
        """Copy, and note when that was."""
        begun = time.perf_counter_ns()
        try:
            self.fill(self.key, self.slot)
        except Exception as error:
            self.error = error
        self.span = begun, time.perf_counter_ns()
        self.over = True
        self.bell.release()

    def wait(self) -> None:
        """Wait until it is over; one thread at a time. Ctrl-C may break it off anywhere, unlike an Event's wait."""
        while not self.over:
            self.bell.acquire()


def _make_in_turn(work: queue.SimpleQueue[ThreadCopy | None]) -> None:
    """Make copies until None comes, which is left for the next thread, so that one None ends all of them.

    Between two copies this holds nothing of an engine, so that one can be freed.
    """
    while (copy := work.get()) is not None:
        copy.make()
        del copy
    work.put(None)


class ThreadChannel:
    """A channel that makes copies by `fill` on so many threads, which end when it is closed, or forgotten."""

    def __init__(self, fill: Fill, threads: int = 1) -> None:
        self._fill = fill
        self._work: queue.SimpleQueue[ThreadCopy | None] = queue.SimpleQueue()
        self._last: dict[int, ThreadCopy] = {}  # by slot
        self._stalled = 0
        self.threads = [
            threading.Thread(target=_make_in_turn, args=(self._work,), name=f"mobile-link-{number}", daemon=True)
            for number in range(threads)
        ]
        self._end = weakref.finalize(self, self._work.put, None)  # one call, which Ctrl-C cannot halve
        for thread in self.threads:
            thread.start()

    def begin(self, key: Key, slot: int) -> None:
        self._last[slot] = copy = ThreadCopy(key, slot, self._fill)
        self._work.put(copy)

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
        self._end()
        for thread in self.threads:
            thread.join()
