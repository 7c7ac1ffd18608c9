"""The virtual link: a discrete-event clock that computes what copies, compute and waiting would take. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set

from mobile.ledger import Key, Ledger
from mobile.links.base import Arrival, LinkEnds


def connect(ends: LinkEnds) -> VirtualLink:
    """Return a virtual link that copies the real bytes when a copy ends."""
    fill, note = ends.fill, ends.arrived  # not `ends`, which would keep the slots' memory as long as the link

    def arrived(key: Key, slot: int) -> None:
        fill(key, slot)
        note(key, slot)

    return VirtualLink(ends.load_ns, ends.charged_nbytes, ends.ledger, arrived)


class VirtualLink:
    """A discrete-event clock in integer nanoseconds: the same calls give the same times on any machine.

    `arrived(key, slot)` is called when a copy ends and must put the real bytes there, so that a step that used a
    slot too early would compute with what was in it before. If it raises, the copy has not ended. One copy is in
    flight (`_flying`) and ends at `_flying_end`; the others wait in `_demand`, then in `_prefetch`.
    """

    def __init__(self, load_ns: int, row_nbytes: int, ledger: Ledger, arrived: Arrival) -> None:
        self.now = 0
        self._load_ns, self._row_nbytes, self._ledger, self._arrived = load_ns, row_nbytes, ledger, arrived
        self._demand: deque[tuple[Key, int, str]] = deque()  # key, slot and what it was first asked for as
        self._prefetch: dict[Key, int] = {}  # the slot of each, in the order they were asked for
        self._flying: tuple[Key, int, str] | None = None
        self._flying_end = 0
        self._cpu_end = 0  # when the processor is done with what it was given

    def deliver_to(self, arrived: Arrival) -> None:
        """Call `arrived` for the copies that end from now on, in place of what the link was made with."""
        self._arrived = arrived

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
            assert self._flying is not None, f"waiting for {key}, which no copy brings"
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
        """Wait for one key after another unless it is ready, and compute for `ns` on each. Keeps no events."""
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
        """Charge so many demand loads at once, submitted to an idle link.

        Compute runs for `resident_ns` meanwhile, and then waits for each and runs for `each_ns`. Keeps no events, and
        calls no `arrived`.
        """
        taken, stalled = self.loads_in_turn(copies, resident_ns, each_ns)
        self.charge(taken, copies, stalled)

    def loads_in_turn(self, copies: int, resident_ns: int, each_ns: int) -> tuple[int, int]:
        """Return what `load_in_turn` charges: nanoseconds in all, and those of stall."""
        ended = stalled = 0
        now = resident_ns
        for _ in range(copies):
            ended += self._load_ns
            if ended > now:
                stalled += ended - now
                now = ended
            now += each_ns
        return now, stalled

    def charge(self, ns: int, copies: int, stalled: int) -> None:
        """Let time pass on an idle link, with so many copies begun and ended in it, and so much of it stall."""
        self.now += ns
        self._loaded(copies, stalled)

    def stream(self, ns: Sequence[int], loaded: Sequence[int], ahead: int) -> None:
        """Charge a streamed layer at once, as `load_in_turn` does: experts that compute for `ns` each, in turn.

        Those at the positions `loaded` (ascending) are copied by the link, which is idle before, at most `ahead` of
        them asked for and not yet waited for.
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
        """Do nothing: kernels run when they are called."""

    def join(self) -> None:
        """Do nothing: virtual compute is over when it was charged."""

    def reset(self) -> None:
        self._demand.clear()
        self._prefetch.clear()
        self._flying = None
        self._cpu_end = self.now

    def rewind(self) -> None:
        self.now = self._cpu_end = 0

    def close(self) -> None:
        """Do nothing: it holds nothing."""

    def _land(self) -> None:
        """End the copy in flight, and begin the next one."""
        assert self._flying is not None
        (key, slot, what), ended, ledger = self._flying, self._flying_end, self._ledger
        self._arrived(key, slot)
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
