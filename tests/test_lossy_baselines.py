"""Baselines that change the tokens: what they run is their rule applied to a stock model, no more and no less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import greedy, prompt, replayed, tiny

import mobile
from baselines.pre_gated import PRE_GATED
from baselines.ser import smart_reduction
from mobile.live_model.compat import moe_layers

TOKENS = 10


@torch.no_grad()
def rerouted(model, ids: torch.Tensor, rule) -> list[int]:
    """Greedy tokens of the stock model whose routers' choices in decode go through `rule(layer, router, args)`."""
    layers, decoding = moe_layers(model), False

    def hook(number: int):
        def changed(router, args, output):
            if not decoding:
                return output
            logits, weights, index = rule(number, router, args, output)
            return logits, weights, index

        return changed

    hooks = [layer.router.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    out, written = model(ids, use_cache=True), []
    decoding = True
    for _ in range(TOKENS):
        written.append(int(out.logits[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()))  # no early end
        out = model(torch.tensor([[written[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    for one in hooks:
        one.remove()
    return written


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_ser_runs_the_experts_above_its_threshold(family, threshold):
    def rule(number, router, args, output):
        logits, weights, index = output
        weights = weights.clone()
        weights[(weights <= threshold * weights.max()) & (weights < weights.max())] = 0
        return logits, weights, index

    model, ids = tiny(family), prompt()
    expected = rerouted(model, ids, rule)
    mobile.attach(model, smart_reduction(threshold), slots=8, poison=True)
    with model.mobile.recording() as requests:
        assert greedy(model, ids, TOKENS)[0][0, ids.shape[1] :].tolist() == expected
    ran = [len(experts) for step in requests[0][1:] for experts in step.experts]
    assert min(ran) >= 1
    assert min(ran) < model.config.num_experts_per_tok
    assert model.mobile.stats()["demand_loads"] + model.mobile.stats()["hits"] == sum(ran)


def test_ser_at_threshold_0_is_full_k(family):
    model, ids = tiny(family), prompt()
    expected = greedy(model, ids)[1]
    mobile.attach(model, smart_reduction(0.0), slots=8, poison=True)
    assert torch.equal(greedy(model, ids)[1], expected)


def test_pre_gated_runs_what_the_next_router_says_of_this_input(family):
    model, ids = tiny(family), prompt()
    inputs: dict[int, tuple] = {}

    def rule(number, router, args, output):
        inputs[number] = args
        return output if number == 0 else type(router).forward(router, *inputs[number - 1])

    expected = rerouted(model, ids, rule)
    mobile.attach(model, PRE_GATED, slots=8, poison=True)
    assert greedy(model, ids, TOKENS)[0][0, ids.shape[1] :].tolist() == expected
    guesses = model.mobile.ledger.guesses
    assert guesses
    assert all(right == needed for _, right, needed in guesses.values()), "what is executed was foreseen"


@pytest.mark.parametrize("strategy", [PRE_GATED, smart_reduction(0.6)], ids=lambda s: s.name)
def test_the_trace_of_a_lossy_run_replays_to_its_ledger(family, strategy):
    for slots in (4, 9, 24):
        model = mobile.attach(tiny(family), strategy, slots=slots)
        with model.mobile.recording(ahead=True) as requests:
            greedy(model, prompt())
        engine = model.mobile
        engine.residency.end_token()
        again = replayed(engine, requests)
        assert again.counters == engine.ledger.counters
        assert again.events == engine.ledger.events
        assert again.guesses == engine.ledger.guesses


def test_switching_pre_gateds_prefetch_off_changes_no_token(family):
    model, ids = tiny(family), prompt()
    tokens = []
    for strategy in (PRE_GATED, replace(PRE_GATED, lookahead=None)):
        mobile.attach(model, strategy, slots=8, poison=True)
        tokens.append(greedy(model, ids, TOKENS)[0].tolist())
        mobile.detach(model)
    assert tokens[0] == tokens[1]
