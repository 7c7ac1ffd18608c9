"""The paced link: a thread that copies no faster than the profile's link, to test a real queue without a GPU."""

from __future__ import annotations

import time

from mobile.ledger import Key
from mobile.links.base import LinkEnds
from mobile.links.stream import StreamLink
from mobile.links.threads import Fill, ThreadChannel


def connect(ends: LinkEnds) -> StreamLink:
    """Return a link over a paced channel."""
    channel = paced_channel(ends.fill, ends.load_ns)
    return StreamLink(channel, ends.row_nbytes, ends.ledger, ends.arrived, processor=ends.processor)


def paced_channel(fill: Fill, load_ns: int) -> ThreadChannel:
    """Return a channel that copies each row no faster than `load_ns`: a test, not a measurement."""

    def fill_and_sleep(key: Key, slot: int) -> None:
        begun = time.perf_counter_ns()
        try:
            fill(key, slot)
        finally:
            left = begun + load_ns - time.perf_counter_ns()
            if left > 0:
                time.sleep(left / 1e9)

    return ThreadChannel(fill_and_sleep)
