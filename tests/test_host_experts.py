"""Experts that the CPU computes beside a device: on a thread of its own, with the same bits, while copies go on."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from conftest import greedy, prompt, tiny
from fake_cuda import card  # noqa: F401
from test_cpu_hybrid import ALWAYS

import mobile
from baselines.cpu_hybrid import CPU_HYBRID
from mobile.kernels import host_experts
from mobile.kernels.host_experts import CpuExperts
from mobile.ledger import Ledger
from mobile.links import cuda
from mobile.links.stream import StreamLink
from mobile.links.threads import ThreadChannel
from mobile.transfer import Reading, send
from tests.toy import CARD

CPU = torch.device("cpu")


@pytest.fixture
def aside(monkeypatch) -> None:
    """Have experts computed on their own thread on a CPU device too."""
    monkeypatch.setattr(host_experts, "beside", lambda device: True)


@pytest.fixture
def products(monkeypatch) -> list[str]:
    """The names of the threads that computed experts from host rows, as they come."""
    original, names = host_experts.expert_output, []

    def noting(*arguments: Any) -> torch.Tensor:
        names.append(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(host_experts, "expert_output", noting)
    return names


# --- the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("hardware", [CARD, ALWAYS], ids=["some on the CPU", "all on the CPU"])
@pytest.mark.parametrize("link", ["virtual", "paced"])
def test_tokens_and_logits_are_the_stock_models_bit_for_bit(aside, products, family, link, hardware, rows):
    model, ids = tiny(family), prompt(rows=rows)
    expected = greedy(model, ids)
    mobile.attach(model, CPU_HYBRID, slots=8, link=link, hardware=hardware, poison=True)
    ours = greedy(model, ids)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert set(products) == {"mobile-experts-0"}
    mobile.detach(model)
    assert "mobile-experts-0" not in {thread.name for thread in threading.enumerate()}


def test_the_ledger_is_the_one_without_a_thread(monkeypatch, products):
    ledgers = []
    for beside in (False, True):
        monkeypatch.setattr(host_experts, "beside", lambda device, beside=beside: beside)
        model = mobile.attach(tiny("olmoe"), CPU_HYBRID, slots=8, hardware=CARD)
        greedy(model, prompt())
        ledgers.append(model.mobile.ledger)
    assert ledgers[0].counters == ledgers[1].counters
    assert list(ledgers[0].events) == list(ledgers[1].events)
    assert set(products) == {"MainThread", "mobile-experts-0"}


def test_on_a_cpu_the_calling_thread_computes(products):
    model = mobile.attach(tiny("olmoe"), CPU_HYBRID, slots=8, hardware=ALWAYS)
    greedy(model, prompt(), 3)
    assert set(products) == {"MainThread"}
    assert not host_experts.beside(CPU)
    assert host_experts.beside(torch.device("cuda:0"))


@pytest.mark.parametrize("inference", [False, True])
def test_the_thread_computes_in_the_modes_of_its_caller(aside, inference):
    experts, seen = CpuExperts(CPU), []
    threads = torch.get_num_threads()

    def look() -> None:
        seen.append(
            (
                torch.is_inference_mode_enabled(),
                torch.is_grad_enabled(),
                torch.get_num_threads(),
                torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
            )
        )

    try:
        torch.set_num_threads(2)
        with torch.inference_mode(inference):
            experts.submit(look)
            with torch.autocast("cpu", torch.bfloat16):
                experts.submit(look)
        torch.set_num_threads(1)
        experts.submit(look)
        experts.join()
    finally:
        torch.set_num_threads(threads)
        experts.close()
    assert seen == [(inference, False, 2, None), (inference, False, 2, torch.bfloat16), (False, False, 1, None)]


# --- what goes wrong --------------------------------------------------------------------------------


def test_an_error_on_the_thread_is_raised_by_the_step_and_the_next_is_right(aside, monkeypatch):
    model, ids = tiny("olmoe"), prompt()
    expected = greedy(model, ids)
    mobile.attach(model, CPU_HYBRID, slots=8, link="paced", hardware=ALWAYS, poison=True)
    original, calls = host_experts.expert_output, []

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 30:
            raise RuntimeError("out of something")
        return original(*arguments)

    monkeypatch.setattr(host_experts, "expert_output", failing)
    with pytest.raises(RuntimeError, match="out of something"):
        greedy(model, ids)
    assert torch.equal(greedy(model, ids)[1], expected[1])
    mobile.detach(model)
    assert torch.equal(greedy(model, ids)[1], expected[1])


def test_an_interrupt_while_the_cpu_is_waited_for_leaves_nothing_under_way(aside, monkeypatch):
    model, ids = tiny("olmoe"), prompt()
    expected = greedy(model, ids)
    mobile.attach(model, CPU_HYBRID, slots=8, link="paced", hardware=ALWAYS, poison=True)
    original, under_way, waits = host_experts.expert_output, [], []

    def slow(*arguments: Any) -> torch.Tensor:
        under_way.append(None)
        time.sleep(0.002)
        under_way.pop()
        return original(*arguments)

    wait = host_experts.Job.wait

    def interrupted(job: Any) -> None:
        waits.append(None)
        if len(waits) == 20:
            raise KeyboardInterrupt
        wait(job)

    monkeypatch.setattr(host_experts, "expert_output", slow)
    monkeypatch.setattr(host_experts.Job, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids)
    assert torch.equal(greedy(model, ids)[1], expected[1])
    mobile.detach(model)
    assert not under_way


def test_every_error_waits_for_the_products_after_it(aside):
    experts, done = CpuExperts(CPU), []

    def failing() -> None:
        raise ValueError("first")

    experts.submit(failing)
    experts.submit(lambda: (time.sleep(0.01), done.append(None)))
    with pytest.raises(ValueError, match="first"):
        experts.join()
    assert done, "a row could be given back while it is read"
    experts.join()
    experts.close()


# --- copies go on, and waiting is told ---------------------------------------------------------------


class Gate:
    """A channel whose copies end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.over: set[int] = set()

    def begin(self, key: Any, slot: int) -> None:
        self.begun.append(slot)

    def ended(self, slot: int) -> bool:
        return slot in self.over

    def span(self, slot: int) -> tuple[int, int]:
        return 0, 0

    def stalled_ns(self) -> int:
        return 0


@pytest.mark.parametrize("beside", [False, True])
def test_queued_copies_begin_between_the_products(monkeypatch, beside):
    """Two may be under way, and end during each product: the next two have to begin before the next product is over."""
    monkeypatch.setattr(host_experts, "beside", lambda device: beside)
    experts, channel, found = CpuExperts(CPU), Gate(), []
    link = StreamLink(channel, 8, Ledger(), lambda key, slot: None, processor=experts)
    for slot in range(6):
        link.submit((0, slot), slot, demand=False)
    assert channel.begun == [0, 1], "as many as may be under way"

    def product(begun: int) -> None:
        until = time.monotonic() + 5
        while len(channel.begun) < begun and time.monotonic() < until:
            time.sleep(0.001)
        found.append(len(channel.begun))
        channel.over.update(channel.begun)

    for begun in (2, 4, 6):
        experts.submit(partial(product, begun))
    link.join_cpu((0, 9))
    assert found == [2, 4, 6]
    experts.close()


def test_waiting_for_the_cpu_is_a_stall(aside):
    ledger = Ledger()
    experts, channel = CpuExperts(CPU), ThreadChannel(lambda key, slot: None)
    link = StreamLink(channel, 8, ledger, lambda key, slot: None, processor=experts)
    experts.submit(lambda: time.sleep(0.02))
    link.join_cpu((0, 0))
    assert ledger.counters.cpu_stall_ns == ledger.counters.stall_ns
    assert ledger.counters.cpu_stall_ns >= 10_000_000
    link.join_cpu((0, 0))
    assert ledger.counters.cpu_stall_ns < 1_000_000_000
    link.close()
    experts.close()


def test_the_device_goes_on_while_the_cpu_computes(aside):
    """The call that submits returns before the product is over."""
    experts, may_end = CpuExperts(CPU), threading.Event()
    experts.submit(lambda: may_end.wait(10))
    may_end.set()  # would never be reached by a thread that computes itself
    experts.join()
    experts.close()


# --- over a CUDA channel ------------------------------------------------------------------------------


@pytest.mark.parametrize("gb_per_s", [0.002, 25.0], ids=["slow link", "fast link"])
def test_it_is_exact_and_races_with_no_copy(card, aside, products, gb_per_s):  # noqa: F811
    model, ids = tiny("qwen3_moe"), prompt()
    expected = greedy(model, ids)
    card.gb_per_s = gb_per_s
    mobile.attach(model, CPU_HYBRID, slots=6, link="virtual", hardware=CARD, poison=True)
    engine = model.mobile
    engine.link.close()
    card.watch(engine.slot_rows)
    engine.connect(cuda.connect)
    ours = greedy(model, ids)
    assert card.races == []
    assert torch.equal(ours[1], expected[1])
    assert set(products) == {"mobile-experts-0"}
    mobile.detach(model)


def test_experts_are_placed_by_the_link_as_it_was_measured(card):  # noqa: F811
    """And not by the rate of the profile, which another machine had."""
    shares = {}
    for gb_per_s in (0.0005, 25.0):
        card.gb_per_s = gb_per_s
        model = tiny("qwen3_moe")
        mobile.attach(model, CPU_HYBRID, slots=6, link="virtual", hardware=CARD)
        engine = model.mobile
        engine.link.close()
        engine.connect(cuda.connect)
        rate = engine.link.channel.native_gb_per_s
        assert rate == pytest.approx(gb_per_s)
        copying = CARD.link_latency_seconds + engine.store.layout.nbytes / (rate * 1e9)
        assert engine._cost.load_ns == round(max(copying, CARD.host_copy_seconds) * 1e9)
        greedy(model, prompt())
        stats = engine.stats()
        shares[gb_per_s] = stats["cpu_experts"] / (stats["cpu_experts"] + stats["demand_loads"])
        mobile.detach(model)
    assert shares[0.0005] > shares[25.0]


def test_a_throttled_link_is_measured_as_it_is_throttled(card):  # noqa: F811
    model = tiny("olmoe")
    mobile.attach(model, CPU_HYBRID, slots=6, link="virtual", link_gb_per_s=12.5, hardware=CARD)
    model.mobile.link.close()
    model.mobile.connect(cuda.connect)
    assert model.mobile.link.gb_per_s == 12.5
    mobile.detach(model)


# --- tensors on their way -----------------------------------------------------------------------------


class OnSecondCard(torch.Tensor):
    """A tensor that says that it lies there."""

    device = torch.device("cuda:1")


def test_a_reading_waits_for_what_was_launched_before_it_and_for_nothing_more(card):  # noqa: F811
    values = torch.arange(4).as_subclass(OnSecondCard)
    stream = card.current(torch.device("cuda:1"))
    stream.launch()
    reading = Reading([values])
    launched = stream.clock[stream]
    stream.launch()
    assert card.host.get(stream, 0) == 0, "nothing waits for it yet"
    reading.get()
    assert launched <= card.host[stream] < stream.clock[stream]


def test_what_is_sent_to_a_gpu_leaves_page_locked_memory_and_nothing_waits(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: calls.append(non_blocking) or self)
    send(torch.arange(3), torch.device("cuda:0"))
    assert calls == ["pinned", True]
    calls.clear()
    send(torch.arange(3), CPU)
    assert calls == [True], "a CPU has nothing to page-lock for"
