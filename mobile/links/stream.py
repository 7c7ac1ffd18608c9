"""Links in real time: a host-side queue in front of a channel that copies while the device computes."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from mobile.ledger import Key, Ledger
from mobile.links.base import Arrival, Copy, CopyQueue

COMMITTED = 2  # a begun copy cannot be overtaken, so no more than these are ahead of a demand load; two keep it busy


class Channel(Protocol):
    """What really copies, one row after another in the order of `begin`. Methods raise what a copy raised."""

    def begin(self, key: Key, slot: int) -> None:
        """Start copying and return."""

    def ended(self, slot: int) -> bool:
        """Whether the copy last begun into `slot` is over; does not wait."""
        ...

    def finish(self, slot: int) -> None:
        """Wait on the host until it is over."""

    def fence(self, slot: int) -> None:
        """Have the device wait for it before whatever is launched next."""

    def used(self, slots: Sequence[int]) -> None:
        """All that reads or writes these slots has been launched; copies into them wait for it."""

    def join(self) -> None:
        """Copies begun from now on wait for the compute launched so far."""

    def follow(self) -> None:
        """Have what is launched from now on come after all that was launched before, be it on another stream."""

    def stalled_ns(self) -> int:
        """Nanoseconds that compute is known to have waited since this was last asked."""
        ...

    def span(self, slot: int) -> tuple[int, int]:
        """When the last copy into `slot`, which has ended, began and ended, in `time.perf_counter_ns`."""
        ...

    def close(self) -> None:
        """Wait for what was begun and let go of everything."""


@dataclass
class Begun:
    """A copy under way; `announced` once compute was told to wait for it."""

    copy: Copy
    announced: bool = False


class StreamLink:
    """A Link over a channel. The host waits only where two copies are begun and a third is needed."""

    def __init__(self, channel: Channel, row_nbytes: int, ledger: Ledger, arrived: Arrival) -> None:
        self.channel, self._row_nbytes, self._ledger, self._arrived = channel, row_nbytes, ledger, arrived
        self._queue = CopyQueue()
        self.promote = self._queue.promote
        self._begun: deque[Begun] = deque()
        self._failed: dict[Key, Exception] = {}
        self._zero = time.perf_counter_ns()

    @property
    def now(self) -> int:
        return time.perf_counter_ns() - self._zero

    @property
    def begun(self) -> int:
        return self._ledger.counters.loads + len(self._begun)

    def submit(self, key: Key, slot: int, *, demand: bool) -> None:
        self._failed.pop(key, None)
        self._queue.add(key, slot, demand=demand)
        self._advance()

    def cancel(self, key: Key) -> bool:
        return self._queue.cancel(key) or self._failed.pop(key, None) is not None

    def wait(self, key: Key) -> None:
        while True:
            self._advance()
            if key in self._failed:
                raise self._failed.pop(key)
            begun = next((begun for begun in self._begun if begun.copy.key == key), None)
            if begun is not None:
                try:
                    self.channel.fence(begun.copy.slot)
                except Exception:  # it is over, and must not be taken for one that landed
                    self._begun.remove(begun)
                    raise
                if not begun.announced:
                    begun.announced = True
                    self._arrived(key, begun.copy.slot)
                break
            if not any(copy.key == key for copy in self._queue):
                break
            self.channel.finish(self._begun[0].copy.slot)
        self._ledger.counters.stall_ns += self.channel.stalled_ns()

    def compute(self, ns: int, about: Key | str) -> int:
        if isinstance(about, str):  # a layer or a head: here alone may the caller be on another stream than before
            self.channel.follow()
        self._advance()
        return 0

    def on_cpu(self, ns: int, about: Key) -> None:
        self._advance()

    def join_cpu(self, about: Key) -> None:
        """The kernel computed it on this very thread, and has launched the copy of what came out."""

    def used(self, slots: Sequence[int]) -> None:
        self.channel.used(slots)

    def join(self) -> None:
        self.channel.join()

    def reset(self) -> None:
        self._queue.clear()
        while self._begun:  # forgotten only once it is over, should Ctrl-C come meanwhile
            with suppress(Exception):
                self.channel.finish(self._begun[0].copy.slot)
            self._begun.popleft()
        self._failed.clear()
        self.channel.follow()

    def rewind(self) -> None:
        self._zero = time.perf_counter_ns()

    def close(self) -> None:
        try:
            self.reset()
        finally:  # whatever broke that off, the channel must not hold rows that are about to be freed
            self.channel.close()

    def _advance(self) -> None:
        """Note which copies have ended, and begin as many as may be."""
        self._note_ended()
        while len(self._begun) < COMMITTED and (copy := self._queue.next()) is not None:
            while any(begun.copy.slot == copy.slot for begun in self._begun):  # one slot, one copy at a time
                self.channel.finish(copy.slot)
                self._note_ended()
            self.channel.begin(copy.key, copy.slot)
            self._begun.append(Begun(copy))

    def _note_ended(self) -> None:
        while self._begun:
            copy = self._begun[0].copy
            try:
                if not self.channel.ended(copy.slot):
                    return
            except Exception as error:  # kept for whoever needs this expert; nobody may ever
                self._failed[copy.key] = error
                self._begun.popleft()
                continue
            begun = self._begun.popleft()
            counters = self._ledger.counters
            counters.loads += 1
            counters.bytes_loaded += self._row_nbytes
            if self._ledger.keeps_events:
                start, end = self.channel.span(copy.slot)
                self._ledger.event(copy.what, start - self._zero, end - self._zero, copy.key)
            if not begun.announced:
                self._arrived(copy.key, copy.slot)


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
        """Of one thread at a time. Ctrl-C may break it off anywhere, which cannot be said of an Event's wait."""
        while not self.over:
            self.bell.acquire()


def _make_in_turn(work: queue.SimpleQueue[Paced | None], load_ns: int) -> None:
    """Make copies until None comes. Between two of them this holds nothing of an engine, so that one can be freed."""
    while (copy := work.get()) is not None:
        copy.make(load_ns)
        del copy


class PacedChannel:
    """Copies on a thread of its own, each no faster than `load_ns`: a smoke test of the queue, not a measurement.

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
        """Kernels run when they are called, so there is nothing to wait for."""

    def join(self) -> None:
        """The same: what was launched is over."""

    def follow(self) -> None:
        """The same."""

    def stalled_ns(self) -> int:
        stalled, self._stalled = self._stalled, 0
        return stalled

    def span(self, slot: int) -> tuple[int, int]:
        return self._last[slot].span

    def close(self) -> None:
        self._end()
        self._thread.join()
