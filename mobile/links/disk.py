"""The disk link: rows of a file read straight into slots in memory, in real time, on any machine.

A row is read whole by one of a few threads: a large direct read keeps a disk busy by itself, small rows want several at
once, so how many is measured when the link is made.
"""

from __future__ import annotations

import time
from itertools import product

from mobile.links.base import LinkEnds
from mobile.links.stream import StreamLink
from mobile.links.threads import ThreadChannel

DEPTHS = (1, 2, 4, 8)  # reads at once that are tried
TRIED_NBYTES, TRIED_ROWS = 32 * 2**20, 16  # that are read at each depth at least, but no more rows than the latter
NEAR = 0.95  # of the best rate; the smallest depth that reaches it is taken: a prefetch that has begun is in the way


def connect(ends: LinkEnds) -> StreamLink:
    """Return a link that reads at the depth which this disk needs. Raise Refused if a row cannot be read."""
    depth = best_depth(ends)
    channel = ThreadChannel(ends.fill, depth)
    return StreamLink(channel, ends.row_nbytes, ends.ledger, ends.arrived, committed=depth + 1)


def best_depth(ends: LinkEnds) -> int:
    """Return the fewest reads at once with which rows come at NEAR the best rate."""
    rate_at(ends, max(DEPTHS))  # the first reads into slots also wait for the system to give those their memory
    rates = {depth: rate_at(ends, depth) for depth in DEPTHS}
    return next(depth for depth, rate in rates.items() if rate >= NEAR * max(rates.values()))


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
