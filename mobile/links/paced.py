"""The paced channel: a thread that copies no faster than the profile's link, to test a real queue without a GPU."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mobile.ledger import Key
from mobile.links.base import LinkEnds
from mobile.links.stream import StreamLink


def connect(ends: LinkEnds) -> StreamLink:
    """Return a link over a paced channel."""
    return StreamLink(PacedChannel(ends.fill, ends.load_ns), ends.row_nbytes, ends.ledger, ends.arrived)


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class Paced:
    """A copy that a thread makes by `fill`; `bell` is released once it is over, to wake who waits."""

    key: Key
    slot: int
    fill: Callable[[Key, int], None]
    over: bool = False
    bell: threading.Lock = field(default_factory=_locked)
    error: Exception | None = None
    span: tuple[int, int] = (0, 0)

    def make(self, load_ns: int) -> None:
        """Copy, and take `load_ns` at least."""
        begun = time.perf_counter_ns()
        try:
            self.fill(self.key, self.slot)
        except Exception as error:
            self.error = error
        left = begun + load_ns - time.perf_counter_ns()
        if left > 0:
            time.sleep(left / 1e9)
        self.span = begun, time.perf_counter_ns()
        self.over = True
        self.bell.release()

    def wait(self) -> None:
        """Wait until it is over; one thread at a time. Ctrl-C may break it off anywhere, unlike an Event's wait."""
        while not self.over:
            self.bell.acquire()


def _make_in_turn(work: queue.SimpleQueue[Paced | None], load_ns: int) -> None:
    """Make copies until None comes. Between two of them this holds nothing of an engine, so that one can be freed."""
    while (copy := work.get()) is not None:
        copy.make(load_ns)
        del copy


class PacedChannel:
    """A channel that copies on a thread of its own, each row no faster than `load_ns`: a test, not a measurement.

    The thread ends when the channel is closed, or forgotten.
    """

    def __init__(self, fill: Callable[[Key, int], None], load_ns: int) -> None:
        self._fill = fill
        self._work: queue.SimpleQueue[Paced | None] = queue.SimpleQueue()
        self._last: dict[int, Paced] = {}  # by slot
        self._stalled = 0
        self._thread = threading.Thread(
            target=_make_in_turn, args=(self._work, load_ns), name="mobile-paced-link", daemon=True
        )
        self._end = weakref.finalize(self, self._work.put, None)
        self._thread.start()

    def begin(self, key: Key, slot: int) -> None:
        self._last[slot] = copy = Paced(key, slot, self._fill)
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
        self._thread.join()
