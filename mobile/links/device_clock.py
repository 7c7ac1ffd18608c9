"""The time at which a CUDA device reached an event, on the host's clock, in a run of any length.

CUDA tells the time between two events as float32 milliseconds: exact to 4 us after a minute and to a quarter of a
millisecond after an hour. So it is taken from an anchor that is never far: an event whose time is known.
"""

from __future__ import annotations

import time

import torch

ANCHOR_NS = 1_000_000_000  # a new anchor after this; a second in float32 milliseconds is exact to 0.06 us


class DeviceClock:
    """The host's `time.perf_counter_ns` at events of one device.

    A new anchor's time is the old one's plus what lies between, and never outside of what the host has seen: after it
    was launched, and before it was found to be over. So neither rounding nor the drift between the two clocks adds up.
    It waits for the device once, when it is made on a `stream`.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._anchor, self._next = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._launched_ns: int | None = None  # when the next anchor was, if it was
        self._anchor.record(stream)
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()

    def tick(self, stream: torch.cuda.Stream) -> None:
        """Launch the next anchor on `stream`, if the last one is old. Called before events that are asked about."""
        now = time.perf_counter_ns()
        if self._launched_ns is None and now - self._anchor_ns > ANCHOR_NS:
            self._next.record(stream)
            self._launched_ns = now

    def at(self, event: torch.cuda.Event) -> int:
        """Return when the device reached `event`, which is over, and which may be older than the anchor."""
        if self._launched_ns is not None and self._next.query():
            now, between = time.perf_counter_ns(), self.between(self._anchor, self._next)
            self._anchor_ns = min(max(self._anchor_ns + between, self._launched_ns), now)
            self._anchor, self._next, self._launched_ns = self._next, self._anchor, None
        return self._anchor_ns + self.between(self._anchor, event)

    @staticmethod
    def between(begun: torch.cuda.Event, ended: torch.cuda.Event) -> int:
        """Return the nanoseconds from one event that is over to another, negative if that came first."""
        return round(begun.elapsed_time(ended) * 1e6)
