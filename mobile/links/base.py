"""The link: what copies an expert's row into a slot, and what that costs in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import chain
from typing import NamedTuple, Protocol

from mobile.ledger import Key, Ledger

Arrival = Callable[[Key, int], None]


class Copy(NamedTuple):
    """A row on its way into a slot, and what it was first asked for as: "load" or "prefetch"."""

    key: Key
    slot: int
    what: str


class Link(Protocol):
    """One host-to-device channel. Demand loads go before prefetches; a copy that has begun is not interrupted.

    `now` is nanoseconds since the link was made.
    """

    @property
    def now(self) -> int: ...
    @property
    def begun(self) -> int:
        """Copies begun since the ledger was cleared, those that failed left out."""
        ...

    def submit(self, key: Key, slot: int, *, demand: bool) -> None:
        """Queue a copy of `key` into `slot`; it begins at once if the channel is idle."""

    def promote(self, key: Key) -> None:
        """Compute waits for a queued prefetch: it goes with the demand loads. No effect if its copy has begun."""

    def cancel(self, key: Key) -> bool:
        """Take back a prefetch that is queued, or failed; False if its copy is under way or over, or never was."""
        ...

    def wait(self, key: Key) -> None:
        """Compute goes on only once `key` has arrived; its waiting is counted as stall. Raises what its copy raised."""

    def compute(self, ns: int, about: Key | str) -> int:
        """The device computes while copies go on: for `ns`, which is returned, where time is virtual; 0 elsewhere."""
        ...

    def on_cpu(self, ns: int, about: Key) -> None:
        """The processor computes an expert beside the device, after those it was given before."""

    def join_cpu(self, about: Key) -> None:
        """Compute goes on only once the processor is done; its waiting is counted as stall, for `about`."""

    def used(self, slots: Sequence[int]) -> None:
        """All that reads these slots has been launched: another copy may take them after it."""

    def join(self) -> None:
        """Copies asked for from now on begin only after the compute launched so far: loading without overlap."""

    def reset(self) -> None:
        """Let go of everything asked for; when it returns nothing writes into a slot any more."""

    def rewind(self) -> None:
        """`now` is zero again."""

    def close(self) -> None:
        """The last call: give back what the link holds."""


class CopyQueue:
    """Copies not begun: demand loads first, each kind in the order it was asked for."""

    def __init__(self) -> None:
        self.demand: deque[Copy] = deque()
        self.prefetch: deque[Copy] = deque()

    def add(self, key: Key, slot: int, *, demand: bool) -> None:
        if demand:
            self.demand.append(Copy(key, slot, "load"))
        else:
            self.prefetch.append(Copy(key, slot, "prefetch"))

    def next(self) -> Copy | None:
        queue = self.demand or self.prefetch
        return queue.popleft() if queue else None

    def __iter__(self) -> Iterator[Copy]:
        return chain(self.demand, self.prefetch)

    def promote(self, key: Key) -> None:
        for copy in self.prefetch:
            if copy.key == key:
                self.prefetch.remove(copy)
                self.demand.append(copy)
                return

    def cancel(self, key: Key) -> bool:
        for copy in self.prefetch:
            if copy.key == key:
                self.prefetch.remove(copy)
                return True
        return False

    def clear(self) -> None:
        self.demand.clear()
        self.prefetch.clear()


class VirtualLink:
    """A discrete-event clock in integer nanoseconds: the same calls give the same times on any machine.

    `arrived(key, slot)` is called when a copy ends and must put the real bytes there, so that a step that used a
    slot too early would compute with what was in it before. If it raises, the copy has not ended.
    """

    def __init__(self, load_ns: int, row_nbytes: int, ledger: Ledger, arrived: Arrival) -> None:
        self.now = 0
        self._load_ns, self._row_nbytes, self._ledger, self.arrived = load_ns, row_nbytes, ledger, arrived
        self._demand: deque[tuple[Key, int, str]] = deque()  # key, slot and what it was first asked for as
        self._prefetch: dict[Key, int] = {}  # the slot of each, in the order they were asked for
        self._flying: tuple[Key, int, str] | None = None
        self._flying_end = 0
        self._cpu_end = 0  # when the processor is done with what it was given

    @property
    def idle(self) -> bool:
        """Whether no copy is on its way."""
        return self._flying is None

    @property
    def begun(self) -> int:
        return self._ledger.counters.loads + (self._flying is not None)

    def submit(self, key: Key, slot: int, *, demand: bool) -> None:
        if self._flying is None:  # then nothing is queued
            self._flying, self._flying_end = (key, slot, "load" if demand else "prefetch"), self.now + self._load_ns
        elif demand:
            self._demand.append((key, slot, "load"))
        else:
            self._prefetch[key] = slot

    def promote(self, key: Key) -> None:
        slot = self._prefetch.pop(key, None)
        if slot is not None:
            self._demand.append((key, slot, "prefetch"))

    def cancel(self, key: Key) -> bool:
        return self._prefetch.pop(key, None) is not None

    def wait(self, key: Key) -> None:
        begun, landed = self.now, None
        while landed != key:
            assert self._flying is not None, f"waiting for {key}, which nobody loads"
            landed, ended = self._flying[0], self._flying_end
            self._land()
            if ended > self.now:
                self.now = ended
        self._stalled(begun, key)

    def compute(self, ns: int, about: Key | str) -> int:
        until = self.now + ns
        if self._ledger.keeps_events:
            self._ledger.event("compute", self.now, until, about)
        if self._flying is None:
            self.now = until
        else:
            self._until(until)
        return ns

    def serve(self, keys: Sequence[Key], ready: Set[Key], ns: int) -> None:
        """For one key after another, `wait` for it unless it is ready, and `compute` for `ns`. Keeps no events."""
        begun = stalled = 0
        for key in keys:
            if key not in ready:
                begun = self.now
                while key not in ready:
                    ended = self._flying_end
                    self._land()
                    if ended > self.now:
                        self.now = ended
                stalled += self.now - begun
            until = self.now + ns
            while self._flying is not None and self._flying_end <= until:
                self._land()
            self.now = until
        self._ledger.counters.stall_ns += stalled

    def load_in_turn(self, copies: int, resident_ns: int, each_ns: int) -> None:
        """What so many demand loads, submitted to an idle link, take while compute runs for `resident_ns` and then
        waits for each and runs for `each_ns`. Charged at once: no events, and nobody is told of arrivals.
        """
        ended = self.now
        now = ended + resident_ns
        stalled = 0
        for _ in range(copies):
            ended += self._load_ns
            if ended > now:
                stalled += ended - now
                now = ended
            now += each_ns
        self.now = now
        self._loaded(copies, stalled)

    def stream(self, ns: Sequence[int], loaded: Sequence[int], ahead: int) -> None:
        """What experts that compute for `ns` take in turn, those at the positions `loaded` (ascending) copied by an
        idle link, at most `ahead` of them asked for and not yet waited for. Charged like `load_in_turn`.
        """
        now = free = self.now
        stalled, load_ns, left = 0, self._load_ns, len(loaded)
        ends: deque[int] = deque()
        loads = set(loaded)
        for position, busy in enumerate(ns):
            while left and len(ends) < ahead:
                free = (free if free > now else now) + load_ns
                ends.append(free)
                left -= 1
            if position in loads:
                ended = ends.popleft()
                if ended > now:
                    stalled += ended - now
                    now = ended
            now += busy
        self.now = now
        self._loaded(len(loaded), stalled)

    def _loaded(self, copies: int, stalled: int) -> None:
        counters = self._ledger.counters
        counters.loads += copies
        counters.bytes_loaded += copies * self._row_nbytes
        counters.stall_ns += stalled

    def on_cpu(self, ns: int, about: Key) -> None:
        begun = max(self.now, self._cpu_end)
        self._cpu_end = begun + ns
        if self._ledger.keeps_events:
            self._ledger.event("cpu", begun, self._cpu_end, about)

    def join_cpu(self, about: Key) -> None:
        begun = self.now
        self._until(max(begun, self._cpu_end))
        self._ledger.counters.cpu_stall_ns += self.now - begun
        self._stalled(begun, about)

    def _until(self, end: int) -> None:
        """Let time pass, and copies end, up to `end`."""
        while self._flying is not None and self._flying_end <= end:
            self._land()
        self.now = end

    def _stalled(self, begun: int, about: Key) -> None:
        self._ledger.counters.stall_ns += self.now - begun
        if self._ledger.keeps_events:
            self._ledger.event("stall", begun, self.now, about)

    def used(self, slots: Sequence[int]) -> None:
        """Kernels run when they are called, so there is nothing to wait for."""

    def join(self) -> None:
        """Virtual compute is over when it was charged."""

    def reset(self) -> None:
        self._demand.clear()
        self._prefetch.clear()
        self._flying = None
        self._cpu_end = self.now

    def rewind(self) -> None:
        self.now = self._cpu_end = 0

    def close(self) -> None:
        """It holds nothing."""

    def _land(self) -> None:
        """The copy in flight ends, and the next one begins."""
        assert self._flying is not None
        (key, slot, what), ended, ledger = self._flying, self._flying_end, self._ledger
        self.arrived(key, slot)
        counters = ledger.counters
        counters.loads += 1
        counters.bytes_loaded += self._row_nbytes
        if ledger.keeps_events:
            ledger.event(what, ended - self._load_ns, ended, key)
        if self._demand:
            self._flying = self._demand.popleft()
        elif self._prefetch:
            first = next(iter(self._prefetch))
            self._flying = (first, self._prefetch.pop(first), "prefetch")
        else:
            self._flying = None
        self._flying_end = ended + self._load_ns
