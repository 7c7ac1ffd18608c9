"""The CUDA channel: one copy stream, an event when a slot is ready and one when its last reader is done.

No allocation and no device-wide synchronisation after it is made. The host rows are registered where they lie
(`cudaHostRegister`): PyTorch's pinned allocator would round each up to a power of two.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch

from mobile.ledger import Key
from mobile.refusal import Refused
from mobile.store import HostStore

WAITS = 256  # timed waits kept before the oldest is read
MEASURED = 16  # copies in the measurement of the native bandwidth


class CudaChannel:
    """Copies rows of `store` into `slots` (slots, row) on a stream of its own.

    `row_of(key)` is the host row of an expert. `link_gb_per_s` makes each copy as slow as a link of that speed by
    really copying more bytes behind it, on the same stream. Raises Refused if the host memory cannot be registered,
    or the link is slower than asked for.
    """

    def __init__(
        self, store: HostStore, slots: torch.Tensor, row_of: Callable[[Key], torch.Tensor],
        link_gb_per_s: float | None = None,
    ) -> None:  # fmt: skip
        self._store, self._slots, self._row_of = store, slots, row_of
        self._device = slots.device
        self._registered: list[int] = []
        self._unregister = weakref.finalize(self, unlock, self._registered)
        page_lock(store, self._registered)
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
        self._padding: list[torch.Tensor] = []
        self._scratch = torch.empty_like(slots[0])
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record()
        self._zero.synchronize()
        self._zero_ns = time.perf_counter_ns()
        self.native_gb_per_s = self._measure()
        if link_gb_per_s is not None:
            self._throttle(link_gb_per_s)

    def _measure(self) -> float:
        """Decimal gigabytes per second of a run of row copies."""
        row = self._store.rows[0][0]
        begun, ended = self._spare[0]
        with torch.cuda.stream(self._stream):
            for number in range(2 * MEASURED):
                if number == MEASURED:  # the first half warms the link up
                    begun.record(self._stream)
                self._scratch.copy_(row, non_blocking=True)
            ended.record(self._stream)
        ended.synchronize()
        return MEASURED * row.nbytes / (begun.elapsed_time(ended) * 1e6)

    def _throttle(self, link_gb_per_s: float) -> None:
        if not 0 < link_gb_per_s <= self.native_gb_per_s:
            raise Refused(
                f"This link copies {self.native_gb_per_s:.1f} GB/s and cannot be throttled to {link_gb_per_s:g}; "
                "give a smaller number."
            )
        row = self._store.rows[0][0]
        elements = round(row.numel() * (self.native_gb_per_s / link_gb_per_s - 1))
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

    def fence(self, slot: int) -> None:
        compute = torch.cuda.current_stream(self._device)
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
            done.record(torch.cuda.current_stream(self._device))
            for slot in slots:
                self._reader[slot] = done

    def join(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _read_wait(self) -> None:
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
        torch.cuda.synchronize(self._device)
        self._unregister()


def page_lock(store: HostStore, locked: list[int], otherwise: str = "free host memory") -> None:
    """Register the store's rows with CUDA where they lie and add their addresses to `locked`, for `unlock`.

    Rows that are registered already, by whoever keeps the store for several engines, are left alone. Raises Refused,
    with nothing left in `locked`; `otherwise` is what else than raising the limit would help.
    """
    runtime = torch.cuda.cudart()
    for rows in store.rows:
        if rows.is_pinned():
            continue
        failed = int(runtime.cudaHostRegister(rows.data_ptr(), rows.nbytes, 0))
        if failed:
            unlock(locked)
            raise Refused(
                f"CUDA cannot register {store.nbytes / 2**30:.1f} GiB of host memory (error {failed}); "
                f"raise the locked-memory limit (ulimit -l unlimited), or {otherwise}."
            )
        locked.append(rows.data_ptr())


def unlock(locked: list[int]) -> None:
    """Undo `page_lock`."""
    while locked:
        torch.cuda.cudart().cudaHostUnregister(locked.pop())
