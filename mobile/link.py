"""The link: what copies an expert's row into a slot, and what that costs in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from mobile.ledger import Key, Ledger

Arrival = Callable[[Key, int], None]


class Link(Protocol):
    """One host-to-device channel. Demand loads go before prefetches; a copy that has begun is not interrupted."""

    now: int

    def submit(self, key: Key, slot: int, *, demand: bool) -> None: ...
    def promote(self, key: Key) -> None: ...
    def cancel(self, key: Key) -> bool: ...
    def wait(self, key: Key) -> None: ...
    def compute(self, ns: int, about: Key | str) -> None: ...


class VirtualLink:
    """A discrete-event clock in integer nanoseconds: the same calls give the same times on any machine.

    `arrived(key, slot)` is called when a copy ends and must put the real bytes there, so that a step that used a
    slot too early would compute with what was in it before.
    """

    def __init__(self, load_ns: int, row_nbytes: int, ledger: Ledger, arrived: Arrival) -> None:
        self.now = 0
        self._load_ns, self._row_nbytes, self._ledger, self._arrived = load_ns, row_nbytes, ledger, arrived
        self._demand: deque[tuple[Key, int, str]] = deque()  # key, slot, what it was asked for as
        self._prefetch: deque[tuple[Key, int, str]] = deque()
        self._flying: tuple[Key, int, str] | None = None
        self._flying_end = 0

    def submit(self, key: Key, slot: int, *, demand: bool) -> None:
        """Queue a copy of `key` into `slot`; it starts at once if the channel is idle."""
        if demand:
            self._demand.append((key, slot, "load"))
        else:
            self._prefetch.append((key, slot, "prefetch"))
        if self._flying is None:
            self._start(self.now)

    def promote(self, key: Key) -> None:
        """Compute waits for a queued prefetch: it goes with the demand loads. No effect if its copy has begun."""
        for entry in self._prefetch:
            if entry[0] == key:
                self._prefetch.remove(entry)
                self._demand.append(entry)
                return

    def cancel(self, key: Key) -> bool:
        """Take a queued prefetch back; False if its copy has begun or it was never queued."""
        for entry in self._prefetch:
            if entry[0] == key:
                self._prefetch.remove(entry)
                return True
        return False

    def wait(self, key: Key) -> None:
        """Let time pass until the copy of `key` has arrived; the time is counted as stall."""
        begun = self.now
        while True:
            assert self._flying is not None, f"waiting for {key}, which nobody loads"
            landed = self._flying[0]
            self._pass_time(max(self.now, self._flying_end))
            if landed == key:
                break
        self._ledger.counters.stall_ns += self.now - begun
        if self._ledger.keeps_events:
            self._ledger.event("stall", begun, self.now, key)

    def compute(self, ns: int, about: Key | str) -> None:
        """The device computes for `ns` while copies go on."""
        until = self.now + ns
        if self._ledger.keeps_events:
            self._ledger.event("compute", self.now, until, about)
        if self._flying is not None and self._flying_end <= until:
            self._pass_time(until)
        else:
            self.now = until

    def _start(self, at: int) -> None:
        queue = self._demand or self._prefetch
        if not queue:
            self._flying = None
            return
        self._flying = queue.popleft()
        self._flying_end = at + self._load_ns

    def _pass_time(self, until: int) -> None:
        while self._flying is not None and self._flying_end <= until:
            (key, slot, what), ended = self._flying, self._flying_end
            counters = self._ledger.counters
            counters.loads += 1
            counters.bytes_loaded += self._row_nbytes
            if self._ledger.keeps_events:
                self._ledger.event(what, ended - self._load_ns, ended, key)
            self._arrived(key, slot)
            self._start(ended)
        self.now = until
