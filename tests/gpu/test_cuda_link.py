"""The CUDA link: the same tokens as the stock model on the same GPU, in slots that copies really race for.

`python -m pytest tests/gpu` runs on a bare checkout with torch, transformers and pytest. Strategies are named by their
objects, since a package that is not installed has no entry points.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from conftest import FAMILIES, greedy, prompt
from conftest import tiny as on_cpu
from transformers import AutoModelForCausalLM, OlmoeConfig

import mobile
from baselines.lru import LRU
from baselines.on_demand import ON_DEMAND, ON_DEMAND_OVERLAP
from baselines.resident import RESIDENT
from mobile.links import page_lock
from mobile.links.cuda import CudaChannel
from mobile.machine import gpu
from mobile.policies.big_little import MOBILE
from mobile.store import HostStore, layout_of

CUDA = torch.device("cuda:0")
LOSSLESS = [LRU, ON_DEMAND, ON_DEMAND_OVERLAP, RESIDENT]


def tiny(family: str):
    return on_cpu(family).cuda()


def ids(rows: int = 1) -> torch.Tensor:
    return prompt(rows).cuda()


def wide(layers: int = 4, dtype: torch.dtype = torch.bfloat16):
    """Rows of 6 MB, so that a copy takes longer than launching it."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=8,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().cuda()
    model.set_experts_implementation("eager")
    return model


def skip_unless_rows_can_be_page_locked() -> None:
    block = torch.ones(2**22)
    refused = page_lock.register(block, CUDA)
    if refused is not None:
        pytest.skip(f"this driver page-locks nothing: {refused}")
    page_lock.unregister(block.data_ptr(), CUDA)


@pytest.mark.parametrize("strategy", LOSSLESS, ids=lambda s: s.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_strategies_equal_the_stock_model_bit_for_bit(family, strategy):
    model = tiny(family)
    tokens, logits = greedy(model, ids())
    for slots in (4, 9, 24):
        if strategy is RESIDENT and slots < 24:
            continue
        mobile.attach(model, strategy, slots=slots, poison=True)
        assert type(model.mobile.link).__name__ == "StreamLink"
        ours = greedy(model, ids())
        mobile.detach(model)
        assert torch.equal(ours[0], tokens), slots
        assert torch.equal(ours[1], logits), slots


@pytest.mark.parametrize("family", FAMILIES)
def test_always_falling_back_equals_the_stock_model(family):
    model = tiny(family)
    expected = greedy(model, ids())
    mobile.attach(model, MOBILE, slots=8, gamma=1.1, poison=True)
    ours = greedy(model, ids())
    assert torch.equal(ours[1], expected[1])
    assert model.mobile.stats()["fallbacks"] == 9


@pytest.mark.parametrize("link_gb_per_s", [None, 1.0])
@pytest.mark.parametrize("slots", [8, 12, 40])
def test_real_copies_that_race_with_compute_change_no_token(slots, link_gb_per_s):
    """Large rows, evictions at every step, prefetches that are cancelled and promoted, a link slow enough to lose."""
    model = wide()
    expected = greedy(model, ids(), 24)
    for strategy, gamma in ((LRU, None), (ON_DEMAND_OVERLAP, None), (MOBILE, 1.1)):
        mobile.attach(model, strategy, slots=slots, gamma=gamma, link_gb_per_s=link_gb_per_s, poison=True)
        ours = greedy(model, ids(), 24)
        stats = model.mobile.stats()
        mobile.detach(model)
        assert torch.equal(ours[0], expected[0]), strategy.name
        assert torch.equal(ours[1], expected[1]), strategy.name
        assert stats["loads"] > 0
        assert stats["stall_seconds"] > 0


def test_a_fallback_in_between_gives_the_virtual_links_tokens():
    model = wide()
    results = []
    for link in ("virtual", "cuda"):
        mobile.attach(model, MOBILE, slots=40, gamma=0.02, link=link)
        results.append((greedy(model, ids(), 24)[0].tolist(), model.mobile.stats()["fallbacks"]))
        mobile.detach(model)
    assert results[0] == results[1]


def test_the_store_is_registered_where_it_lies_and_given_back():
    skip_unless_rows_can_be_page_locked()
    model = mobile.attach(wide(), LRU, slots=40)
    rows = model.mobile.store.rows
    assert all(layer.is_pinned() for layer in rows)
    kept = rows[0]
    mobile.detach(model)
    assert not kept.is_pinned()


def test_no_device_memory_is_taken_after_the_first_tokens():
    model = mobile.attach(wide(), LRU, slots=40)
    greedy(model, ids(), 32)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    greedy(model, ids(), 32)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_no_more_than_two_copies_are_ever_begun():
    model = mobile.attach(wide(), LRU, slots=40, link_gb_per_s=2.0)
    link, seen = model.mobile.link, []
    begin = link.channel.begin
    link.channel.begin = lambda key, slot: (seen.append(len(link._begun)), begin(key, slot))
    greedy(model, ids(), 8)
    assert seen
    assert max(seen) <= 1, "a copy was begun behind two others"


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_throttled_link_is_as_slow_as_asked(share):
    model = mobile.attach(wide(), ON_DEMAND_OVERLAP, slots=8)
    native = model.mobile.link.channel.native_gb_per_s
    mobile.detach(model)
    mobile.attach(model, ON_DEMAND_OVERLAP, slots=8, link_gb_per_s=share * native)
    link, engine = model.mobile.link, model.mobile
    begun = time.perf_counter()
    for number in range(64):  # two at a time are begun, so that the link never waits for the host
        link.submit((number % 4, number % 32), number % 8, demand=True)
    for number in range(64):
        link.wait((number % 4, number % 32))
    torch.cuda.synchronize()
    taken = time.perf_counter() - begun
    moved = 64 * engine.store.layout.nbytes / 1e9
    # Never faster than asked. Slower by what the host takes to begin a copy, about 40 us for one of 6 MB, which at half
    # of PCIe 5 takes 230 us: no share of the time, but an amount a copy. `test_device_time` has the device's own time.
    assert moved / taken <= 1.06 * share * native
    assert taken <= 1.15 * moved / (share * native) + 64 * 60e-6


def test_a_faster_link_than_there_is_is_refused():
    with pytest.raises(mobile.Refused, match="cannot be throttled"):
        mobile.attach(wide(layers=1), LRU, slots=8, link_gb_per_s=10_000)


def test_memory_caps_the_process():
    model = wide(layers=1)
    try:
        mobile.attach(model, LRU, memory="3GiB")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_exception_in_a_step_leaves_the_model_usable():
    model = wide()
    expected = greedy(model, ids(), 12)
    mobile.attach(model, MOBILE, slots=12, gamma=1.1, poison=True)
    run, calls = model.mobile.run_experts, 0

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return run(*arguments)

    model.mobile.run_experts = failing
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids(), 12)
    assert torch.equal(greedy(model, ids(), 12)[1], expected[1])


def test_a_checkpoint_loads_onto_the_gpu(tmp_path):
    model = wide(layers=2)
    expected = greedy(model, ids())
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    loaded = mobile.load(tmp_path, LRU, slots=40)
    assert loaded.device.type == "cuda"
    assert loaded.mobile.link.channel.native_gb_per_s > 1
    assert torch.equal(greedy(loaded, ids())[1], expected[1])


def test_the_ledger_knows_when_each_copy_ran():
    model = mobile.attach(wide(), LRU, slots=40)
    greedy(model, ids(), 8)
    loads = [event for event in model.mobile.ledger.events if event.what == "load"]
    assert len(loads) == model.mobile.stats()["loads"]
    nbytes = model.mobile.store.layout.nbytes
    speeds = sorted(nbytes / (event.end_ns - event.start_ns) for event in loads)
    assert 0.3 < speeds[len(speeds) // 2] / model.mobile.link.channel.native_gb_per_s < 1.7


# --- memory ---------------------------------------------------------------------------------------------


def test_memory_holds_for_a_model_whose_experts_lie_on_the_card():
    """They leave it before the cap is set, and come back after it is lifted: 4.8 GB of them, and a budget of 3 GiB."""
    with CUDA:  # made there
        model = wide(layers=24)
    expected = greedy(model, ids(), 12)
    try:
        mobile.attach(model, LRU, memory="3GiB")
        assert 0 < model.mobile.slots < 24 * 32
        assert torch.equal(greedy(model, ids(), 12)[1], expected[1])
        assert torch.cuda.memory_reserved() <= 3 * 2**30
        mobile.detach(model)
        assert torch.cuda.get_per_process_memory_fraction() == 1.0
        assert torch.equal(greedy(model, ids(), 12)[1], expected[1])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_model_deleted_without_detach_gives_back_its_slots_and_its_registrations():
    def serve() -> torch.Tensor:
        model = mobile.attach(wide(), LRU, slots=40)
        greedy(model, ids(), 8)
        held.append(weakref.ref(model.mobile.store))
        return model.mobile.store.rows[0]

    held: list[Any] = []
    serve()  # what a process allocates once is allocated now
    gc.collect()
    before = torch.cuda.memory_allocated()
    kept = serve()
    gc.collect()
    assert [store() for store in held] == [None, None]
    assert not kept.is_pinned()
    assert torch.cuda.memory_allocated() <= before + 2**20


# --- where rows cannot be page-locked ---------------------------------------------------------------------


class Unwilling:
    """The runtime, asked each time to page-lock what nobody can: its own error, left behind as it leaves it."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> Any:
        return self._runtime.cudaHostRegister(0, nbytes, flags)


@pytest.fixture
def unwilling(monkeypatch):
    runtime = torch.cuda.cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Unwilling(runtime))


def test_a_failed_registration_is_not_left_for_the_next_launch(unwilling):
    block = torch.ones(2**20)
    assert "error" in page_lock.register(block, CUDA)
    assert torch.ones(1000, device=CUDA).sum().item() == 1000
    assert not block.is_pinned()


@pytest.mark.parametrize("link_gb_per_s", [None, 1.0])
def test_without_page_locking_copies_come_from_ordinary_memory_and_are_exact(unwilling, link_gb_per_s):
    model = wide()
    expected = greedy(model, ids(), 24)
    for strategy, gamma in ((LRU, None), (ON_DEMAND_OVERLAP, None), (MOBILE, 1.1)):
        with pytest.warns(RuntimeWarning, match="does not page-lock"):
            mobile.attach(model, strategy, slots=12, gamma=gamma, link_gb_per_s=link_gb_per_s, poison=True)
        assert not model.mobile.link.channel.page_locked
        ours = greedy(model, ids(), 24)
        mobile.detach(model)
        assert torch.equal(ours[1], expected[1]), strategy.name


# --- the order of streams -----------------------------------------------------------------------------


def lone_channel(rows: int = 8, link_gb_per_s: float | None = None) -> tuple[HostStore, CudaChannel]:
    """Rows of 6 MB that say which they are, and a channel into four slots."""
    layout = layout_of({"w": torch.empty(1, 3 * 2**20, dtype=torch.bfloat16)})
    store = HostStore(layout, 1, rows)
    store.rows[0].copy_(torch.arange(rows)[:, None].expand_as(store.rows[0]))
    slots = torch.zeros(4, layout.numel, dtype=torch.bfloat16, device=CUDA)
    return store, CudaChannel(store, slots, lambda key: store.rows[key[0]][key[1]], link_gb_per_s)


def test_a_link_that_is_refused_leaves_no_row_registered():
    store, channel = lone_channel()
    slots = torch.zeros(4, store.layout.numel, dtype=torch.bfloat16, device=CUDA)
    channel.close()
    with pytest.raises(mobile.Refused, match="cannot be throttled") as caught:
        CudaChannel(store, slots, lambda key: store.rows[key[0]][key[1]], 10_000)
    assert caught.tb, "its frames hold the channel"
    assert not store.rows[0].is_pinned()


def test_poison_is_over_before_the_next_copy_into_its_slot_however_late_compute_is():
    model = mobile.attach(wide(), LRU, slots=40, poison=True)
    engine = model.mobile
    torch.cuda._sleep(100_000_000)  # tens of milliseconds of compute, behind which the slot is poisoned
    engine._emptied(3)
    engine.link.submit((2, 7), 3, demand=True)
    engine.link.wait((2, 7))
    torch.cuda.synchronize()
    assert torch.equal(engine.slot_rows[3].cpu(), engine.row((2, 7)))


def test_a_copy_that_one_stream_waits_for_is_waited_for_by_every_stream():
    model = mobile.attach(wide(), LRU, slots=40, poison=True)
    engine, other = model.mobile, torch.cuda.Stream()
    with torch.cuda.stream(engine.link.channel._stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds before the copy
    engine.link.submit((1, 5), 3, demand=True)
    engine.link.wait((1, 5))
    with torch.cuda.stream(other):
        engine.link.compute(0, "dense")
        seen = engine.slot_rows[3].clone()
    other.synchronize()
    assert torch.equal(seen.cpu(), engine.row((1, 5)))


def test_threads_on_streams_of_their_own_get_the_stock_models_tokens():
    model = wide()
    asked = [prompt(seed=seed).cuda() for seed in range(3)]
    expected = [greedy(model, each, 16)[1] for each in asked]
    mobile.attach(model, LRU, slots=24, link_gb_per_s=1.0, poison=True)
    found: dict[int, torch.Tensor] = {}

    def write(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found[number] = greedy(model, asked[number], 16)[1]
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(3))


# --- another card than the first ----------------------------------------------------------------------

two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two_cards
@pytest.mark.parametrize("strategy", [LRU, ON_DEMAND, MOBILE], ids=lambda s: s.name)
def test_a_model_on_the_second_card_is_served_there_while_the_first_is_current(strategy):
    model, asked = wide().to("cuda:1"), prompt().to("cuda:1")
    expected = greedy(model, asked, 16)
    gamma = 1.1 if strategy is MOBILE else None
    mobile.attach(model, strategy, slots=40, gamma=gamma, link_gb_per_s=2.0, poison=True)
    ours = greedy(model, asked, 16)
    assert torch.equal(ours[1], expected[1])
    assert model.mobile.slot_rows.device == torch.device("cuda:1")
    assert model.mobile.stats()["stall_seconds"] > 0
    loads = [event for event in model.mobile.ledger.events if event.what == "load"]
    assert all(event.end_ns > event.start_ns for event in loads)
    assert torch.cuda.current_device() == 0
    mobile.detach(model)


@two_cards
def test_links_are_measured_and_named_by_the_card_that_is_asked_about():
    assert gpu.cuda_uuid(0) != gpu.cuda_uuid(1)
    assert gpu.link_rates(1).pinned_gb_per_s > 1
    with torch.cuda.device(1):
        assert gpu.cuda_uuid() == gpu.cuda_uuid(1)
