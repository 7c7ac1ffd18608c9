"""Links in real time: a host-side queue in front of a channel that copies while the device computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mobile.ledger import Key, Ledger
from mobile.links.base import Arrival, Copy, CopyQueue, Processor

COMMITTED = 2  # a begun copy cannot be overtaken, so no more than these are ahead of a demand load; two keep a link
# busy that copies one row at a time


class Channel(Protocol):
    """A device's way to copy rows, one after another in the order of `begin`. Methods raise what a copy raised."""

    def begin(self, key: Key, slot: int) -> None:
        """Start copying and return."""

    def ended(self, slot: int) -> bool:
        """Return whether the copy last begun into `slot` is over; does not wait."""
        ...

    def finish(self, slot: int) -> None:
        """Wait on the host until it is over."""

    def fence(self, slot: int) -> None:
        """Have the device wait for it before whatever is launched next."""

    def used(self, slots: Sequence[int]) -> None:
        """Have copies into these slots wait for what was launched so far, which is all that reads or writes them."""

    def join(self) -> None:
        """Have copies begun from now on wait for the compute launched so far."""

    def follow(self) -> None:
        """Have what is launched from now on come after all that was launched before, be it on another stream."""

    def stalled_ns(self) -> int:
        """Return the nanoseconds that compute is known to have waited since the last call."""
        ...

    def span(self, slot: int) -> tuple[int, int]:
        """Return when the last copy into `slot`, which has ended, began and ended, in `time.perf_counter_ns`."""
        ...

    def close(self) -> None:
        """Wait for what was begun and let go of everything."""


@runtime_checkable
class AsynchronousDevice(Protocol):
    """A channel to a device that computes behind the host: it may be at work when the host has launched all of it."""

    def launched(self) -> None:
        """Note that all of a step was launched."""

    def done_ns(self, *, wait: bool) -> int | None:
        """Return when the device was done with it, in `time.perf_counter_ns`; None if it is not yet, unless `wait`."""
        ...


@dataclass
class Begun:
    """A copy under way; `announced` once compute waits for it and its slot counts as ready."""

    copy: Copy
    announced: bool = False


class StreamLink:
    """A Link over a channel. The host waits only where two copies are begun that it asked for early, and needs another.

    A copy goes from `_queue` (asked for) to `_begun` (given to the channel, in its order), and then into the ledger, or
    to `_failed` until compute waits for it. At most `committed` are begun that compute does not wait for yet: the link
    then has work while the host reads a routing, and a demand load finds no more than these ahead of it. It has no
    thread of its own: calls of the link move copies on.
    """

    def __init__(
        self,
        channel: Channel,
        row_nbytes: int,
        ledger: Ledger,
        arrived: Arrival,
        committed: int = COMMITTED,
        processor: Processor | None = None,
    ) -> None:
        self.channel, self._row_nbytes, self._ledger, self._arrived = channel, row_nbytes, ledger, arrived
        self._processor = processor
        if processor is not None:
            processor.after_each(self._advance)
        self._committed = committed
        self._device = channel if isinstance(channel, AsynchronousDevice) else None
        self._queue = CopyQueue()
        self.promote = self._queue.promote
        self._begun: deque[Begun] = deque()
        self._failed: dict[Key, Exception] = {}
        self._zero = time.perf_counter_ns()

    @property
    def gb_per_s(self) -> float | None:
        return getattr(self.channel, "gb_per_s", None)  # of a channel that measures it

    @property
    def now(self) -> int:
        return time.perf_counter_ns() - self._zero

    @property
    def begun(self) -> int:
        return self._ledger.counters.loads + len(self._begun)

    @property
    def runs_behind(self) -> bool:
        return self._device is not None

    def launched(self) -> None:
        if self._device is not None:
            self._device.launched()

    def done_at(self, *, wait: bool) -> int | None:
        done = None if self._device is None else self._device.done_ns(wait=wait)
        return None if done is None else done - self._zero

    def submit(self, key: Key, slot: int, *, demand: bool) -> None:
        self._failed.pop(key, None)
        self._queue.add(key, slot, demand=demand)
        self._advance()

    def cancel(self, key: Key) -> bool:
        return self._queue.cancel(key) or self._failed.pop(key, None) is not None

    def wait(self, key: Key) -> None:
        while True:
            # 1. Note what has ended, and begin what may begin.
            self._advance()
            if key in self._failed:
                raise self._failed.pop(key)
            # 2. Under way: the device, and not the host, waits for it.
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
                    self._advance()  # another may begin
                break
            # 3. Neither under way nor queued: it has landed.
            if not any(copy.key == key for copy in self._queue):
                break
            # 4. Queued behind as many copies as may be begun: wait on the host for the oldest of them.
            self.channel.finish(self._begun[0].copy.slot)
        self._ledger.counters.stall_ns += self.channel.stalled_ns()

    def compute(self, ns: int, about: Key | str, host_ns: int = 0) -> int:
        if isinstance(about, str):  # a layer or a head: here alone may the caller be on another stream than before
            self.channel.follow()
        self._advance()
        return 0

    def read_result(self) -> int:
        return 0  # the host waits where it reads

    def on_cpu(self, ns: int, about: Key) -> None:
        self._advance()

    def join_cpu(self, about: Key) -> None:
        """Wait on the host, beginning copies meanwhile: until then nothing that needs the results can be launched."""
        if self._processor is None:
            return
        begun, counters = time.perf_counter_ns(), self._ledger.counters
        self._processor.join()
        waited = time.perf_counter_ns() - begun
        counters.stall_ns += waited
        counters.cpu_stall_ns += waited

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
        while self._ahead() < self._committed and (copy := self._queue.next()) is not None:
            while any(begun.copy.slot == copy.slot for begun in self._begun):  # one slot, one copy at a time
                self.channel.finish(copy.slot)
                self._note_ended()
            self.channel.begin(copy.key, copy.slot)
            self._begun.append(Begun(copy))

    def _ahead(self) -> int:
        """Return how many copies are begun that compute does not wait for yet."""
        return sum(not begun.announced for begun in self._begun)

    def _note_ended(self) -> None:
        """Move copies that have ended, the oldest first, into the ledger, and those that failed to `_failed`."""
        while self._begun:
            copy = self._begun[0].copy
            try:
                if not self.channel.ended(copy.slot):
                    return
            except Exception as error:  # raised where compute waits for this expert, if it ever does
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
