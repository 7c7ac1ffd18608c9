"""The host's time of a device's events in a run of hours, told in float32 milliseconds, as a card tells it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import Card, Event, Stream, card  # noqa: F401
from test_cuda_channel import SLOTS, channel_of, store_and_slots

from mobile.links import cuda, device_clock

PAGE_LOCKED = 2  # layers
MICROSECOND = 1000


@pytest.fixture
def host(monkeypatch, card):  # noqa: F811
    """The host's clock goes with the card's, `drift` times as fast."""
    host = SimpleNamespace(drift=1.0)
    now = SimpleNamespace(perf_counter_ns=lambda: round(card.seconds * 1e9 * host.drift))
    monkeypatch.setattr(device_clock, "time", now)
    return host


def copies(card: Card, pauses: list[float]) -> list[tuple[tuple[int, int], tuple[float, float]]]:  # noqa: F811
    """Copies after pauses of so many seconds: when the channel says that each ran, and when it did."""
    store, slots = store_and_slots()
    channel, told = channel_of(store, slots), []
    for number, pause in enumerate(pauses):
        card.seconds += pause
        slot = number % SLOTS
        channel.begin((0, slot), slot)
        channel.finish(slot)
        told.append((channel.span(slot), (channel._start[slot].at * 1e9, channel._ready[slot].at * 1e9)))
    channel.close()
    return told


def test_copies_keep_their_length_and_their_place_hours_after_attach(card, host):  # noqa: F811
    """Since attach, a copy of 40 us would be 0 or 250 us long after one hour, and 500 after two."""
    told = copies(card, [0.0] * 5 + [0.3] * 40 + [3600.0] + [0.0007] * 200 + [3600.0] + [0.0007] * 200)
    for (begun, ended), (truly_begun, truly_ended) in told:
        assert ended - begun == pytest.approx(truly_ended - truly_begun, abs=10)
        assert begun == pytest.approx(truly_begun, abs=MICROSECOND)
        assert ended == pytest.approx(truly_ended, abs=MICROSECOND)


def test_copies_back_to_back_never_overlap_and_stay_in_order(card, host):  # noqa: F811
    told = copies(card, [0.9, 0.0, 0.0, 0.0] * 300 + [50.0] + [0.0] * 300)
    for (_, ended), (begun, _) in pairwise(span for span, _ in told):
        assert begun >= ended


@pytest.mark.parametrize("drift", [1 - 1e-4, 1 + 1e-4])
def test_the_drift_between_the_two_clocks_does_not_add_up(card, host, drift):  # noqa: F811
    """A tenth of a millisecond a second would be 60 ms after ten minutes."""
    host.drift = drift
    told = copies(card, [1.5] * 400)
    for (begun, _), (truly_begun, _) in told:
        assert begun == pytest.approx(truly_begun * drift, abs=300 * MICROSECOND)


def test_a_span_that_is_asked_for_twice_is_the_same(card, host):  # noqa: F811
    store, slots = store_and_slots()
    channel = channel_of(store, slots)
    channel.begin((0, 1), 2)
    channel.begin((0, 2), 3)
    channel.finish(3)
    first, second = channel.span(2), channel.span(3)
    assert (channel.span(2), channel.span(3)) == (first, second)
    channel.begin((0, 3), 2)
    channel.finish(2)
    assert channel.span(2)[0] >= second[1]
    channel.close()


def test_no_new_anchor_makes_the_host_wait(card, host, monkeypatch):  # noqa: F811
    store, slots = store_and_slots()
    channel, waits = channel_of(store, slots), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(device))
    monkeypatch.setattr(Event, "synchronize", lambda self: waits.append(self))
    for number in range(20):
        card.seconds += 5
        channel.begin((0, number % SLOTS), number % SLOTS)
        channel.launched()
        channel.done_ns(wait=False)
        channel._clock.at(channel._start[number % SLOTS])
    assert waits == []
    monkeypatch.undo()


# --- the measured rate --------------------------------------------------------------------------------


@pytest.mark.parametrize("awake_after", [30, 400])
def test_an_idle_link_is_kept_busy_until_it_is_awake(card, monkeypatch, awake_after):  # noqa: F811
    """For a while it copies evenly, and slowly: no run brings more than the one before."""
    monkeypatch.setattr(cuda, "WAKE_SECONDS", 0.15)
    monkeypatch.setattr(cuda, "TELLING_NBYTES", 2**16)
    store, slots = store_and_slots()
    original, rows = torch.Tensor.copy_, set()

    def waking(self: torch.Tensor, source: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        rows.add(source.data_ptr())
        card.gb_per_s = 4.0 if len(copied) < awake_after else 25.0
        copied.append(None)
        return original(self, source, *arguments, **options)

    copied: list[None] = []
    monkeypatch.setattr(torch.Tensor, "copy_", waking)
    channel = channel_of(store, slots)
    assert channel.native_gb_per_s == pytest.approx(25)
    assert len(rows) == PAGE_LOCKED * len(store.rows[0]), "rows that lie in a cache tell of the cache"
    channel.close()


def test_rows_that_are_too_small_to_tell_wake_no_link(card, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda, "WAKE_SECONDS", 1e6)
    monkeypatch.setattr(cuda, "TELLING_NBYTES", 2**30)
    channel_of(*store_and_slots()).close()


def test_a_throttled_link_is_measured_and_says_where_it_is_not_what_was_asked(card, monkeypatch, recwarn):  # noqa: F811
    channel = channel_of(*store_and_slots(), 10.0)
    assert channel.throttled_gb_per_s == pytest.approx(10, rel=1e-3)
    assert not recwarn
    channel.close()
    pad = cuda.CudaChannel._pad

    def short(self: cuda.CudaChannel) -> None:
        if self.throttled_gb_per_s is None:
            card.seconds += 20e-6  # as if copies took longer where more lie behind each other
        pad(self)

    monkeypatch.setattr(cuda.CudaChannel, "_pad", short)
    monkeypatch.setattr(cuda.CudaChannel, "_measure", lambda self: 25.0)
    with pytest.warns(RuntimeWarning, match=r"asked to be throttled to 10 GB/s and copies 8\.\d+"):
        channel_of(*store_and_slots(), 10.0).close()


def test_an_unthrottled_link_has_no_rate_but_its_own(card):  # noqa: F811
    channel = channel_of(*store_and_slots())
    assert channel.throttled_gb_per_s is None
    channel.close()


# --- devices --------------------------------------------------------------------------------------------


def test_rows_are_registered_with_their_own_device_current(card, monkeypatch):  # noqa: F811
    """The runtime makes a context of some hundred MB on whichever device is current."""
    from mobile.links import page_lock

    monkeypatch.setattr(page_lock, "_clear_error", lambda device: None)
    block, device = torch.zeros(8), torch.device("cuda:1")
    assert page_lock.register(block, device) is None
    page_lock.unregister(block.data_ptr(), device)
    assert card.contexts == {1}
    assert card.device == 0
