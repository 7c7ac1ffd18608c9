"""Foreseeing past a layer's experts: the quasi-hidden state is the paper's, and what is run is its rule's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import greedy, prompt, replayed, tiny
from test_lossy_baselines import TOKENS, rerouted

import mobile
from baselines.next_gate import NEXT_GATE
from baselines.speculating_experts import SPECULATING, VERIFYING
from mobile.errors import Refused
from mobile.live_model.compat import moe_layers
from mobile.replay import trace
from mobile.runtime import quasi_hidden_state

NORM = "post_attention_layernorm"  # what all five families call it; the engine finds it without the name


def decoder_layers(model) -> list:
    """The layers that have a router, in order."""
    return [layer for layer in model.model.layers if any(hasattr(part, "is_transposed") for part in layer.modules())]


def attached(model, strategy, slots=8, **options):
    return mobile.attach(model, strategy, slots=slots, poison=True, **options)


def test_the_norm_before_each_router_is_found_and_mean_outputs_are_means(family):
    model, plain = tiny(family), tiny(family)
    engine = attached(model, SPECULATING).mobile
    assert [*engine.findings.quasi.norms] == [getattr(layer, NORM) for layer in decoder_layers(model)]
    ids = torch.randint(
        64,
        (quasi_hidden_state.ROWS, quasi_hidden_state.LENGTH),
        generator=torch.Generator().manual_seed(quasi_hidden_state.SEED),
    )
    seen: dict[int, tuple] = {}
    for number, layer in enumerate(moe_layers(plain)):
        layer.experts.register_forward_pre_hook(lambda module, args, number=number: seen.update({number: args}))
    with torch.no_grad():
        plain(ids)
        for number, layer in enumerate(moe_layers(plain)):
            hidden, index, _ = seen[number]
            for expert in range(8):
                mine = hidden.reshape(-1, 32)[(index == expert).any(-1)]
                alone = torch.full((len(mine), 1), expert), torch.ones(len(mine), 1)
                expected = layer.experts(mine, *alone).mean(0) if len(mine) else torch.zeros(32)
                torch.testing.assert_close(
                    engine.findings.quasi.vectors[number, expert], expected, rtol=1e-4, atol=1e-5
                )
    assert not engine.findings.quasi.vectors[:, 8].any(), "nobody adds nothing"


def test_the_learning_prefill_leaves_no_trace(family):
    stats = attached(tiny(family), SPECULATING).mobile.stats()
    assert not any(value for value in stats.values() if value is not None)


def test_it_runs_what_the_next_router_says_of_the_quasi_hidden_state(family):
    model, ids = tiny(family), prompt()
    vectors = attached(model, SPECULATING).mobile.findings.quasi.vectors
    mobile.detach(model)
    layers = decoder_layers(model)
    residual: dict[int, torch.Tensor] = {}
    ran: dict[int, tuple] = {}

    def rule(number, router, args, output):
        if number:
            before_index, before_weights = ran[number - 1]
            h = residual[number - 1].reshape(-1, 32)
            h = h + (before_weights[..., None] * vectors[number - 1][before_index]).sum(1)
            norm = getattr(layers[number], NORM)
            output = type(router).forward(router, type(norm).forward(norm, h).view_as(args[0]), *args[1:])
        ran[number] = output[2], output[1]
        return output

    hooks = [
        getattr(layer, NORM).register_forward_hook(lambda _, args, out, n=n: residual.update({n: args[0]}))
        for n, layer in enumerate(layers)
    ]
    expected = rerouted(model, ids, rule)
    for hook in hooks:
        hook.remove()
    attached(model, SPECULATING)
    assert greedy(model, ids, TOKENS)[0][0, ids.shape[1] :].tolist() == expected
    guesses = model.mobile.ledger.guesses
    assert guesses
    assert all(right == needed for _, right, needed in guesses.values()), "what is executed was foreseen"


def test_verifying_is_lossless_at_every_pool_size(family):
    model, ids = tiny(family), prompt()
    sequences, logits = greedy(model, ids)
    for slots in (model.config.num_experts_per_tok, 8, 12, 24):
        attached(model, VERIFYING, slots)
        offloaded = greedy(model, ids)
        assert slots == model.config.num_experts_per_tok or model.mobile.ledger.guesses
        mobile.detach(model)
        assert torch.equal(offloaded[0], sequences)
        assert torch.equal(offloaded[1], logits)


@pytest.mark.parametrize("strategy", [SPECULATING, VERIFYING], ids=lambda s: s.name)
def test_switching_the_prefetch_off_changes_no_token(family, strategy):
    model, ids = tiny(family), prompt()
    tokens = []
    for one in (strategy, replace(strategy, lookahead=None)):
        attached(model, one)
        tokens.append(greedy(model, ids, TOKENS)[0].tolist())
        mobile.detach(model)
    assert tokens[0] == tokens[1]


def test_what_was_generated_before_and_beside_changes_no_token(family):
    """Mean outputs are taken once, so history and batch do not show."""
    model, rows = tiny(family), prompt(rows=3)
    attached(model, SPECULATING)
    together = greedy(model, rows, TOKENS)[0]
    for row in range(3):
        assert torch.equal(greedy(model, rows[row : row + 1], TOKENS)[0][0], together[row])


@pytest.mark.parametrize("strategy", [SPECULATING, VERIFYING], ids=lambda s: s.name)
def test_the_trace_replays_to_its_ledger(family, strategy, tmp_path):
    for slots in (4, 9, 24):
        model = attached(tiny(family), strategy, slots)
        engine = model.mobile
        with engine.recording() as requests:
            for seed in (1, 2):
                greedy(model, prompt(seed=seed))
        engine.residency.end_token()
        trace.save(tmp_path / "t.npz", requests, len(engine.layers), {})
        again = replayed(engine, trace.load(tmp_path / "t.npz")[0])
        assert again.counters == engine.ledger.counters
        assert again.events == engine.ledger.events
        assert again.guesses == engine.ledger.guesses


def test_its_traces_serve_no_other_strategy():
    """Their foresight is another one than next-gate's, though both route as full K."""
    assert NEXT_GATE.routes_as_full_k
    assert VERIFYING.lossless
    assert not VERIFYING.routes_as_full_k


def test_detach_takes_every_hook_along(family):
    model, ids = tiny(family), prompt()
    _, logits = greedy(model, ids)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    for _ in range(2):
        attached(model, SPECULATING)
        greedy(model, ids)
        mobile.detach(model)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(greedy(model, ids)[1], logits)


def test_a_router_whose_input_no_norm_gives_is_refused_and_nothing_is_left_behind():
    model = tiny("olmoe")
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    ids = prompt()
    _, logits = greedy(model, ids)
    with pytest.raises(Refused, match="No norm gives OlmoeTopKRouter its input"):
        attached(model, VERIFYING)
    assert not hasattr(model, "mobile")
    assert torch.equal(greedy(model, ids)[1], logits)
