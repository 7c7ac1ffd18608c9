"""Attach and detach broken off at any line: the model is the stock one, or detach makes it that."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from conftest import greedy, prompt, tiny
from interrupts import Interrupt
from torch import nn
from transformers import PreTrainedModel

import mobile
from mobile.live_model.overrides import Overrides
from mobile.runtime.attachment import Engine
from mobile.store import HostStore

STRATEGIES = [
    ("lru", None, "virtual"),
    ("lru", None, "paced"),
    ("lru", None, "disk"),
    ("mobile", 1.1, "virtual"),
    ("speculating-experts-verify", None, "virtual"),
]

BESIDE = ("contextlib.py",)  # a thread's start is not ours, and Python's own leaves a lock behind


class Whole:
    """A model before it was attached, and what must be the same when it is not attached any more."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.written = model, greedy(model, prompt(), tokens=3)
        self.weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        self.attributes = self.seen()

    def seen(self) -> list[tuple]:
        """The attributes of every module, the hooks among them, the parameters' classes, and Transformers' settings."""
        return [
            (sorted(vars(module)), *(len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")))
            for module in self.model.modules()
        ] + [
            (
                self.model.generation_config.disable_compile
                if hasattr(self.model.generation_config, "disable_compile")
                else None,
                *(type(weight) for weight in self.model.parameters()),
                *(weight.requires_grad for weight in self.model.parameters()),
            )
        ]

    def check(self, where: str) -> None:
        after = self.model.state_dict()
        assert not hasattr(self.model, "mobile"), where
        assert torch.is_grad_enabled(), where
        assert not torch.is_inference_mode_enabled(), where
        assert self.seen() == self.attributes, where
        assert after.keys() == self.weights.keys(), where
        assert all(torch.equal(weight, after[name]) for name, weight in self.weights.items()), where
        tokens, logits = greedy(self.model, prompt(), tokens=3)
        assert torch.equal(tokens, self.written[0]), where
        assert torch.equal(logits, self.written[1]), where

    def broken_off(self, interrupt: Interrupt, action: Callable[[], object]) -> bool:
        """Whether the interrupt broke it off; in any case the model is whole then, or detach makes it whole."""
        try:
            interrupt.during(action)
            pressed = False
        except KeyboardInterrupt:
            pressed = True
        if hasattr(self.model, "mobile"):
            mobile.detach(self.model)
        self.check(interrupt.where)
        return pressed


def assert_no_thread_beside(before: set[threading.Thread]) -> None:
    """A link's thread ends when the link is collected, if nothing ended it before."""
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive(), thread.name


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("strategy", "gamma", "link"), STRATEGIES)
def test_ctrl_c_at_any_line_of_attach_leaves_the_stock_model(strategy, gamma, link, tmp_path):
    whole, counting, threads = Whole(tiny("olmoe")), Interrupt(beside=BESIDE), set(threading.enumerate())

    def attach() -> None:
        store = tmp_path if link == "disk" else None
        mobile.attach(whole.model, strategy, slots=8, gamma=gamma, link=link, store=store)

    for during in (lambda action: action(), counting.during):  # the first time strategies are looked up, and more
        during(attach)
        mobile.detach(whole.model)
    lines = counting.every_line
    assert len(lines) > 300
    chosen = lines if (strategy, link) == ("lru", "virtual") else lines[::9]  # most are the same ones again
    broken_off = sum(whole.broken_off(Interrupt(at, beside=BESIDE), attach) for at in chosen)
    assert broken_off > 0.9 * len(chosen)
    assert_no_thread_beside(threads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("link", ["virtual", "paced", "disk"])
def test_ctrl_c_at_any_line_of_detach_leaves_a_model_that_detach_makes_the_stock_one(link, tmp_path):
    whole, counting, threads = Whole(tiny("olmoe")), Interrupt(beside=BESIDE), set(threading.enumerate())
    store = tmp_path if link == "disk" else None
    mobile.attach(whole.model, "mobile", slots=8, gamma=1.1, link=link, store=store)
    counting.during(lambda: mobile.detach(whole.model))
    assert len(counting.every_line) > 80
    for at in counting.every_line:
        mobile.attach(whole.model, "lru", slots=8, link=link, store=store)
        greedy(whole.model, prompt(), tokens=2)
        whole.broken_off(Interrupt(at, beside=BESIDE), lambda: mobile.detach(whole.model))
    assert_no_thread_beside(threads)


class Once:
    """Stands in for a method and raises at its n-th call from now, once."""

    def __init__(self, owner: type, name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, method = at, getattr(owner, name)

        def counted(*arguments: object, **named: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return method(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_ctrl_c_between_two_layers_and_again_while_that_is_undone(layers, monkeypatch):
    """As an impatient user presses it: the experts of some layers are in the store and those of others are not."""
    whole = Whole(tiny("olmoe"))

    def stopped(method: Callable) -> Callable:
        def after(store: HostStore, modules: list[nn.Module]) -> None:
            method(store, modules[:layers])
            raise KeyboardInterrupt

        return after

    with monkeypatch.context() as patched:
        patched.setattr(HostStore, "take", stopped(HostStore.take))
        patched.setattr(HostStore, "give_back", stopped(HostStore.give_back))
        with pytest.raises(KeyboardInterrupt):
            mobile.attach(whole.model, "lru", slots=8)
    with pytest.raises(mobile.Refused, match=r"broken off; call mobile\.detach"):
        whole.model(prompt())
    with pytest.raises(mobile.Refused, match="already attached"):
        mobile.attach(whole.model, "lru", slots=8)
    mobile.detach(whole.model)
    whole.check("attach")
    mobile.attach(whole.model, "mobile", slots=8, gamma=1.1)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(HostStore, "give_back", stopped(HostStore.give_back))
            with pytest.raises(KeyboardInterrupt):
                mobile.detach(whole.model)
        with pytest.raises(mobile.Refused, match=r"broken off; call mobile\.detach"):
            greedy(whole.model, prompt())
    mobile.detach(whole.model)
    whole.check("detach")


@pytest.mark.parametrize(("owner", "name"), [(Engine, "close"), (Overrides, "undo"), (Engine, "begin_cold")])
def test_a_second_interrupt_while_the_first_is_undone(owner, name, monkeypatch):
    whole = Whole(tiny("olmoe"))
    for at in (1, 2):
        with monkeypatch.context() as patched:
            Once(owner, name, at, patched)
            Once(Engine, "allocate", 1, patched)
            with pytest.raises(KeyboardInterrupt):
                mobile.attach(whole.model, "lru", slots=8)
        if hasattr(whole.model, "mobile"):
            mobile.detach(whole.model)
        whole.check(name)


def test_slots_that_do_not_fit_are_refused_and_leave_the_stock_model(monkeypatch):
    """The memory is asked for last, when the experts have left the device."""
    whole, zeros = Whole(tiny("olmoe")), torch.zeros

    def full(*size: int, **named: object) -> torch.Tensor:
        if size[0] == 8 + 2:
            assert not any(weight.numel() for weight in whole.model.model.layers[0].mlp.experts.parameters())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*size, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", full)
        with pytest.raises(mobile.Refused, match="could not be taken on cpu; give fewer slots"):
            mobile.attach(whole.model, "lru", slots=8)
    whole.check("memory")
