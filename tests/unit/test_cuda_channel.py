"""The CUDA channel and what locks its rows, over the stand-in of `fake_cuda`: orders, devices, failures, memory."""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import greedy, prompt, tiny
from fake_cuda import Card, Stream, card  # noqa: F401
from torch.multiprocessing.reductions import StorageWeakRef

import mobile
from baselines.lru import LRU
from baselines.on_demand import ON_DEMAND, ON_DEMAND_OVERLAP
from baselines.resident import RESIDENT
from mobile.links import cuda
from mobile.links.cuda import CudaChannel
from mobile.machine import gpu
from mobile.policies.big_little import MOBILE
from mobile.store import HostStore, layout_of
from suites import environment

EXPERTS, SLOTS = 6, 4
TIMED = [(LRU, 6), (ON_DEMAND, 4), (ON_DEMAND_OVERLAP, 4), (RESIDENT, 24), (MOBILE, 7)]


def attached(card: Card, model: Any, strategy: Any, slots: int, **options: Any) -> Any:  # noqa: F811
    """The model attached over a CUDA channel, its slots watched for races."""
    mobile.attach(model, strategy, slots=slots, link="virtual", **options)
    engine = model.mobile
    engine.link.close()
    card.watch(engine.slot_rows)
    engine.connect(cuda.connect)
    return engine


@pytest.mark.parametrize("poison", [False, True], ids=["plain", "poison"])
@pytest.mark.parametrize(("strategy", "slots"), TIMED, ids=lambda value: getattr(value, "name", value))
def test_no_copy_races_with_compute_whatever_the_strategy(card, strategy, slots, poison):  # noqa: F811
    model, ids = tiny("qwen3_moe"), prompt()
    expected = greedy(model, ids)
    options = {"gamma": 1.1} if strategy is MOBILE else {}
    engine = attached(card, model, strategy, slots, poison=poison, **options)
    ours = greedy(model, ids)
    assert card.races == []
    assert torch.equal(ours[1], expected[1])
    assert strategy is RESIDENT or engine.stats()["loads"] > 20


@pytest.mark.parametrize(("strategy", "slots"), TIMED, ids=lambda value: getattr(value, "name", value))
def test_callers_on_several_streams_find_every_expert_in_its_slot(card, strategy, slots):  # noqa: F811
    """A copy that one stream was told to wait for may be under way still when the next forward pass is on another."""
    model = tiny("qwen3_moe")
    attached(card, model, strategy, slots, poison=True, **({"gamma": 1.1} if strategy is MOBILE else {}))
    streams = [Stream(name=f"caller {number}") for number in range(3)]
    cache = None
    for step in range(12):
        with torch.cuda.stream(streams[step % 3]), torch.no_grad():
            fed = prompt(length=9) if cache is None else prompt(length=1, seed=step)
            cache = model(fed, past_key_values=cache, use_cache=True).past_key_values
    assert card.races == []


def test_a_step_that_was_broken_off_leaves_nothing_that_races_with_the_next(card):  # noqa: F811
    model = tiny("qwen3_moe")
    engine = attached(card, model, LRU, 6, poison=True)
    run, calls = engine.run_experts, []

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return run(*arguments)

    engine.run_experts = failing
    with pytest.raises(KeyboardInterrupt):
        greedy(model, prompt())
    with torch.cuda.stream(Stream(name="another caller")):
        greedy(model, prompt())
    assert card.races == []


def test_the_stand_in_knows_a_race_when_it_sees_one(card):  # noqa: F811
    rows, copying = torch.zeros(2, 8), Stream(name="copies")
    card.watch(rows)
    with torch.cuda.stream(copying):
        rows[1].fill_(3)
    rows[0].add(1)
    assert card.races == []
    rows[1].add(1)
    assert len(card.races) == 1
    card.current().wait_stream(copying)
    rows[1].add(1)
    with torch.cuda.stream(copying):
        rows[1].fill_(4)
    assert len(card.races) == 2


# --- rows and slots alone ---------------------------------------------------------------------------


def store_and_slots(dtype: torch.dtype = torch.float32) -> tuple[HostStore, torch.Tensor]:
    layout = layout_of({"w": torch.empty(1, 250_000, dtype=dtype)})
    store = HostStore(layout, 2, EXPERTS)
    for layer, rows in enumerate(store.rows):
        rows.copy_(torch.arange(layer * EXPERTS, (layer + 1) * EXPERTS)[:, None].expand_as(rows))
    return store, torch.zeros(SLOTS, layout.numel, dtype=dtype)


def channel_of(store: HostStore, slots: torch.Tensor, link_gb_per_s: float | None = None) -> CudaChannel:
    return CudaChannel(store, slots, lambda key: store.rows[key[0]][key[1]], link_gb_per_s)


def test_rows_are_registered_while_the_channel_lives_and_not_a_moment_longer(card):  # noqa: F811
    store, slots = store_and_slots()
    channel = channel_of(store, slots)
    assert sorted(card.registered) == sorted(rows.data_ptr() for rows in store.rows)
    assert channel.page_locked
    channel.close()
    assert card.registered == {}
    channel.close()


def test_rows_that_somebody_else_registered_stay_so(card):  # noqa: F811
    store, slots = store_and_slots()
    card.cudaHostRegister(store.rows[1].data_ptr(), store.rows[1].nbytes, 0)
    channel_of(store, slots).close()
    assert list(card.registered) == [store.rows[1].data_ptr()]


def test_rows_are_unregistered_before_a_link_that_is_too_slow_is_refused(card):  # noqa: F811
    """Whoever catches the refusal gives the rows' memory back, and holds the channel through its traceback."""
    store, slots = store_and_slots()
    with pytest.raises(mobile.Refused, match=r"copies 25\.0 GB/s and cannot be throttled to 26") as caught:
        channel_of(store, slots, 26.0)
    assert caught.tb, "its frames hold the channel"
    assert card.registered == {}


@pytest.mark.parametrize("call", [1, 2, 3, 4, 20, 500, 520, 530])
def test_an_interrupt_while_the_channel_is_made_leaves_no_row_registered(card, monkeypatch, call):  # noqa: F811
    store, slots = store_and_slots()
    calls = []

    def interrupted(name: str) -> Any:
        original = getattr(torch.cuda, name)

        def count(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return count

    for name in ("Event", "stream", "cudart", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, interrupted(name))
    with pytest.raises(KeyboardInterrupt) as caught:
        channel_of(store, slots)
    assert caught.tb, "its frames hold the channel"
    assert card.registered == {}


def test_memory_is_unregistered_before_it_is_freed_though_nobody_closed_the_channel(card, monkeypatch):  # noqa: F811
    store, slots = store_and_slots()
    unregister, alive = card.cudaHostUnregister, []
    watched = {rows.data_ptr(): StorageWeakRef(rows.untyped_storage()) for rows in store.rows}

    def noting(address: int) -> int:
        alive.append(not watched[address].expired())
        return unregister(address)

    monkeypatch.setattr(card, "cudaHostUnregister", noting)
    channel = channel_of(store, slots)
    store.rows.clear()  # as a store gives its rows back, one after another
    store._views.clear()
    assert alive == [True, True]
    channel.close()
    assert card.registered == {}


def test_a_channel_that_is_forgotten_waits_for_its_copies_and_unregisters_its_rows(card):  # noqa: F811
    store, slots = store_and_slots()
    channel = channel_of(store, slots)
    card.watch(slots)
    channel.begin((0, 3), 1)
    del channel
    gc.collect()
    slots[1].add(1)
    assert card.races == [], "the slot could be freed while a copy was under way"
    assert card.registered == {}


def test_a_closed_channel_holds_no_slots(card):  # noqa: F811
    store, slots = store_and_slots()
    channel = channel_of(store, slots)
    held = StorageWeakRef(slots.untyped_storage())
    channel.close()
    del slots
    gc.collect()
    assert held.expired()
    assert channel.native_gb_per_s == pytest.approx(25)


# --- where rows cannot be page-locked -----------------------------------------------------------------


def test_without_page_locking_copies_come_from_ordinary_memory_and_are_exact(card):  # noqa: F811
    card.refuses = 801
    model, ids = tiny("olmoe"), prompt()
    expected = greedy(model, ids)
    with pytest.warns(RuntimeWarning, match=r"does not page-lock .* \(error 801, operation not supported\)"):
        engine = attached(card, model, LRU, 6, poison=True)
    assert not engine.link.channel.page_locked
    assert torch.equal(greedy(model, ids)[1], expected[1])
    assert engine.stats()["loads"] > 20
    assert card.races == []


def test_that_rows_are_not_page_locked_is_said_once(card):  # noqa: F811
    card.refuses = 801
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            channel_of(*store_and_slots()).close()
    assert len(said) == 1


def test_a_failed_registration_is_not_left_for_the_next_launch(card):  # noqa: F811
    card.refuses = 304
    with pytest.warns(RuntimeWarning, match="error 304"):
        channel = channel_of(*store_and_slots())
    assert card.last_error == 0
    channel.begin((1, 2), 3)
    channel.finish(3)
    channel.close()


def test_rows_registered_before_one_was_refused_are_given_up_too(card, monkeypatch):  # noqa: F811
    """All or none: a link that copies some experts faster than others is no one link."""
    register = card.cudaHostRegister

    def second_refused(address: int, nbytes: int, flags: int) -> int:
        card.refuses = 2 if card.registered else 0
        return register(address, nbytes, flags)

    monkeypatch.setattr(card, "cudaHostRegister", second_refused)
    with pytest.warns(RuntimeWarning, match="error 2"):
        channel = channel_of(*store_and_slots())
    assert card.registered == {}
    assert not channel.page_locked


# --- the link's speed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "taken"), [(12.5, 2.0), (20.0, 1.25), (25.0, 1.0), (25.5, 1.0)])
def test_a_copy_takes_as_long_as_on_the_link_that_was_asked_for(card, asked, taken):  # noqa: F811
    store, slots = store_and_slots()
    channel = channel_of(store, slots, asked)
    assert channel.throttled is (taken > 1)
    channel.begin((0, 1), 2)
    channel.finish(2)
    begun, ended = channel.span(2)
    assert (ended - begun) * 25 == pytest.approx(taken * store.layout.nbytes, rel=1e-3)
    assert torch.equal(slots[2], store.rows[0][1])


def test_an_idle_link_is_measured_once_it_is_awake(card):  # noqa: F811
    """It speeds up as it is used: what counts is what it comes to."""
    store, slots = store_and_slots()
    original, copied = torch.Tensor.copy_, []

    def waking(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        copied.append(None)
        card.gb_per_s = 4.0 if len(copied) < 40 else 25.0
        return original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", waking)
        channel = channel_of(store, slots)
    assert channel.native_gb_per_s == pytest.approx(25)


# --- devices --------------------------------------------------------------------------------------------


class OnSecondCard(torch.Tensor):
    """A tensor that says that it lies there."""

    device = torch.device("cuda:1")


def test_all_of_a_channel_is_of_the_device_where_its_slots_lie(card):  # noqa: F811
    """With another device current: an event recorded there has no time to this one's, and orders nothing here."""
    store, slots = store_and_slots()
    card.watch(slots)
    channel = channel_of(store, slots.as_subclass(OnSecondCard), 20.0)
    for slot in range(SLOTS):
        channel.begin((1, slot), slot)
    for slot in range(SLOTS):
        channel.fence(slot)
    channel.used(range(SLOTS))
    channel.join()
    with torch.cuda.stream(card.current(torch.device("cuda:1"))):
        slots.add(1)
    assert card.races == []
    channel.finish(SLOTS - 1)
    assert channel.stalled_ns() >= 0
    assert channel.span(3)[1] > channel.span(3)[0]
    assert card.device == 0
    used = [stream for stream in card.made if stream.clock[stream] and stream is not card.current(0)]
    assert {stream.device for stream in used} == {1}
    channel.close()


def test_the_driver_is_asked_about_the_card_that_torch_uses_and_a_record_names_it(monkeypatch):
    """The driver lists cards in another order, and those too that CUDA_VISIBLE_DEVICES hides from torch."""
    unknown = gpu.UNKNOWN_LINK
    cards = [gpu.Gpu(f"card {n}", f"GPU-{n}", "600", None, None, None, unknown, unknown, None) for n in range(3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=2 - index))
    monkeypatch.setattr(environment, "gpus", lambda: cards)
    assert gpu.cuda_uuid() == "GPU-1"
    assert gpu.cuda_uuid(0) == "GPU-2"
    assert environment._gpu()["name"] == "card 1"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert environment._gpu()["name"] == "card 2"
