"""Whatever breaks a generation off, the next one is the stock model's; and several at once are each one alone."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt, tiny
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import mobile
from mobile.engine import Engine

ATTACHED = [("lru", None), ("mobile", 1.1)]
TOKENS = 5
MIDDLE = 0.3  # a gamma at which the tiny models fall back for some tokens and not for others


class Injected(Exception):
    """What these tests break things with."""


class Faulty:
    """Stock outcome and attached model of one family, and what must hold after any accident."""

    def __init__(self, strategy: str, gamma: float | None, link: str = "virtual", family: str = "olmoe") -> None:
        self.model, self.ids = tiny(family), prompt()
        self.weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.tokens, self.logits = greedy(self.model, self.ids, tokens=TOKENS)
        mobile.attach(self.model, strategy, slots=8, gamma=gamma, link=link, poison=True)
        self.engine: Engine = self.model.mobile
        self.routers = self.top_ks()

    def top_ks(self) -> list[int]:
        return [layer.top_k for layer in self.engine.layers]

    def generate(self) -> tuple[torch.Tensor, torch.Tensor]:
        return greedy(self.model, self.ids, tokens=TOKENS)

    def check(self, where: object = "") -> None:
        """Routers as before, at once; and the next generation is the stock model's, with no poison in it."""
        assert self.top_ks() == self.routers, where
        tokens, logits = self.generate()
        assert not logits.isnan().any(), where
        assert torch.equal(tokens, self.tokens), where
        assert torch.equal(logits, self.logits), where

    def leave(self) -> None:
        """Detached, every bit of the model is what it was, and so is what it writes."""
        mobile.detach(self.model)
        after = self.model.state_dict()
        assert after.keys() == self.weights.keys()
        assert all(torch.equal(weight, after[name]) for name, weight in self.weights.items())
        assert self.top_ks() == self.routers
        assert torch.equal(self.generate()[1], self.logits)


class Nth:
    """Stands in for a function and raises in its n-th call from now; counts calls, of any thread."""

    def __init__(self, function: Callable) -> None:
        self.function, self.calls, self.at = function, 0, 0

    def arm(self, at: int) -> None:
        self.calls, self.at = 0, at

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        if self.calls == self.at:
            raise Injected(f"call {self.at}")
        return self.function(*args, **kwargs)


@pytest.fixture
def failing_fill(monkeypatch) -> Nth:
    """`Engine.fill`, which copies a row under the virtual and the paced link, as something that can be made to fail."""
    nth = Nth(Engine.fill)
    monkeypatch.setattr(Engine, "fill", lambda self, key, slot: nth(self, key, slot))
    return nth


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_an_exception_at_any_expert_call_leaves_the_next_generation_whole(strategy, gamma):
    faulty = Faulty(strategy, gamma)
    experts = faulty.engine.run_experts = Nth(faulty.engine.run_experts)
    faulty.check()
    calls = experts.calls
    assert calls == 3 * (1 + (TOKENS - 1) * (2 if strategy == "mobile" else 1))
    for at in range(1, calls + 1):
        experts.arm(at)
        with pytest.raises(Injected):
            faulty.generate()
        faulty.check(at)
    faulty.leave()


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_a_copy_that_fails_in_virtual_time_reaches_the_caller_and_the_next_generation_is_whole(
    strategy, gamma, failing_fill
):
    faulty = Faulty(strategy, gamma)
    failing_fill.arm(0)
    faulty.generate()
    copies = failing_fill.calls
    assert copies > 40
    raised = 0
    for at in range(1, copies + 1):
        failing_fill.arm(at)
        try:
            tokens, logits = faulty.generate()
        except Injected:
            raised += 1
        else:  # warm slots: fewer copies than when cold
            assert torch.equal(tokens, faulty.tokens)
            assert torch.equal(logits, faulty.logits)
        faulty.check(at)
    assert raised > copies / 2
    faulty.leave()


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_a_copy_that_fails_on_its_thread_reaches_the_caller_or_was_never_needed(strategy, gamma, failing_fill):
    faulty = Faulty(strategy, gamma, link="paced")
    raised = 0
    for at in range(1, 60, 3):
        failing_fill.arm(at)
        try:
            tokens, logits = faulty.generate()
        except Injected:
            raised += 1
        else:
            assert torch.equal(tokens, faulty.tokens)
            assert torch.equal(logits, faulty.logits)
        failing_fill.arm(0)
        faulty.check(at)
    assert raised
    faulty.leave()


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_copies_that_take_long_and_differ_change_nothing(strategy, gamma, monkeypatch):
    dice, fill = random.Random(3), Engine.fill

    def slow(self: Engine, key: tuple[int, int], slot: int) -> None:
        time.sleep(dice.uniform(0.001, 0.003))
        fill(self, key, slot)

    monkeypatch.setattr(Engine, "fill", slow)
    faulty = Faulty(strategy, gamma, link="paced")
    for _ in range(2):
        faulty.check()
    assert faulty.model.mobile.stats()["stall_seconds"] > 0
    faulty.leave()


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Ctrl-C, once, this long after the block began; the block must wait for it."""

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, pressed)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("link", ["virtual", "paced"])
@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_ctrl_c_at_a_random_moment_leaves_the_next_generation_whole(strategy, gamma, link):
    faulty, dice = Faulty(strategy, gamma, link=link), random.Random(5)
    for _ in range(25):
        seconds = dice.uniform(0.001, 0.04)
        with pytest.raises(KeyboardInterrupt), alarm(seconds):
            while True:
                faulty.generate()
        faulty.check(seconds)
    faulty.leave()


ENGINE_FILES = str(Path(mobile.__file__).parent)


class Interrupt:
    """A trace function that presses Ctrl-C at the n-th line, call or return of the engine's own code.

    Returns count as well, since a context manager entered and not yet known to be entered is where cleaning up fails.
    """

    def __init__(self, at: int = 0) -> None:
        self.at, self.seen, self.where = at, 0, ""

    def __call__(self, frame, event: str, _argument: object):
        name = frame.f_code.co_filename
        if not (name.startswith(ENGINE_FILES) or name.endswith(("contextlib.py", "threading.py"))):
            return None
        self.seen += 1
        if self.seen == self.at:
            self.where = f"{event} at {name}:{frame.f_lineno}"
            raise KeyboardInterrupt
        return self

    def generate(self, faulty: Faulty) -> None:
        sys.settrace(self)
        try:
            faulty.generate()
        finally:
            sys.settrace(None)
