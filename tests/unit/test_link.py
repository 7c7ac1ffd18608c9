"""The virtual link: one channel, no interruption, demand first, exact in time."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mobile.ledger import Ledger
from mobile.links.virtual import VirtualLink


def link(load_ns: int = 100) -> tuple[VirtualLink, list, Ledger]:
    arrivals: list = []
    ledger = Ledger()
    made = VirtualLink(load_ns, 7, ledger, lambda key, slot: arrivals.append((key, slot, made.now)))
    return made, arrivals, ledger


def test_demand_overtakes_queued_prefetches_but_not_a_running_copy():
    channel, arrivals, _ = link()
    channel.submit((0, 1), 1, demand=False)
    channel.submit((0, 2), 2, demand=False)
    channel.submit((0, 3), 3, demand=True)
    channel.wait((0, 2))
    assert [key for key, *_ in arrivals] == [(0, 1), (0, 3), (0, 2)]
    assert channel.now == 300


def test_a_promoted_prefetch_goes_with_the_demand_loads():
    channel, arrivals, _ = link()
    for expert in range(4):
        channel.submit((0, expert), expert, demand=False)
    channel.promote((0, 3))
    channel.wait((0, 3))
    assert [key for key, *_ in arrivals] == [(0, 0), (0, 3)]


def test_only_a_prefetch_that_has_not_begun_is_cancelled():
    channel, arrivals, _ = link()
    channel.submit((0, 0), 0, demand=False)
    channel.submit((0, 1), 1, demand=False)
    assert not channel.cancel((0, 0))
    assert channel.cancel((0, 1))
    channel.compute(1000, "")
    assert [key for key, *_ in arrivals] == [(0, 0)]


def test_copies_go_on_while_the_device_computes():
    channel, _, ledger = link()
    channel.submit((0, 0), 0, demand=True)
    channel.compute(60, "")
    channel.wait((0, 0))
    assert (channel.now, ledger.counters.stall_ns) == (100, 40)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 250)), min_size=1, max_size=40))
def test_every_copy_takes_its_time_and_none_overlaps(steps):
    channel, arrivals, ledger = link()
    for number, (demand, pause) in enumerate(steps):
        channel.submit((0, number), number, demand=demand)
        channel.compute(pause, "")
    for number in range(len(steps)):
        if number not in {slot for _, slot, _ in arrivals}:
            channel.wait((0, number))
    spans = sorted((e.start_ns, e.end_ns) for e in ledger.events if e.what in ("load", "prefetch"))
    assert len(arrivals) == len(spans) == len(steps)
    assert all(end - start == 100 for start, end in spans)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert ledger.counters.bytes_loaded == 7 * len(steps)
    assert channel.now == sum(pause for _, pause in steps) + ledger.counters.stall_ns
