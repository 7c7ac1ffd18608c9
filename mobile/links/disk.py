"""The disk link: rows of a file read straight into slots in memory, in real time, on any machine.

A row is read whole by one of a few threads: a large direct read keeps a disk busy by itself, small rows want several at
once, so how many is measured when a link is first made to the file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import product

from mobile.links.base import LinkEnds
from mobile.links.stream import StreamLink
from mobile.links.threads import ThreadChannel
from mobile.store import DiskStore

DEPTHS = (1, 2, 4, 8)  # reads at once that are tried
TRIED_NBYTES, TRIED_ROWS = 32 * 2**20, 16  # that are read at each depth at least, but no more rows than the latter
ROUNDS = 3  # of all depths in turn; what else uses the disk only slows reads down, so the best of a depth counts
NEAR = 0.95  # of the best rate; the smallest depth that reaches it is taken: a prefetch that has begun is in the way


def connect(ends: LinkEnds) -> StreamLink:
    """Return a link that reads at the depth which this disk needs. Raise Refused if a row cannot be read."""
    store = ends.store
    assert isinstance(store, DiskStore), "this link reads rows of a file"
    if store.reads_at_once is None:
        store.reads_at_once = best_depth(ends)
    depth = store.reads_at_once
    channel = ThreadChannel(ends.fill, depth)
    return StreamLink(channel, ends.row_nbytes, ends.ledger, ends.arrived, committed=depth + 1)


def best_depth(ends: LinkEnds) -> int:
    """Return the fewest reads at once with which rows come at NEAR the best rate. Raise Refused as `rate_at` does."""
    return depth_for(rates(ends))


def rates(ends: LinkEnds) -> dict[int, float]:
    """Return the decimal GB/s at each of DEPTHS. Raise Refused as `rate_at` does."""
    found = [[rate_at(ends, depth) for depth in DEPTHS] for _ in range(ROUNDS)]
    return dict(zip(DEPTHS, map(max, *found), strict=True))


def depth_for(rates: Mapping[int, float]) -> int:
    """Return the fewest reads at once with which `rates`, decimal GB/s by depth, come at NEAR the best of them."""
    return next(depth for depth, rate in sorted(rates.items()) if rate >= NEAR * max(rates.values()))


def rate_at(ends: LinkEnds, depth: int) -> float:
    """Return the decimal GB/s of reading rows into slots, `depth` at once. Raise Refused if one cannot be read."""
    layers, experts = ends.rows
    count = min(TRIED_ROWS, max(2 * depth, -(-TRIED_NBYTES // ends.row_nbytes)), len(ends.slots))
    keys = list(product(range(layers), range(experts)))
    spread = [keys[number * len(keys) // count] for number in range(count)]
    channel = ThreadChannel(ends.fill, depth)
    try:
        begun = time.perf_counter()
        for slot, key in enumerate(spread):
            channel.begin(key, slot)
        for slot in range(count):
            channel.fence(slot)
        return count * ends.row_nbytes / (time.perf_counter() - begun) / 1e9
    finally:
        channel.close()
