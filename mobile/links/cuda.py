"""The CUDA channel: a copy stream, an event when a slot is ready, and one when its last reader is done.

No allocation and no device-wide synchronisation after it is made. Events, streams and waits are of the device where the
slots lie, whichever is current.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch

from mobile.errors import Refused
from mobile.ledger import Key
from mobile.links.base import LinkEnds
from mobile.links.page_lock import Lock, page_lock, unlock
from mobile.links.stream import StreamLink
from mobile.store import HostStore

WAITS = 256  # timed waits kept before the oldest is read
MEASURED, RUNS = 16, 20  # copies in a run that measures the native bandwidth, and runs at most
NEAR = 0.03  # a link that is slower than asked by no more than this share is taken as it is


def connect(ends: LinkEnds) -> StreamLink:
    """Return a link over a CUDA channel. Raise Refused if it cannot be as fast as asked for."""
    assert isinstance(ends.store, HostStore), "rows on a disk are read by the link disk"
    channel = CudaChannel(ends.store, ends.slots, ends.row_of, ends.link_gb_per_s)
    return StreamLink(channel, ends.row_nbytes, ends.ledger, ends.arrived, processor=ends.processor)


class CudaChannel:
    """A channel that copies rows of `store` into `slots` (slots, row elements) on a stream of its own.

    `row_of(key)` is the host row of an expert. `link_gb_per_s` makes each copy as slow as a link of that speed by
    really copying more bytes behind it, on the same stream: `throttled` says whether it does, or the link is that slow
    by itself. `page_locked` says whether the rows are, or copies read ordinary memory. Raise Refused, with nothing
    left registered, if the link is slower than asked for.
    """

    def __init__(
        self,
        store: HostStore,
        slots: torch.Tensor,
        row_of: Callable[[Key], torch.Tensor],
        link_gb_per_s: float | None = None,
    ) -> None:
        self._store, self._slots, self._row_of = store, slots, row_of
        self._device = slots.device
        self._padding: list[torch.Tensor] = []
        locks: list[Lock] = []
        self._release = weakref.finalize(self, _release, self._device, locks)  # also if it is never closed
        self._release.atexit = False
        try:
            page_lock(store.rows, self._device, locks)
            self._prepare()
            if link_gb_per_s is not None:
                self._throttle(link_gb_per_s)
        except BaseException:
            self.close()
            raise
        self.page_locked = all(rows.is_pinned() for rows in store.rows)
        self.throttled = bool(self._padding)
        self.gb_per_s = link_gb_per_s if self.throttled and link_gb_per_s is not None else self.native_gb_per_s

    def _prepare(self) -> None:
        """Make streams and events, start the clock and measure the link."""
        slots = self._slots
        self._stream = torch.cuda.Stream(self._device)
        self._start, self._ready, self._done = (
            [torch.cuda.Event(enable_timing=timed) for _ in range(len(slots))] for timed in (True, True, False)
        )
        self._reader: list[torch.cuda.Event | None] = [None] * len(slots)  # the event after a slot's last reader
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(WAITS)
        ]
        self._stalled = 0
        self._scratch = torch.empty_like(slots[0])
        self._last = torch.cuda.current_stream(self._device)  # on which compute was launched last
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record(self._last)
        self._zero.synchronize()  # the device's clock and the host's are zero together
        self._zero_ns = time.perf_counter_ns()
        self.native_gb_per_s = self._measure()

    def _measure(self) -> float:
        """Return the decimal GB/s of row copies, the best of some runs: a link that was idle takes time to wake.

        It ends when three runs in a row have brought no more than 2 %.
        """
        best, since = 0.0, 0
        for _ in range(RUNS):
            rate = self._run()
            since = 0 if rate > 1.02 * best else since + 1
            best = max(best, rate)
            if since == 3:
                break
        return best

    def _run(self) -> float:
        """Return the rate of one run of copies of different rows."""
        rows = self._store.rows[0]
        begun, ended = self._spare[0]
        with torch.cuda.stream(self._stream):
            begun.record(self._stream)
            for number in range(MEASURED):
                self._scratch.copy_(rows[number % len(rows)], non_blocking=True)
            ended.record(self._stream)
        ended.synchronize()
        return MEASURED * rows[0].nbytes / (begun.elapsed_time(ended) * 1e6)

    def _throttle(self, link_gb_per_s: float) -> None:
        """Have each copy followed by as many more bytes as make it take as long. Raise Refused if it is too fast."""
        if not 0 < link_gb_per_s * (1 - NEAR) <= self.native_gb_per_s:
            raise Refused(
                f"This link copies {self.native_gb_per_s:.1f} GB/s and cannot be throttled to {link_gb_per_s:g}; "
                "give a smaller number."
            )
        row = self._store.rows[0][0]
        elements = max(0, round(row.numel() * (self.native_gb_per_s / link_gb_per_s - 1)))
        whole, part = divmod(elements, row.numel())
        self._padding = [row] * whole + ([row[:part]] if part else [])

    def begin(self, key: Key, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            reader = self._reader[slot]
            if reader is not None:
                self._stream.wait_event(reader)
            self._start[slot].record(self._stream)
            self._slots[slot].copy_(self._row_of(key), non_blocking=True)
            for more in self._padding:
                self._scratch[: more.numel()].copy_(more, non_blocking=True)
            self._ready[slot].record(self._stream)

    def ended(self, slot: int) -> bool:
        return self._ready[slot].query()

    def finish(self, slot: int) -> None:
        self._ready[slot].synchronize()

    def _compute(self) -> torch.cuda.Stream:
        """Return the stream that compute is launched on; one that was not the last waits for what was launched there.

        So all compute comes in one order, and a copy that one stream waits for, every stream waits for.
        """
        stream = torch.cuda.current_stream(self._device)
        if stream != self._last:
            stream.wait_stream(self._last)
            self._last = stream
        return stream

    def follow(self) -> None:
        self._compute()

    def fence(self, slot: int) -> None:
        compute = self._compute()
        if not self._spare:
            self._read_wait()
        before, after = pair = self._spare.pop()
        before.record(compute)
        compute.wait_event(self._ready[slot])
        after.record(compute)
        self._waits.append(pair)

    def used(self, slots: Sequence[int]) -> None:
        if slots:
            done = self._done[slots[0]]
            done.record(self._compute())
            for slot in slots:
                self._reader[slot] = done

    def join(self) -> None:
        self._stream.wait_stream(self._compute())

    def _read_wait(self) -> None:
        """Add the oldest timed wait to the sum, and reuse its events; waits for the device if it is not over."""
        before, after = pair = self._waits.popleft()
        after.synchronize()
        self._stalled += round(before.elapsed_time(after) * 1e6)
        self._spare.append(pair)

    def stalled_ns(self) -> int:
        while self._waits and self._waits[0][1].query():
            self._read_wait()
        stalled, self._stalled = self._stalled, 0
        return stalled

    def span(self, slot: int) -> tuple[int, int]:
        begun, ended = (
            self._zero_ns + round(self._zero.elapsed_time(event[slot]) * 1e6) for event in (self._start, self._ready)
        )
        return begun, ended

    def close(self) -> None:
        self._release()
        self._padding = []
        self._slots = self._scratch = self._slots.new_empty(0)


def _release(device: torch.device, locks: list[Lock]) -> None:
    """Wait for what was begun, then unregister the rows: before anything that copies read or write is freed."""
    try:
        torch.cuda.synchronize(device)
    finally:
        unlock(locks)
