"""The stream link over a channel that ends copies when told to, and the paced channel in real time."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from conftest import greedy, prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import mobile
from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import profile
from mobile.ledger import Ledger
from mobile.links.paced import paced_channel
from mobile.links.stream import COMMITTED, StreamLink
from mobile.policies.big_little import MOBILE
from mobile.policies.protocols import PolicyContext
from mobile.residency.residency import Residency

Key = tuple[int, int]


class ByHand:
    """A channel in memory: the oldest copy ends when `complete` says so, or when somebody waits for one behind it.

    Asserts what a channel may rely on: one copy at a time in a slot, and never more than two begun.
    """

    def __init__(self, failing: Sequence[Key] = ()) -> None:
        self.running: deque[tuple[Key, int]] = deque()
        self.failing = set(failing)
        self.began: list[Key] = []
        self.landed: list[Key] = []
        self.failed: dict[int, Key] = {}
        self.over: set[int] = set()  # slots whose last copy has ended
        self.closed = False
        self.followed = 0

    def begin(self, key: Key, slot: int) -> None:
        assert slot not in {other for _, other in self.running}, "a slot had two copies at once"
        self.over.discard(slot)
        self.failed.pop(slot, None)
        self.running.append((key, slot))
        self.began.append(key)
        assert len(self.running) <= COMMITTED

    def complete(self, copies: int = 1) -> None:
        for _ in range(min(copies, len(self.running))):
            key, slot = self.running.popleft()
            self.over.add(slot)
            if key in self.failing:
                self.failing.discard(key)
                self.failed[slot] = key
            else:
                self.landed.append(key)

    def _outcome(self, slot: int) -> None:
        if slot in self.failed:
            raise OSError(f"copy of {self.failed.pop(slot)}")

    def ended(self, slot: int) -> bool:
        if slot in self.over:
            self._outcome(slot)
        return slot in self.over

    def finish(self, slot: int) -> None:
        while any(other == slot for _, other in self.running):
            self.complete()

    def fence(self, slot: int) -> None:
        self.finish(slot)
        self._outcome(slot)

    def used(self, slots: Sequence[int]) -> None: ...
    def join(self) -> None: ...
    def follow(self) -> None:
        self.followed += 1

    def stalled_ns(self) -> int:
        return 0

    def span(self, slot: int) -> tuple[int, int]:
        return 0, 1

    def close(self) -> None:
        assert not self.running
        self.closed = True


class ReplaySetup:
    """A stream link over such a channel, and what it announced."""

    def __init__(self, failing: Sequence[Key] = ()) -> None:
        self.channel, self.ledger = ByHand(failing), Ledger()
        self.arrivals: list[tuple[Key, int]] = []
        self.link = StreamLink(self.channel, 7, self.ledger, lambda key, slot: self.arrivals.append((key, slot)))

    def ask(self, *experts: int, demand: bool) -> None:
        for expert in experts:
            self.link.submit((0, expert), expert, demand=demand)

    def complete(self, copies: int = 1) -> None:
        """Copies end, and the link comes to know it."""
        self.channel.complete(copies)
        self.link.compute(0, "")

    @property
    def began(self) -> list[int]:
        return [expert for _, expert in self.channel.began]

    @property
    def announced(self) -> list[int]:
        return [expert for (_, expert), _ in self.arrivals]


def test_at_most_two_copies_are_begun():
    bench = ReplaySetup()
    bench.ask(*range(5), demand=True)
    assert bench.began == [0, 1]
    bench.complete()
    assert bench.began == [0, 1, 2]


def test_demand_goes_before_prefetches_that_have_not_begun():
    bench = ReplaySetup()
    bench.ask(0, 1, 2, 3, demand=False)
    bench.ask(4, 5, demand=True)
    for _ in range(6):
        bench.complete()
    assert bench.began == [0, 1, 4, 5, 2, 3]


def test_a_promoted_prefetch_goes_behind_the_demand_loads_before_it_and_no_others():
    bench = ReplaySetup()
    bench.ask(0, 1, 2, 3, demand=False)
    bench.ask(4, demand=True)
    bench.link.promote((0, 3))
    bench.ask(5, demand=True)
    bench.link.promote((0, 0))  # it has begun: no effect
    for _ in range(6):
        bench.complete()
    assert bench.began == [0, 1, 4, 3, 5, 2]


def test_only_a_prefetch_that_has_not_begun_is_cancelled():
    bench = ReplaySetup()
    bench.ask(0, 1, 2, demand=False)
    bench.ask(3, demand=True)
    assert [bench.link.cancel((0, expert)) for expert in (0, 2, 3, 9)] == [False, True, False, False]
    for _ in range(4):
        bench.complete()
    assert bench.began == [0, 1, 3]
    assert bench.announced == [0, 1, 3]


def test_waiting_announces_a_copy_once_and_what_is_over_before_it():
    bench = ReplaySetup()
    bench.ask(0, 1, 2, demand=True)
    bench.link.wait((0, 2))
    assert bench.announced == [0, 2, 1], "0 made way; 1, begun before 2, is over once the device waits for 2"
    bench.complete(3)
    assert sorted(bench.announced) == [0, 1, 2]
    assert bench.ledger.counters.loads == 3


def test_a_wait_for_what_has_arrived_returns():
    bench = ReplaySetup()
    bench.ask(0, demand=True)
    bench.complete()
    bench.link.wait((0, 0))
    assert bench.announced == [0]


def test_a_slot_has_one_copy_at_a_time():
    """A staging buffer is asked for again while its last copy is under way: that one ends first."""
    bench = ReplaySetup()
    bench.link.submit((0, 0), 8, demand=True)
    bench.link.submit((0, 1), 8, demand=True)  # ByHand asserts
    assert bench.channel.landed == [(0, 0)]
    assert list(bench.channel.running) == [((0, 1), 8)]


def test_a_failed_prefetch_that_nobody_needs_harms_nobody():
    bench = ReplaySetup(failing=[(0, 0)])
    bench.ask(0, 1, demand=False)
    bench.ask(2, demand=True)
    bench.link.wait((0, 2))
    bench.complete(3)
    assert sorted(bench.announced) == [1, 2]
    assert bench.ledger.counters.loads == 2


def test_a_failed_prefetch_can_be_taken_back_so_that_its_slot_is_free_again():
    bench = ReplaySetup(failing=[(0, 0)])
    bench.ask(0, 1, demand=False)
    assert not bench.link.cancel((0, 0)), "its copy is under way and may still write"
    bench.complete(2)
    assert bench.link.cancel((0, 0))
    assert not bench.link.cancel((0, 0)), "once is enough"
    assert not bench.link.cancel((0, 1)), "it landed"


def test_the_slot_of_a_failed_prefetch_is_given_back_when_the_token_ends():
    """Through the residency: the expert is foreseen, its copy fails, nobody needs it."""
    channel, ledger = ByHand(failing=[(1, 5)]), Ledger()
    link = StreamLink(channel, 7, ledger, lambda key, slot: residency.arrived(key, slot))
    geometry = replace(GEOMETRIES["olmoe-1b-7b"], moe_layers=2, experts=8, top_k=2)
    cost = CostModel(profile("auto"), geometry)
    residency = Residency(MOBILE, PolicyContext.of(cost, 6), link, cost, ledger)
    pool = residency.pool
    residency.begin("little", 1)
    residency.fallback([(1, 5), (1, 6)])
    channel.complete(2)
    link.compute(0, "")
    assert (1, 5) in pool
    residency.end_token()
    assert (1, 5) not in pool
    assert (1, 6) in pool.ready
    assert len(pool) == 1


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed before the wait", "noticed by the wait"])
def test_a_failed_copy_raises_to_its_waiter_once_and_can_be_asked_for_again(noticed):
    bench = ReplaySetup(failing=[(0, 0)])
    bench.ask(0, 1, demand=True)
    if noticed:
        bench.complete()
    with pytest.raises(OSError, match=r"copy of \(0, 0\)"):
        bench.link.wait((0, 0))
    bench.link.wait((0, 0))  # told once
    assert bench.announced == [], "a copy that failed was announced"
    bench.link.wait((0, 1))
    assert bench.announced == [1]
    bench.ask(0, demand=True)
    bench.link.wait((0, 0))
    assert bench.announced == [1, 0]
    bench.complete(9)
    assert bench.ledger.counters.loads == 2
    assert bench.ledger.counters.bytes_loaded == 2 * 7


def test_a_failure_is_forgotten_when_the_expert_is_asked_for_again():
    bench = ReplaySetup(failing=[(0, 0)])
    bench.ask(0, demand=False)
    bench.complete()
    bench.ask(0, demand=True)
    bench.link.wait((0, 0))
    assert bench.announced == [0]


def test_reset_leaves_nothing_running_nothing_queued_and_no_failure_behind():
    bench = ReplaySetup(failing=[(0, 0)])
    bench.ask(0, 1, 2, 3, demand=True)
    bench.complete()
    bench.link.reset()
    assert not bench.channel.running
    announced, began = list(bench.announced), list(bench.began)
    bench.complete(9)
    bench.link.wait((0, 0))
    assert (bench.announced, bench.began) == (announced, began)


def test_a_reset_broken_off_is_finished_by_the_next(monkeypatch):
    """Ctrl-C while it waits for a copy: that copy is still under way, and must not be forgotten."""
    bench = ReplaySetup()
    bench.ask(0, demand=True)
    finish = bench.channel.finish

    def interrupted(slot: int) -> None:
        monkeypatch.setattr(bench.channel, "finish", finish)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.channel, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.link.reset()
    bench.link.reset()
    assert not bench.channel.running


def test_compute_is_put_in_order_where_a_layer_begins_and_after_a_reset_and_at_no_expert():
    """A caller may be on another stream than the last one; asking at each expert would cost more than it tells."""
    bench = ReplaySetup()
    bench.link.compute(0, "dense")
    for expert in range(4):
        bench.link.compute(0, (0, expert))
    assert bench.channel.followed == 1
    bench.link.reset()
    bench.link.compute(0, "head")
    assert bench.channel.followed == 3


def test_a_close_broken_off_closes_the_channel_all_the_same(monkeypatch):
    """Ctrl-C while it waits for a copy: the rows are given back next, and must not stay registered."""
    channel = paced_channel(lambda key, slot: None, load_ns=0)
    link = StreamLink(channel, 7, Ledger(), lambda key, slot: None)
    link.submit((0, 0), 0, demand=True)

    def interrupted(slot: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(channel, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            link.close()
    assert not channel.threads[0].is_alive()
    link.close()


def test_close_waits_and_closes_the_channel():
    bench = ReplaySetup()
    bench.ask(0, 1, 2, demand=True)
    bench.link.close()
    assert bench.channel.closed


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_sequence_of_calls_keeps_the_books(data):
    """Keys have slots of their own, as in a pool, or share two buffers, as in prefill; some copies fail once."""
    keys = [(0, number) for number in range(8)]
    failing = data.draw(st.sets(st.sampled_from(keys)))
    buffers = data.draw(st.booleans())
    bench, asked, gone = ReplaySetup(sorted(failing)), set(), 0
    link, channel = bench.link, bench.channel
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["demand", "prefetch", "promote", "cancel", "complete", "wait", "reset"]))
        key = data.draw(st.sampled_from(keys))
        begun_before = set(channel.began)
        if action in ("demand", "prefetch") and key not in asked:
            slot = 8 + key[1] % 2 if buffers else key[1]
            asked.add(key)
            link.submit(key, slot, demand=action == "demand")
        elif action == "promote":
            link.promote(key)
        elif action == "cancel" and link.cancel(key):
            assert key not in dict(bench.arrivals)
            assert key not in dict(channel.running), "its copy may still write"
            if key in begun_before:
                assert key in failing
                failing.discard(key)
            else:
                gone += 1
            asked.discard(key)
        elif action == "complete":
            bench.complete(data.draw(st.integers(1, 2)))
        elif action == "wait" and key in asked:
            arrived = key in dict(bench.arrivals)
            raised = None
            try:
                link.wait(key)
            except OSError as error:
                raised = error
            if raised is None:
                assert key in dict(bench.arrivals), "the wait ended without an arrival"
            else:
                assert str(raised) == f"copy of {key}"
                assert key in failing
                assert not arrived
                asked.discard(key)
                failing.discard(key)
        elif action == "reset":
            link.reset()
            assert not channel.running
            break
        assert len(channel.running) <= COMMITTED
        assert len(bench.arrivals) == len(dict(bench.arrivals)), "a copy was announced twice"
    else:
        while channel.running:
            bench.complete()
        link.compute(0, "")
        assert set(dict(bench.arrivals)) == set(channel.landed)
        assert bench.ledger.counters.loads == len(channel.landed)
    assert len(channel.began) + gone >= len(channel.landed)
    assert bench.ledger.counters.bytes_loaded == 7 * bench.ledger.counters.loads
    assert bench.ledger.counters.loads <= len(channel.landed)
    assert all(key in channel.landed for key in dict(bench.arrivals))


def test_a_paced_copy_takes_at_least_its_time_and_copies_keep_their_order():
    filled: list[tuple[Key, int]] = []
    channel = paced_channel(lambda key, slot: filled.append((key, slot)), load_ns=2_000_000)
    for slot in range(5):
        channel.begin((0, slot), slot)
    channel.finish(4)
    assert all(channel.ended(slot) for slot in range(5))
    spans = [channel.span(slot) for slot in range(5)]
    channel.close()
    assert filled == [((0, slot), slot) for slot in range(5)]
    assert all(end - begin >= 2_000_000 for begin, end in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_a_copy_is_not_over_while_its_bytes_are_coming():
    let = threading.Event()
    channel = paced_channel(lambda key, slot: let.wait() and None, load_ns=0)
    channel.begin((0, 0), 0)
    time.sleep(0.01)
    assert not channel.ended(0)
    let.set()
    channel.fence(0)
    assert channel.ended(0)
    assert channel.stalled_ns() > 0
    assert channel.stalled_ns() == 0, "a stall was told twice"
    channel.close()


def test_a_failing_fill_is_raised_where_it_is_waited_for_and_the_thread_goes_on():
    def fill(key: Key, slot: int) -> None:
        if key == (0, 0):
            raise OSError("injected")

    channel = paced_channel(fill, load_ns=0)
    channel.begin((0, 0), 0)
    channel.begin((0, 1), 1)
    with pytest.raises(OSError, match="injected"):
        channel.fence(0)
    channel.fence(1)
    channel.begin((0, 2), 0)
    channel.fence(0)
    channel.close()


def test_closing_a_paced_channel_ends_what_was_begun_and_joins_the_thread():
    filled: list[int] = []
    before = threading.active_count()
    channel = paced_channel(lambda key, slot: filled.append(slot), load_ns=1_000_000)
    assert threading.active_count() == before + 1
    for slot in range(4):
        channel.begin((0, slot), slot)
    channel.close()
    assert filled == [0, 1, 2, 3]
    assert threading.active_count() == before
    channel.close()


def test_a_paced_channel_that_is_forgotten_ends_its_thread_and_holds_nothing():
    class Engine:
        def fill(self, key: Key, slot: int) -> None:
            self.filled = slot

    engine = Engine()
    channel = paced_channel(engine.fill, load_ns=0)
    channel.begin((0, 3), 3)
    channel.finish(3)
    assert engine.filled == 3
    held, thread = weakref.ref(engine), channel.threads[0]
    del engine, channel
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert held() is None


def test_a_model_deleted_without_detach_is_freed_with_its_rows_and_its_thread():
    model = mobile.attach(tiny("olmoe"), "lru", slots=8, link="paced")
    greedy(model, prompt(), 3)
    store, thread = weakref.ref(model.mobile.store), model.mobile.link.channel.threads[0]
    del model
    for _ in range(200):  # until the thread has let go of the last copy, and has ended
        gc.collect()
        thread.join(timeout=0.1)
        if not thread.is_alive():
            break
    assert not thread.is_alive()
    assert store() is None
