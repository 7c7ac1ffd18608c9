"""Memory that runs out, at any allocation: attach and load are refused and leave what was there; a step says why."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import greedy, prompt, tiny
from fake_cuda import Card, Event, card  # noqa: F401
from test_attach_interrupts import Whole
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mobile
from mobile.links import cuda
from mobile.links.registry import LinkKind
from mobile.runtime import attachment, device_memory
from mobile.runtime import engine as engine_module
from mobile.store import HostStore

CUDA_WORDS = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Allocator(TorchDispatchMode):
    """Counts what takes memory, and has none for the allocation number `failing` (from 1)."""

    def __init__(self, failing: int | None) -> None:
        super().__init__()
        self.failing, self.taken = failing, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {storage(given) for given in tree_leaves((args, kwargs)) if isinstance(given, torch.Tensor)}
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor) and each.numel()]
        if any(storage(each) not in known for each in made):
            self.taken += 1
            if self.taken == self.failing:
                raise torch.OutOfMemoryError(CUDA_WORDS)
        return result


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def allocations(action: Callable[[], object]) -> int:
    with Allocator(None) as counting:
        action()
    return counting.taken


@contextmanager
def fails_at(number: int) -> Iterator[None]:
    with Allocator(number):
        yield


@pytest.fixture
def dressed(card, monkeypatch):  # noqa: F811
    """Attach as on a card: copies over a CUDA channel, a cap on what may be allocated."""
    card.cap = 1.0

    def set_cap(fraction: float, device: Any = None) -> None:
        card.cap = fraction

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_cap)
    monkeypatch.setattr(engine_module, "lift_cap", lambda device: set_cap(1.0))
    plan = attachment.plan_attach
    monkeypatch.setattr(attachment, "plan_attach", lambda *arguments: replace(plan(*arguments), cap=0.5))
    monkeypatch.setattr(LinkKind, "connect", lambda self, ends: cuda.connect(ends))
    return card


@pytest.mark.parametrize(
    ("strategy", "gamma", "rows", "least"),
    [("lru", None, "as-is", 5), ("mobile", 1.1, "as-is", 20), ("speculating-experts-verify", None, "int8", 20)],
)
def test_attach_without_memory_for_its_nth_allocation_is_refused_and_leaves_the_model(
    dressed, strategy, gamma, rows, least
):
    whole = Whole(tiny("olmoe"))

    def attach() -> None:
        mobile.attach(whole.model, strategy, slots=8, gamma=gamma, link="virtual", rows=rows)

    count = allocations(attach)
    assert dressed.cap == 0.5
    mobile.detach(whole.model)
    whole.check("detach")
    refusals = []
    for number in (*range(1, 9), *range(9, count - 20, count // 20), *range(count - 20, count + 1)):
        try:
            with fails_at(number):
                attach()
        except mobile.Refused as refusal:
            refusals.append(str(refusal))
        else:  # a check that gives up by itself where it cannot run
            mobile.detach(whole.model)
        whole.check(f"allocation {number} of {count}")
        assert dressed.cap == 1.0, number
        assert dressed.registered == {}, number
    assert len(refusals) >= least
    assert all("ran out of memory" in said or "could not be taken" in said for said in refusals)
    assert not any("\n" in said for said in refusals)


@pytest.mark.parametrize("number", [1, 2, 3, 30, 300])
def test_events_that_the_driver_has_no_memory_for_are_a_refusal(dressed, monkeypatch, number):
    whole, made = Whole(tiny("olmoe")), []
    original = Event.__init__

    def counted(self: Event, *arguments: Any, **options: Any) -> None:
        made.append(self)
        if len(made) == number:
            raise RuntimeError("CUDA error: out of memory")
        original(self, *arguments, **options)

    monkeypatch.setattr(Event, "__init__", counted)
    with pytest.raises(mobile.Refused, match=r"Attaching the model ran out of memory \(CUDA error: out of memory\)"):
        mobile.attach(whole.model, "lru", slots=8, link="virtual")
    whole.check("events")
    assert (dressed.cap, dressed.registered) == (1.0, {})


def test_a_cap_that_cannot_be_set_leaves_the_model(dressed, monkeypatch):
    whole = Whole(tiny("olmoe"))

    def none_left(fraction: float, device: Any = None) -> None:
        raise torch.OutOfMemoryError(CUDA_WORDS)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", none_left)
    with pytest.raises(mobile.Refused, match="Attaching the model ran out of memory"):
        mobile.attach(whole.model, "lru", slots=8, link="virtual")
    whole.check("cap")


def test_slots_are_gone_before_the_experts_come_back(dressed, monkeypatch):
    """An error's traceback holds them, and a card that held the experts alone has no room for both."""
    whole, held = Whole(tiny("olmoe")), []
    slots, give_back = HostStore.slots, HostStore.give_back

    def noting(self: HostStore, *arguments: Any) -> torch.Tensor:
        taken = slots(self, *arguments)
        held.append(torch.multiprocessing.reductions.StorageWeakRef(taken.untyped_storage()))
        return taken

    def checked(self: HostStore, modules: Any) -> None:
        assert [one.expired() for one in held] == [True]
        give_back(self, modules)

    monkeypatch.setattr(HostStore, "slots", noting)
    monkeypatch.setattr(HostStore, "give_back", checked)
    monkeypatch.setattr(
        cuda.CudaChannel, "_measure", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    with pytest.raises(mobile.Refused, match="ran out of memory") as caught:
        mobile.attach(whole.model, "lru", slots=8, link="virtual")
    assert caught.tb
    whole.check("slots")


def test_detach_without_memory_is_refused_and_goes_on_when_it_is_called_again():
    whole = Whole(tiny("olmoe"))
    mobile.attach(whole.model, "lru", slots=8)
    count = allocations(lambda: mobile.detach(whole.model))
    assert count >= 6, "two matrices a layer"
    for number in range(1, count + 1):
        mobile.attach(whole.model, "lru", slots=8)
        with fails_at(number), pytest.raises(mobile.Refused, match=r"make room there and call mobile\.detach\(model\)"):
            mobile.detach(whole.model)
        mobile.detach(whole.model)
        whole.check(f"detach, {number}")


def test_host_memory_that_runs_out_is_a_refusal(monkeypatch):
    whole = Whole(tiny("olmoe"))

    def full(*arguments: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(HostStore, "__init__", full)
    with pytest.raises(mobile.Refused, match="Making room for the experts in host memory ran out of memory"):
        mobile.attach(whole.model, "lru", slots=8)
    whole.check("host memory")


def test_load_without_memory_is_refused(tmp_path):
    model = tiny("olmoe")
    expected = greedy(model, prompt())
    model.save_pretrained(tmp_path)
    count = allocations(lambda: mobile.load(tmp_path, "lru", slots=8))
    refused = 0
    for number in range(1, count + 1, max(1, count // 25)):
        try:
            with fails_at(number):
                loaded = mobile.load(tmp_path, "lru", slots=8)
        except mobile.Refused:
            refused += 1
        else:
            assert torch.equal(greedy(loaded, prompt())[1], expected[1])
    assert refused > 5
    assert torch.equal(greedy(mobile.load(tmp_path, "lru", slots=8), prompt())[1], expected[1])


# --- a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "gamma"), [("lru", None), ("mobile", 1.1)])
def test_a_step_without_memory_says_what_to_do_and_the_next_one_is_whole(strategy, gamma):
    model, ids = tiny("olmoe"), prompt()
    expected = greedy(model, ids)
    mobile.attach(model, strategy, slots=8, gamma=gamma, poison=True)
    count = allocations(lambda: greedy(model, ids))
    inside = 0
    for number in range(count // 40, count, count // 12):
        with pytest.raises(torch.OutOfMemoryError) as caught, fails_at(number):
            greedy(model, ids)
        said = "".join(traceback.format_exception_only(caught.value))
        assert CUDA_WORDS in said
        inside += "larger context_tokens or fewer slots" in said  # else it was in generate()'s own work
        assert torch.equal(greedy(model, ids)[1], expected[1])
    assert inside > 6


def test_other_errors_of_a_step_say_nothing_of_memory(monkeypatch):
    model = mobile.attach(tiny("olmoe"), "lru", slots=8)

    def failing(*arguments: Any) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(model.mobile, "run_experts", failing)
    with pytest.raises(RuntimeError) as caught:
        greedy(model, prompt())
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(CUDA_WORDS), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, is_one):
    assert device_memory.is_out_of_memory(error) is is_one
