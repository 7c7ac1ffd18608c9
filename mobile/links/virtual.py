"""The virtual link: a discrete-event clock that computes what copies, compute and waiting would take. No torch.

It has two timelines. The host launches kernels and begins copies, and goes on; the device works through them and waits
for copies. So a launch is paid for only where the device has nothing left to do meanwhile. Where the host's times are
0, as of a processor that computes itself, there is one timeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set

from mobile.costs.layer_time import LayerTime
from mobile.ledger import Key, Ledger
from mobile.links.base import Arrival, LinkEnds


def connect(ends: LinkEnds) -> VirtualLink:
    """Return a virtual link that copies the real bytes when a copy ends."""
    fill, note = ends.fill, ends.arrived  # not `ends`, which would keep the slots' memory as long as the link

    def arrived(key: Key, slot: int) -> None:
        fill(key, slot)
        note(key, slot)

    return VirtualLink(ends.load_ns, ends.charged_nbytes, ends.ledger, arrived, ends.begin_ns, ends.read_ns)


class VirtualLink:
    """A discrete-event clock in integer nanoseconds: the same calls give the same times on any machine.

    `now` is the device's time, at which all it was given is over, and `_host` the host's. `arrived(key, slot)` is
    called when a copy ends and must put the real bytes there, so that a step that used a slot too early would compute
    with what was in it before. If it raises, the copy has not ended. One copy is in flight (`_flying`) and ends at
    `_flying_end`; the others wait in `_demand`, then in `_prefetch`. The host takes `begin_ns` to begin a copy, and
    `read_ns` to read a result and to launch again.
    """

    def __init__(
        self, load_ns: int, row_nbytes: int, ledger: Ledger, arrived: Arrival, begin_ns: int = 0, read_ns: int = 0
    ) -> None:
        self.now = self._host = 0
        self._load_ns, self._row_nbytes, self._ledger, self._arrived = load_ns, row_nbytes, ledger, arrived
        self._begin_ns, self._read_ns = begin_ns, read_ns
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

    gb_per_s = None
    runs_behind = False  # both timelines are its own

    def launched(self) -> None:
        """Do nothing."""

    def done_at(self, *, wait: bool) -> int | None:
        return None

    def submit(self, key: Key, slot: int, *, demand: bool) -> None:
        self._host += self._begin_ns
        if self._flying is None:  # then nothing is queued
            begun = self._host if self._host > self.now else self.now
            self._flying, self._flying_end = (key, slot, "load" if demand else "prefetch"), begun + self._load_ns
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

    def compute(self, ns: int, about: Key | str, host_ns: int = 0) -> int:
        before, host = self.now, self._host
        begun = host if host > before else before
        until, self._host = begun + ns, host + host_ns
        if self._host > until:  # its last kernel is launched only then
            until = self._host
        if self._ledger.keeps_events:
            self._ledger.event("compute", begun, until, about)
        if self._flying is None:
            self.now = until
        else:
            self._until(until)
        return until - before

    def read_result(self) -> int:
        before = self.now
        self._until(max(before, self._host) + self._read_ns)
        self._host = self.now
        return self.now - before

    def serve(self, keys: Sequence[Key], ready: Set[Key], ns: int, host_ns: int) -> None:
        """Wait for one key after another unless it is ready, and compute on each as `compute` does. Keeps no events."""
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
            until = max(self.now, self._host) + ns
            self._host += host_ns
            if self._host > until:
                until = self._host
            while self._flying is not None and self._flying_end <= until:
                self._land()
            self.now = until
        self._ledger.counters.stall_ns += stalled

    def charge(self, charged: LayerTime, copies: int) -> None:
        """Let time pass on an idle link, with so many copies begun and ended in it."""
        self.now += charged.ns
        self._host = self.now - charged.behind
        self._loaded(copies, charged.stalled)

    def stream(self, ns: Sequence[int | None], host_ns: int, loaded: Sequence[int], ahead: int) -> None:
        """Charge a streamed layer at once: experts that compute for `ns` each, in turn, launched in `host_ns`.

        Those at the positions `loaded` (ascending) are copied by the link, which is idle before, at most `ahead` of
        them asked for and not yet waited for. Those of None are another's to compute. Keeps no events.
        """
        now = free = self.now
        host, begin_ns, load_ns = self._host, self._begin_ns, self._load_ns
        stalled, left = 0, len(loaded)
        ends: deque[int] = deque()
        loads = set(loaded)
        for position, busy in enumerate(ns):
            while left and len(ends) < ahead:
                host += begin_ns
                free = (free if free > now else max(now, host)) + load_ns
                ends.append(free)
                left -= 1
            if busy is None:
                continue
            if position in loads:
                ended = ends.popleft()
                if ended > now:
                    stalled += ended - now
                    now = ended
            now = max(now, host) + busy
            host += host_ns
            now = max(now, host)
        self.now, self._host = now, host
        self._loaded(len(loaded), stalled)

    def _loaded(self, copies: int, stalled: int) -> None:
        counters = self._ledger.counters
        counters.loads += copies
        counters.bytes_loaded += copies * self._row_nbytes
        counters.stall_ns += stalled

    def on_cpu(self, ns: int, about: Key) -> None:
        begun = max(self.now, self._host, self._cpu_end)
        self._cpu_end = begun + ns
        if self._ledger.keeps_events:
            self._ledger.event("cpu", begun, self._cpu_end, about)

    def join_cpu(self, about: Key) -> None:
        begun = self.now
        self._until(max(begun, self._cpu_end))
        self._host = max(self._host, self._cpu_end)
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
        self._cpu_end = self._host = self.now = max(self.now, self._host)

    def rewind(self) -> None:
        self.now = self._host = self._cpu_end = 0

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
