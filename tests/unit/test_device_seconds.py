"""Seconds of a device that computes behind the host: up to its last work, and without the caller's pauses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import greedy, prompt, tiny
from fake_cuda import Event, card  # noqa: F401
from test_cuda_channel import attached
from test_stream import ByHand

from baselines.lru import LRU
from mobile.costs.cost_model import CostModel
from mobile.ledger import Ledger
from mobile.links import stream
from mobile.links.stream import StreamLink
from mobile.policies.big_little import MOBILE
from mobile.policies.protocols import PolicyContext
from mobile.residency.residency import Residency
from tests.toy import CARD, GEOMETRY, STANDS_FOR


class Device(ByHand):
    """A channel to a device that is done at `done`, on the host's clock `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.done = self.waits = 0

    def launched(self) -> None: ...

    def done_ns(self, *, wait: bool) -> int | None:
        if wait and self.done > self.now:
            self.waits += 1
            self.now = self.done
        return self.done if self.done <= self.now else None


@pytest.fixture(params=[True, False], ids=["behind the host", "on the host"])
def serving(request, monkeypatch):
    """A residency over a link in real time, the host's clock in hand."""
    device = Device() if request.param else ByHand()
    if not request.param:
        device.now = 0
    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter_ns=lambda: device.now))
    ledger, cost = Ledger(), CostModel(CARD, GEOMETRY)
    link = StreamLink(device, 1, ledger, lambda key, slot: None)
    context = PolicyContext.of(cost, 8, layer_map=STANDS_FOR)
    serving = Residency(LRU, context, link, cost, ledger)
    return device, serving, ledger, request.param


def token(device, serving, host_ns: int, device_ns: int, kind: str = "full") -> None:
    """A step that the host launches in `host_ns` and the device is done with `device_ns` after its begin."""
    begun = device.now
    serving.begin(kind, 1)
    device.now += host_ns
    serving.finish()
    device.done = begun + device_ns
    serving.end_step()


def test_the_devices_last_work_is_counted_when_it_is_asked_for(serving):
    device, residency, ledger, behind = serving
    token(device, residency, 10, 35, "prefill")
    token(device, residency, 10, 25)
    assert (ledger.counters.prefill_ns, ledger.counters.decode_ns) == (10, 10)
    residency.settle()
    # The second began 25 before the first was over on the device: from then on the time is the second's.
    assert ledger.counters.decode_ns == (25 if behind else 10)
    residency.settle()
    assert ledger.counters.decode_ns == (25 if behind else 10), "counted twice"


def test_a_pause_between_tokens_is_not_counted_and_the_devices_work_in_it_is(serving):
    device, residency, ledger, behind = serving
    for _ in range(3):
        token(device, residency, 10, 30)
        device.now += 1000  # a slow streamer
    residency.settle()
    assert ledger.counters.decode_ns == (90 if behind else 30)
    assert ledger.stats()["decode_seconds"] == ledger.counters.decode_ns / 1e9


def test_no_step_waits_for_the_device(serving):
    device, residency, ledger, behind = serving
    for _ in range(5):
        token(device, residency, 10, 500)
    if behind:
        assert device.waits == 0
        residency.settle()
        assert device.waits == 1
        assert ledger.counters.decode_ns == 4 * 10 + 500


def test_what_lies_between_the_passes_of_a_token_is_counted(serving):
    device, residency, ledger, behind = serving
    residency.begin("little", 1)
    device.now += 10
    residency.finish()
    device.now += 7  # the host waits for the confidence
    residency.fallback([])
    device.now += 3
    residency.begin("big", 1)
    device.now += 20
    residency.finish()
    device.done = device.now + 5
    residency.end_step()
    residency.settle()
    assert ledger.counters.decode_ns == (45 if behind else 30)


def test_a_prompt_alone_is_counted_to_its_end(serving):
    device, residency, ledger, behind = serving
    token(device, residency, 10, 40, "prefill")
    device.now += 500
    token(device, residency, 10, 12)
    residency.settle()
    assert (ledger.counters.prefill_ns, ledger.counters.decode_ns) == ((40, 12) if behind else (10, 10))


# --- the engine over the card's stand-in ------------------------------------------------------------------


def test_the_end_of_a_step_is_marked_behind_all_that_it_launched(card):  # noqa: F811
    """Behind the head, the confidence test and what chooses between passes, and not behind the caller's own work."""
    model = tiny("qwen3_moe")
    engine = attached(card, model, MOBILE, 8, gamma=0.5)
    compute, channel = card.current(), engine.link.channel
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
        for step in range(4):
            model(prompt(length=1, seed=step), past_key_values=cache, use_cache=True)
            assert channel._step_end.clock[compute] == compute.clock[compute], "something was launched behind it"
            torch.zeros(4).add_(1)
            assert channel._step_end.clock[compute] < compute.clock[compute]
    assert engine.stats()["decode_seconds"] > 0


def test_generating_waits_for_no_end_of_a_step_until_statistics_are_asked_for(card, monkeypatch):  # noqa: F811
    model, waited = tiny("qwen3_moe"), []
    engine = attached(card, model, MOBILE, 8, gamma=0.5)
    synchronize = Event.synchronize
    monkeypatch.setattr(Event, "synchronize", lambda self: (waited.append(self), synchronize(self))[1])
    end, query = engine.link.channel._step_end, Event.query
    monkeypatch.setattr(Event, "query", lambda self: self is not end and query(self))
    greedy(model, prompt())
    assert end not in waited
    engine.stats()
    assert end in waited
