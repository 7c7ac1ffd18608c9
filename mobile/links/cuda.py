"""The CUDA channel: a copy stream, an event when a slot is ready, and one when its last reader is done.

No allocation and no device-wide synchronisation after it is made. Events, streams and waits are of the device where the
slots lie, whichever is current.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count, islice

import torch

from mobile.errors import OutOfReach
from mobile.ledger import Key
from mobile.links.base import LinkEnds
from mobile.links.device_clock import DeviceClock
from mobile.links.page_lock import Lock, page_lock, unlock
from mobile.links.stream import StreamLink
from mobile.store import HostStore

WAITS = 256  # timed waits kept before the oldest is read
MEASURED, RUNS = 16, 20  # copies in a run that measures the bandwidth, and runs at most once the link is awake
WAKE_SECONDS = 0.5  # of copies before that: an idle card's link is in a state of lower power (assumed to be enough)
TELLING_NBYTES = 2**19  # rows below it measure the launching of copies and not the link, so that none is woken for them
NEAR = 0.03  # a link that is slower than asked by no more than this share is taken as it is


def connect(ends: LinkEnds) -> StreamLink:
    """Return a link over a CUDA channel. Raise OutOfReach if it cannot be as fast as asked for."""
    assert isinstance(ends.store, HostStore), "rows on a disk are read by the link disk"
    channel = CudaChannel(ends.store, ends.slots, ends.row_of, ends.link_gb_per_s)
    return StreamLink(channel, ends.row_nbytes, ends.ledger, ends.arrived, processor=ends.processor)


class CudaChannel:
    """A channel that copies rows of `store` into `slots` (slots, row elements) on a stream of its own.

    `row_of(key)` is the host row of an expert. `link_gb_per_s` makes each copy as slow as a link of that speed by
    really copying more bytes behind it, on the same stream: `throttled` says whether it does, or the link is that slow
    by itself; what that came to, `throttled_gb_per_s`, is measured, and a RuntimeWarning says so if it is not near.
    `page_locked` says whether the rows are, or copies read ordinary memory. Raise Refused, with nothing left
    registered, if the link is slower than asked for.
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
        self.throttled_gb_per_s: float | None = None
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
        self._clock = DeviceClock(self._last)
        self._spans: dict[int, tuple[int, int]] = {}  # of copies that were asked about, by slot
        self._noted_ns = 0  # the end of the last of them
        self._step_end = torch.cuda.Event(enable_timing=True)
        self.native_gb_per_s = self._measure()

    def _measure(self) -> float:
        """Return the decimal GB/s of row copies, the best of some runs: a link that was idle takes time to wake.

        Once it was kept busy for `WAKE_SECONDS`, it ends when three runs in a row have brought no more than 2 %.
        """
        awake = self._store.rows[0][0].nbytes < TELLING_NBYTES
        numbers, seconds = count(), 0.0
        while not awake:
            seconds += self._run(next(numbers))[1]
            awake = seconds >= WAKE_SECONDS
        best, since = 0.0, 0
        for number in islice(numbers, RUNS):
            rate, _ = self._run(number)
            since = 0 if rate > 1.02 * best else since + 1
            best = max(best, rate)
            if since == 3:
                break
        return best

    def _run(self, number: int) -> tuple[float, float]:
        """Copy different rows, each with its padding, in a run of that number; return the rate and the seconds."""
        layers = self._store.rows
        begun, ended = self._spare[0]
        with torch.cuda.stream(self._stream):
            begun.record(self._stream)
            for each in range(number * MEASURED, (number + 1) * MEASURED):
                rows = layers[each % len(layers)]
                self._scratch.copy_(rows[each // len(layers) % len(rows)], non_blocking=True)
                self._pad()
            ended.record(self._stream)
        ended.synchronize()
        seconds = begun.elapsed_time(ended) / 1e3
        return MEASURED * layers[0][0].nbytes / (seconds * 1e9), seconds

    def _throttle(self, link_gb_per_s: float) -> None:
        """Have each copy followed by as many more bytes as make it take as long. Raise OutOfReach if it is too fast."""
        if not 0 < link_gb_per_s * (1 - NEAR) <= self.native_gb_per_s:
            raise OutOfReach(
                f"This link copies {self.native_gb_per_s:.1f} GB/s and cannot be throttled to {link_gb_per_s:g}; "
                "give a smaller number."
            )
        row = self._store.rows[0][0]
        elements = max(0, round(row.numel() * (self.native_gb_per_s / link_gb_per_s - 1)))
        whole, part = divmod(elements, row.numel())
        self._padding = [row] * whole + ([row[:part]] if part else [])
        if not self._padding:
            return
        self.throttled_gb_per_s = sorted(self._run(number)[0] for number in range(3))[1]
        if abs(self.throttled_gb_per_s - link_gb_per_s) > NEAR * link_gb_per_s:
            warnings.warn(
                f"The link was asked to be throttled to {link_gb_per_s:g} GB/s and copies "
                f"{self.throttled_gb_per_s:.3g}: what is timed on it is of a link of that speed.",
                RuntimeWarning,
                stacklevel=1,
            )

    def _pad(self) -> None:
        """Copy what makes the copy before it as slow as was asked for."""
        for more in self._padding:
            self._scratch[: more.numel()].copy_(more, non_blocking=True)

    def begin(self, key: Key, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            reader = self._reader[slot]
            if reader is not None:
                self._stream.wait_event(reader)
            self._clock.tick(self._stream)
            self._spans.pop(slot, None)
            self._start[slot].record(self._stream)
            self._slots[slot].copy_(self._row_of(key), non_blocking=True)
            self._pad()
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
        """See `Channel.span`; copies are asked about in the order they were begun, and none overlaps the one before."""
        if slot not in self._spans:
            begun = max(self._clock.at(self._start[slot]), self._noted_ns)
            self._noted_ns = begun + self._clock.between(self._start[slot], self._ready[slot])
            self._spans[slot] = begun, self._noted_ns
        return self._spans[slot]

    def launched(self) -> None:
        compute = self._compute()
        self._clock.tick(compute)
        self._step_end.record(compute)

    def done_ns(self, *, wait: bool) -> int | None:
        if wait:
            self._step_end.synchronize()
        return self._clock.at(self._step_end) if wait or self._step_end.query() else None

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
