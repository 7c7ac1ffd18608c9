"""Invariants 2 and 3 and the batch rule: what MoBiLE decides, against an independent loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import mobile
from mobile.policies.big_little import MOBILE
from mobile.policies.strategy import BigLittle
from mobile.runtime import rollback
from mobile.slots import SlotPool

SHIPPED = Path(__file__).parent.parent / "suites/models/olmoe-tiny"


def routers(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "weight")]


@torch.no_grad()
def reference(model, ids: torch.Tensor, gamma: float, tokens: int = 10) -> tuple[list[int], int, list[float]]:
    """MoBiLE on a stock model: caches are deep-copied before a little step instead of rolled back."""

    def step(last, cache, top_k):
        for router in routers(model):
            router.top_k = top_k
        return model(last, past_key_values=cache, use_cache=True)

    full = model.config.num_experts_per_tok
    out = step(ids, None, full)
    written, fallbacks, confidences = [int(out.logits[0, -1].argmax())], 0, []
    while len(written) < tokens:
        last, kept = torch.tensor([[written[-1]]]), copy.deepcopy(out.past_key_values)
        out = step(last, out.past_key_values, full // 2)
        confidences.append(float(out.logits[0, -1].float().softmax(-1).max()))
        if confidences[-1] < gamma:
            fallbacks += 1
            out = step(last, kept, full)
        written.append(int(out.logits[0, -1].argmax()))
    for router in routers(model):
        router.top_k = full
    return written, fallbacks, confidences


def between(confidences: list[float]) -> float:
    """A gamma in the middle of the widest gap among the central confidences: no rounding can cross it."""
    ordered = sorted(confidences)
    middle = ordered[len(ordered) // 4 : 3 * len(ordered) // 4 + 1]
    low, high = max(pairwise(middle), key=lambda pair: pair[1] - pair[0])
    return (low + high) / 2


def test_gamma_zero_equals_a_plain_loop_with_half_the_experts(family):
    model, ids = tiny(family), prompt()
    written, fallbacks, _ = reference(model, ids, 0.0)
    mobile.attach(model, "mobile", slots=8, gamma=0.0, poison=True)
    assert greedy(model, ids)[0][0, ids.shape[1] :].tolist() == written
    assert model.mobile.stats()["fallbacks"] == fallbacks == 0
    mobile.detach(model)
    mobile.attach(model, "static-half", slots=8, poison=True)
    assert greedy(model, ids)[0][0, ids.shape[1] :].tolist() == written


def test_a_gamma_in_between_falls_back_where_an_independent_loop_does(family):
    model, ids = tiny(family), prompt()
    gamma = between(reference(model, ids, 0.0)[2])
    written, fallbacks, _ = reference(model, ids, gamma)
    mobile.attach(model, "mobile", slots=8, gamma=gamma, poison=True)
    assert greedy(model, ids)[0][0, ids.shape[1] :].tolist() == written
    assert 0 < fallbacks < 9
    assert model.mobile.stats()["fallbacks"] == fallbacks


def test_without_rollback_the_output_is_wrong(family, monkeypatch):
    model, ids = tiny(family), prompt()
    _, logits = greedy(model, ids)
    mobile.attach(model, "mobile", slots=8, gamma=1.1)
    assert model.mobile.findings.undoable
    monkeypatch.setattr(rollback, "before_step", lambda cache: lambda: None)
    assert not torch.equal(greedy(model, ids)[1], logits)


def test_the_self_test_notices_a_rollback_that_does_nothing(monkeypatch):
    monkeypatch.setattr(rollback, "before_step", lambda cache: lambda: None)
    model = mobile.attach(tiny("olmoe"), "mobile", slots=8)
    assert not model.mobile.findings.undoable
    with pytest.warns(UserWarning, match="all experts"):
        greedy(model, prompt())
    assert model.mobile.stats()["fallbacks"] == 0


def test_without_pins_the_output_is_wrong(family, monkeypatch):
    """An engine that may evict what the running step needs computes with the wrong weights, or not at all."""

    def unpinned(pool, *, protected, skip_layers=()):
        return (key for key in list(pool.slots) if (key in pool.protected) is protected and key in pool.ready)

    model, ids = tiny(family), prompt()
    _, logits = greedy(model, ids, tokens=20)
    monkeypatch.setattr(SlotPool, "evictable", unpinned)
    wrong = 0
    for extra in range(5):
        mobile.attach(model, "lru", slots=model.config.num_experts_per_tok + extra, poison=True)
        try:
            wrong += not torch.equal(greedy(model, ids, tokens=20)[1], logits)
        except KeyError:
            wrong += 1
        mobile.detach(model)
    assert wrong


def test_switching_the_prefetch_off_changes_nothing_but_time(family):
    """At every pool size, down to the smallest legal one."""
    model, ids = tiny(family), prompt()
    top_k = model.config.num_experts_per_tok
    for slots in (top_k, top_k + 3, 12, 24):
        seen = {}
        for prefetch in (True, False):
            strategy = replace(MOBILE, prefetch_on_fallback=prefetch, gating=BigLittle(0.2))
            mobile.attach(model, strategy, slots=slots, poison=True)
            seen[prefetch] = *greedy(model, ids, tokens=20), model.mobile.stats()
            mobile.detach(model)
        with_it, without = seen[True], seen[False]
        assert torch.equal(with_it[0], without[0])
        assert torch.equal(with_it[1], without[1])
        assert with_it[2]["fallbacks"] == without[2]["fallbacks"] > 0
        assert without[2]["prefetch_loads"] == 0
        assert slots == 24 or with_it[2]["prefetch_useful"] > 0


def test_without_the_prefetch_the_shipped_model_is_later():
    """Dressed as the real model, where a load takes as long as it would: same tokens, more waiting."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(SHIPPED)("Q: I have a cat, two dogs, and a plum.")["input_ids"]])
    seconds, tokens = {}, {}
    for prefetch in (True, False):
        strategy = replace(MOBILE, prefetch_on_fallback=prefetch, gating=BigLittle(0.95))
        mobile.attach(model, strategy, slots=72, geometry="olmoe-1b-7b")
        tokens[prefetch] = greedy(model, ids, tokens=30)[0].tolist()
        stats = model.mobile.stats()
        seconds[prefetch] = stats["decode_seconds"]
        mobile.detach(model)
        assert stats["fallbacks"] > 3
    assert tokens[True] == tokens[False]
    assert seconds[True] < seconds[False]


def test_a_row_of_a_batch_equals_the_row_alone(family):
    """Rows fall back at different steps; each one's tokens, and its trace, are what they are alone."""
    model, ids = tiny(family), prompt(rows=4)
    model.config.pad_token_id = model.generation_config.pad_token_id = None  # random models write id 0 like any other
    gamma = between([c for row in ids for c in reference(model, row[None], 0.0)[2]])
    mobile.attach(model, "mobile", slots=8, gamma=gamma, poison=True)
    with model.mobile.recording() as together:
        batch, _ = greedy(model, ids)
    falls = [[step.kind for step in request] for request in together]
    assert len({tuple(kinds) for kinds in falls}) > 1, "the rows should differ in where they fall back"
    for row in range(4):
        with model.mobile.recording() as alone:
            single, _ = greedy(model, ids[row : row + 1])
        assert batch[row].tolist() == single[0].tolist()
        assert [step.kind for step in alone[0]] == falls[row]
        assert [step.experts for step in alone[0]] == [step.experts for step in together[row]]
        assert [step.predicted for step in alone[0]] == [step.predicted for step in together[row]]


def test_padding_and_finished_rows_decide_nothing():
    """A short prompt beside a long one, padded left: its trace holds no padding and equals the trace alone."""
    model, ids = tiny("olmoe"), prompt(rows=2)
    ids[0, :4] = 0
    mask = (ids != 0).long()
    mobile.attach(model, "mobile", slots=8, gamma=0.3)
    with model.mobile.recording() as together:
        greedy(model, ids, attention_mask=mask)
    with model.mobile.recording() as alone:
        greedy(model, ids[:1, 4:])
    assert together[0][0].tokens == 5
    assert [step.experts for step in together[0]] == [step.experts for step in alone[0]]


def test_a_batch_counts_every_row_it_writes():
    model, ids = tiny("olmoe"), prompt(rows=4)
    mobile.attach(model, "mobile", slots=8, gamma=1.1)
    greedy(model, ids, attention_mask=torch.ones_like(ids))
    stats = model.mobile.stats()
    assert stats["tokens"] == 4 * 9
    assert 0 < stats["fallbacks"] <= stats["tokens"]


def test_a_hook_inside_the_model_is_called_in_both_passes_and_can_tell_them_apart():
    """As the README's limits say: a hook that collects hidden states sees those of the little pass as well."""
    model, seen = tiny("olmoe"), []
    mobile.attach(model, "mobile", slots=8, gamma=1.1)
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(model.mobile.running.kind))
    greedy(model, prompt(), tokens=4)
    assert seen == ["prefill", *(3 * ["little", "big"])]


def test_a_fallback_is_charged_with_the_time_that_its_prediction_takes(monkeypatch):
    """On a real clock: it has begun, and is counted, before the routers are asked."""
    import time

    from mobile.runtime import decoding

    model = mobile.attach(tiny("olmoe"), "mobile", slots=8, gamma=1.1, link="paced")
    counters, seen, original = model.mobile.ledger.counters, [], decoding.predict

    def slow(*arguments):
        seen.append((counters.fallbacks, counters.decode_ns))
        time.sleep(0.05)
        return original(*arguments)

    monkeypatch.setattr(decoding, "predict", slow)
    before = counters.fallbacks
    with torch.no_grad():
        cache = model(prompt(), use_cache=True).past_key_values
        model(torch.tensor([[7]]), past_key_values=cache)
    assert [fallbacks for fallbacks, _ in seen] == [before + 1]
    assert counters.decode_ns - seen[0][1] >= 50_000_000
