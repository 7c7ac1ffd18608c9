"""Copies of experts' rows over the link, timed on the engine's own channel."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

import torch

from mobile.errors import Refused
from mobile.links.paced import paced_channel
from mobile.links.stream import COMMITTED, Channel
from mobile.machine.fit_profile import SIZES, Timing
from mobile.machine.measure.ahead import copy_seconds
from mobile.machine.measure.sizes import Sizes
from mobile.store import HostStore, layout_of

Pace = Callable[[int], int]  # nanoseconds that a paced link takes for so many bytes


def time_copies(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    link_gb_per_s: float | None = None,
    pace: Pace | None = None,
) -> tuple[Timing, ...]:
    """Return the seconds of one row's copy for rows of each width, by the channel's own clock.

    `link_gb_per_s` throttles a CUDA link, `pace` a paced one. Raise Refused if the link refuses, or if fewer than
    `SIZES` sizes of rows reach `link_gb_per_s`.
    """
    too_slow: Refused | None = None
    with ExitStack() as channels:
        timed = []
        # 1. Open a channel for each size of rows. Small rows may not reach the rate that is asked for; larger ones may.
        for width in sizes.widths:
            layout = layout_of({"w": torch.empty(1, 3 * sizes.hidden * width, dtype=dtype)})
            rows = max(sizes.top_k, sizes.pool_nbytes // layout.nbytes)
            store = HostStore(layout, 1, rows)
            store.rows[0].fill_(1)
            slots = torch.zeros(rows, layout.numel, dtype=dtype, device=device)
            try:
                channel = _open_channel(device, store, slots, link_gb_per_s, pace)
            except Refused as refused:
                if link_gb_per_s is None:
                    raise
                too_slow = refused
                continue
            channels.callback(channel.close)
            timed.append((layout.nbytes, rows, channel))
        if too_slow is not None and len(timed) < SIZES:
            raise too_slow
        # 2. Copy all rows of each size in turn; the first round warms the link up and is not counted.
        rounds = [[_copy_ns(rows, channel) for _, rows, channel in timed] for _ in range(sizes.repeats + 1)]
    fastest = [min(nanoseconds) for nanoseconds in zip(*rounds[1:], strict=True)]
    return tuple(Timing(nbytes, 1, ns / 1e9) for (nbytes, _, _), ns in zip(timed, fastest, strict=True))


def time_beginning(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, *, link_gb_per_s: float | None = None
) -> float:
    """Return the host's seconds of one copy over a CUDA channel, see `ahead.copy_seconds`.

    A throttled one has more to begin. Raise Refused if the link refuses.
    """
    layout = layout_of({"w": torch.empty(1, 3 * sizes.hidden * sizes.widths[-1], dtype=dtype)})
    store = HostStore(layout, 1, COMMITTED)
    store.rows[0].fill_(1)
    slots = torch.zeros(COMMITTED, layout.numel, dtype=dtype, device=device)
    channel = _open_channel(device, store, slots, link_gb_per_s, None)
    try:
        return copy_seconds(device, channel, layout.nbytes, sizes)
    finally:
        channel.close()


def _copy_ns(rows: int, channel: Channel) -> float:
    """Return the nanoseconds of one copy in an unbroken run: the median from the end of one to the end of the next."""
    for slot in range(rows):
        channel.begin((0, slot), slot)
    channel.finish(rows - 1)
    ends = [channel.span(slot)[1] for slot in range(rows)]
    return statistics.median(after - before for before, after in pairwise(ends))


def _open_channel(
    device: torch.device, store: HostStore, slots: torch.Tensor, link_gb_per_s: float | None, pace: Pace | None
) -> Channel:
    """Return the channel from the store's rows into `slots` (rows, numel): CUDA's, or without a GPU a paced one."""

    def row(key: tuple[int, int]) -> torch.Tensor:
        return store.rows[key[0]][key[1]]

    if device.type == "cuda":
        from mobile.links.cuda import CudaChannel

        return CudaChannel(store, slots, row, link_gb_per_s)

    def fill(key: tuple[int, int], slot: int) -> None:
        slots[slot].copy_(row(key))

    return paced_channel(fill, 0 if pace is None else pace(store.layout.nbytes))
