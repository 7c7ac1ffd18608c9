"""Whatever breaks a generation off, the next one is the stock model's; and several at once are each one alone."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import pytest
import torch
from conftest import greedy, prompt, tiny
from interrupts import Interrupt
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import mobile
from mobile.runtime.engine import Engine

ATTACHED = [("lru", None), ("mobile", 1.1)]
TOKENS = 5
MIDDLE = 0.3  # a gamma at which the tiny models fall back for some tokens and not for others


class Injected(Exception):
    """The error that these tests break things with."""


class Faulty:
    """Stock outcome and attached model of one family, and what must hold after any accident."""

    def __init__(self, strategy: str, gamma: float | None, link: str = "virtual", family: str = "olmoe") -> None:
        self.model, self.ids = tiny(family), prompt()
        self.weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.tokens, self.logits = greedy(self.model, self.ids, tokens=TOKENS)
        store = tempfile.mkdtemp() if link == "disk" else None
        mobile.attach(self.model, strategy, slots=8, gamma=gamma, link=link, store=store, poison=True)
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

    def leave(self, where: object = "") -> None:
        """Detached, every bit of the model is what it was, and so is what it writes."""
        mobile.detach(self.model)
        after = self.model.state_dict()
        assert after.keys() == self.weights.keys()
        assert all(torch.equal(weight, after[name]) for name, weight in self.weights.items())
        assert self.top_ks() == self.routers, where
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
        failing_fill.arm(0)
        faulty.check(at)
    assert raised > copies / 2
    faulty.leave()


@pytest.mark.parametrize("link", ["paced", "disk"])
@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_a_copy_that_fails_on_its_thread_reaches_the_caller_or_was_never_needed(strategy, gamma, failing_fill, link):
    faulty = Faulty(strategy, gamma, link=link)
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


def interrupted_after(seconds: float, generate: Callable[[], object]) -> bool:
    """Call `generate` again and again until Ctrl-C, this long after the beginning; whether it was broken off.

    Python swallows an interrupt that comes inside a finalizer, and then nothing was. One on PyTorch's own line that
    ends the `no_grad` around Transformers' generate() leaves gradients off, as it does for a stock model.
    """
    pressed: list[bool] = []
    gradients = torch.is_grad_enabled()

    def press(*_: object) -> None:
        pressed.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while not pressed:
            generate()
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(gradients)
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("link", ["virtual", "paced", "disk"])
@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_ctrl_c_at_a_random_moment_leaves_the_next_generation_whole(strategy, gamma, link):
    faulty, dice, broken_off = Faulty(strategy, gamma, link=link), random.Random(5), 0
    for _ in range(25):
        seconds = dice.uniform(0.001, 0.04)
        broken_off += interrupted_after(seconds, faulty.generate)
        faulty.check(seconds)
    assert broken_off
    faulty.leave()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("link", ["virtual", "paced", "disk"])
@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_ctrl_c_at_a_line_of_the_engine_leaves_the_next_generation_whole(strategy, gamma, link):
    """Repeatable, unlike an alarm. The exception is kept for a while, as an interactive session does."""
    faulty, counting, dice = Faulty(strategy, gamma, link=link), Interrupt(), random.Random(11)
    counting.during(faulty.generate)
    assert counting.seen > 2000
    for at in sorted(dice.sample(range(1, counting.seen // 2), 20)):
        interrupt, kept = Interrupt(at), []
        try:
            interrupt.during(faulty.generate)
        except KeyboardInterrupt as pressed:
            kept.append(pressed)
        faulty.check(interrupt.where)
        kept.clear()
        faulty.check(interrupt.where)
    faulty.leave()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("then", ["check", "leave"])
def test_ctrl_c_where_routers_are_told_their_top_k_leaves_none_halved(then):
    """Every line, call and return of the first little pass's way in and out, which chance would seldom hit."""
    faulty, at = Faulty("mobile", 1.1), 0
    while True:
        at += 1
        interrupt = Interrupt(at, only=("little_k", "top_k_of", "_all_k", "passing", "step", "__enter__", "__exit__"))
        try:
            interrupt.during(faulty.generate)
        except KeyboardInterrupt:
            getattr(faulty, then)(interrupt.where)
        if at == 70 or not interrupt.where:
            break
        if then == "leave":
            mobile.attach(faulty.model, "mobile", slots=8, gamma=1.1, poison=True)
            faulty.engine = faulty.model.mobile
    assert at == 70


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_where_a_step_turns_gradients_off_and_on_leaves_them_on():
    faulty, at = Faulty("lru", None), 0
    while True:
        at += 1
        interrupt = Interrupt(at, only=("step", "run", "_alone"))
        try:
            interrupt.during(lambda: faulty.model(faulty.ids))
        except KeyboardInterrupt:
            assert torch.is_grad_enabled(), interrupt.where
            faulty.check(interrupt.where)
        if not interrupt.where:
            break
    assert at > 20
    faulty.leave()


def test_an_old_exception_let_go_of_in_the_middle_of_a_step_disturbs_nothing():
    """Ctrl-C at the return of a context's entry leaves the context open; closing it late must change nothing."""
    faulty, at = Faulty("mobile", 0.0), 0
    faulty.tokens, faulty.logits = faulty.generate()  # with half the experts
    run = faulty.engine.run_experts
    while True:
        at += 1
        interrupt, kept = Interrupt(at, only=("__enter__",), events=("return",)), []
        try:
            interrupt.during(faulty.generate)
        except KeyboardInterrupt as pressed:
            kept.append(pressed)
        if not interrupt.where:
            break
        calls = 0

        def letting_go(*arguments, kept=kept):
            nonlocal calls
            calls += 1
            if calls == 5:  # in a little pass
                kept.clear()
            return run(*arguments)

        faulty.engine.run_experts = letting_go
        faulty.check(interrupt.where)
        faulty.engine.run_experts = run
    assert at > 4


@pytest.mark.parametrize("link", ["virtual", "paced", "disk"])
@pytest.mark.parametrize("recovery", ["residency.abandon", "link.reset", "residency.preload_all"])
def test_a_second_exception_during_the_recovery_from_the_first(recovery, link):
    """Whether it comes while the broken step is settled or while the next one starts cold."""
    faulty = Faulty("mobile", 1.1, link=link)
    for at in (1, 8, 17):
        submit = faulty.engine.link.submit = Nth(faulty.engine.link.submit)  # leaves an expert that nobody loads
        submit.arm(at)
        part, name = recovery.split(".")
        owner = getattr(faulty.engine, part) if name != "preload_all" else type(faulty.engine.residency)
        second = Nth(getattr(owner, name))
        second.arm(1)
        replaced = second if name != "preload_all" else lambda self, nth=second: nth(self)
        inherited = name not in vars(owner)
        setattr(owner, name, replaced)
        raised = 0
        try:
            for _ in range(2):
                try:
                    faulty.generate()
                except Injected:
                    raised += 1
        finally:
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, second.function)
        assert second.calls > 0, "the recovery went another way"
        assert raised == (1 if name == "abandon" else 2)
        faulty.engine.link.submit = submit.function
        faulty.check((recovery, at))
    faulty.leave()


def test_the_base_model_called_alone_is_whole_after_an_accident_and_can_have_one():
    """Called without its head, it is a forward pass like any other."""
    faulty = Faulty("mobile", 1.1)
    base = faulty.model.base_model
    with torch.no_grad():
        hidden = base(faulty.ids).last_hidden_state
        for broken, places in ((lambda: base(faulty.ids), (1, 2, 3)), (faulty.generate, (1, 3, 5, 8, 11))):
            for at in places:
                experts = faulty.engine.run_experts = Nth(faulty.engine.run_experts)
                experts.arm(at)
                with pytest.raises(Injected):
                    broken()
                faulty.engine.run_experts = experts.function
                before = faulty.model.mobile.stats()["prompt_tokens"]
                assert torch.equal(base(faulty.ids).last_hidden_state, hidden)
                assert faulty.model.mobile.stats()["prompt_tokens"] == before + faulty.ids.numel()
                faulty.check(at)
        link, submit, raised = faulty.engine.link, faulty.engine.link.submit, 0
        for at in range(1, 12):
            faulty.engine.restart()  # into free slots, where an expert that nobody loads would stay
            link.submit = Nth(submit)
            link.submit.arm(at)
            try:
                base(faulty.ids)
            except Injected:
                raised += 1
            link.submit = submit
            assert torch.equal(base(faulty.ids).last_hidden_state, hidden)
        assert raised > 5
    faulty.leave()


class InStep(LogitsProcessor):
    """Makes generations take each token together, so that their forward passes always meet."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.barrier.wait(timeout=30)
        return scores


def at_once(models: list[PreTrainedModel], prompts: list[torch.Tensor], tokens: int = 12) -> list[tuple]:
    """The tokens that each model writes on a thread of its own, all of them at once."""
    barrier, seen = threading.Barrier(len(models)), [None] * len(models)

    def generate(number: int) -> None:
        try:
            together = LogitsProcessorList([InStep(barrier)])
            seen[number] = greedy(models[number], prompts[number], tokens, logits_processor=together)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(len(models))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places much more often than they would
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert None not in seen, "a thread failed"
    return seen


def assert_same(together: list[tuple], alone: list[tuple]) -> None:
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize(
    ("strategy", "gamma", "link"),
    [("lru", None, "virtual"), ("mobile", MIDDLE, "virtual"), ("mobile", MIDDLE, "paced")],
)
def test_threads_on_one_model_get_what_each_would_get_alone(family, strategy, gamma, link, threads):
    model, prompts = tiny(family), [prompt(seed=seed, length=5 + seed) for seed in range(threads)]
    stock = [greedy(model, ids, 12) for ids in prompts]
    mobile.attach(model, strategy, slots=8, gamma=gamma, link=link, poison=True)
    alone = [greedy(model, ids, 12) for ids in prompts]
    counted = model.mobile.stats()
    together = at_once([model] * threads, prompts)
    assert_same(together, alone)
    stats = model.mobile.stats()
    assert stats["tokens"] == 2 * counted["tokens"] == 2 * threads * 11
    assert stats["fallbacks"] == 2 * counted["fallbacks"]
    assert not any(logits.isnan().any() for _, logits in together)
    if strategy == "lru":
        assert_same(together, stock)
    else:
        assert 0 < counted["fallbacks"] < counted["tokens"]


def test_threads_on_two_models_get_what_each_would_get_alone(family):
    models, prompts = [tiny(family), tiny(family, seed=5)], [prompt(), prompt(seed=2)]
    stock = [greedy(model, ids, 12) for model, ids in zip(models, prompts, strict=True)]
    mobile.attach(models[0], "lru", slots=8, poison=True)
    mobile.attach(models[1], "mobile", slots=8, gamma=1.1, poison=True)
    assert_same(at_once(models, prompts), stock)
    assert [model.mobile.stats()["tokens"] for model in models] == [11, 11]


def test_an_accident_on_one_thread_spares_the_other(monkeypatch):
    """The other's token in progress is not touched, and its next one starts on slots that are right."""
    model, prompts = tiny("olmoe"), [prompt(), prompt(seed=2)]
    mobile.attach(model, "mobile", slots=8, gamma=MIDDLE, poison=True)
    alone = greedy(model, prompts[1], 30)
    engine, run, broken = model.mobile, model.mobile.run_experts, []

    def failing(*arguments: object) -> object:
        if threading.current_thread().name == "clumsy" and dice.random() < 0.2:
            raise Injected
        return run(*arguments)

    def clumsy() -> None:
        while not done.is_set() or not broken:
            try:
                greedy(model, prompts[0], 12)
            except Injected as error:
                broken.append(error)

    dice, done = random.Random(2), threading.Event()
    monkeypatch.setattr(engine, "run_experts", failing)
    other = threading.Thread(target=clumsy, name="clumsy")
    other.start()
    try:
        for _ in range(4):
            tokens, logits = greedy(model, prompts[1], 30)
            assert torch.equal(tokens, alone[0])
            assert torch.equal(logits, alone[1])
    finally:
        done.set()
        other.join()
