"""Invariants 1, 2, 4 and 7: offloading changes no bit, and leaves none behind."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, greedy, prompt, tiny

import mobile

LOSSLESS = [
    strategy.name for strategy in mobile.strategies().values() if strategy.lossless and not strategy.needs_future
]


def pool_sizes(model) -> dict[str, int]:
    layers = sum(hasattr(module, "is_transposed") for module in model.modules())
    top_k = model.config.num_experts_per_tok
    return {"smallest": top_k, "one more": top_k + 1, "half": 4 * layers, "all": 8 * layers}


@pytest.mark.parametrize("link", ["virtual", "disk"])
@pytest.mark.parametrize("strategy", [*LOSSLESS, "mobile"])
def test_tokens_and_logits_equal_the_stock_model_at_every_pool_size(family, strategy, link, tmp_path):
    """Lossless strategies as they are, MoBiLE with a gamma above 1, which always falls back."""
    if (strategy, link) == ("cpu-hybrid", "disk"):
        pytest.skip("computes experts where they lie")
    model, ids = tiny(family), prompt()
    where = {"store": tmp_path} if link == "disk" else {}
    with torch.no_grad():
        prefill = model(ids).logits
    sequences, logits = greedy(model, ids)
    gamma = 1.1 if strategy == "mobile" else None
    for name, slots in pool_sizes(model).items():
        if strategy == "resident" and name != "all":
            continue
        mobile.attach(model, strategy, slots=slots, gamma=gamma, poison=True, **where)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, prefill), name
        offloaded_sequences, offloaded_logits = greedy(model, ids)
        stats = model.mobile.stats()
        mobile.detach(model)
        assert torch.equal(offloaded_sequences, sequences), name
        assert torch.equal(offloaded_logits, logits), name
        assert stats["fallbacks"] == (stats["tokens"] if strategy == "mobile" else 0)
        assert stats["loads"] > 0 or strategy == "resident"


@pytest.mark.parametrize("strategy", ["on-demand", "lru", "mobile", "static-half"])
def test_no_poisoned_slot_is_ever_read(family, strategy):
    model = tiny(family)
    mobile.attach(model, strategy, slots=model.config.num_experts_per_tok, poison=True)
    _, logits = greedy(model, prompt())
    assert not logits.isnan().any()


def test_poison_is_seen_when_a_slot_is_emptied_too_early(monkeypatch):
    """The test above can fail: an engine that copies nothing computes with the poison."""
    from mobile.runtime.engine import Engine

    monkeypatch.setattr(Engine, "fill", lambda self, key, slot: None)
    model = mobile.attach(tiny("olmoe"), "lru", slots=8, poison=True)
    assert model(prompt()).logits.isnan().any()


@pytest.mark.parametrize("link", ["virtual", "disk"])
def test_on_demand_loads_exactly_the_active_experts_and_the_ledger_counts_their_bytes(family, link, tmp_path):
    """Live, at every pool size: what the recorded routing names is what was copied, no more and no less."""
    model, ids = tiny(family), prompt()
    for slots in pool_sizes(model).values():
        for strategy in ("on-demand", "on-demand-overlap"):
            mobile.attach(model, strategy, slots=slots, link=link, store=tmp_path if link == "disk" else None)
            with model.mobile.recording() as requests:
                greedy(model, ids)
            stats, row = model.mobile.stats(), model.mobile.store.layout.nbytes
            mobile.detach(model)
            steps = requests[0]
            active = [sum(len(experts) for experts in step.experts) for step in steps]
            assert stats["streamed_loads"] == active[0]
            assert stats["demand_loads"] == sum(active[1:])
            assert stats["loads"] == sum(active)
            assert stats["bytes_loaded"] == stats["loads"] * row
            assert stats["hits"] == 0


def test_detach_restores_every_bit(family):
    model = tiny(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    attributes = set(vars(model))
    sequences, logits = greedy(model, prompt())
    mobile.detach(mobile.attach(model, "mobile", slots=8))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert set(vars(model)) == attributes
    again, logits_again = greedy(model, prompt())
    assert torch.equal(sequences, again)
    assert torch.equal(logits, logits_again)


def test_two_attached_models_do_not_disturb_each_other():
    """Both are built from one configuration object, which Transformers would have them share."""
    from transformers import AutoModelForCausalLM

    first = tiny("olmoe")
    torch.manual_seed(5)
    second = AutoModelForCausalLM.from_config(first.config).eval()
    second.set_experts_implementation("eager")
    ids = prompt()
    expected = greedy(first, ids)[1], greedy(second, ids)[1]
    mobile.attach(first, "lru", slots=6)
    assert torch.equal(greedy(second, ids)[1], expected[1]), "attaching one changed the other"
    mobile.attach(second, "on-demand", slots=4)
    assert torch.equal(greedy(first, ids)[1], expected[0])
    assert torch.equal(greedy(second, ids)[1], expected[1])
    mobile.detach(first)
    assert torch.equal(greedy(second, ids)[1], expected[1])
    assert second.mobile.stats()["tokens"] == 18


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_a_forward_leaves_the_model_usable(family, monkeypatch):
    model, ids = tiny(family), prompt()
    _, logits = greedy(model, ids)
    mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
    engine, calls = model.mobile, 0
    run = engine.run_experts

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise RuntimeError("injected")
        return run(*arguments)

    monkeypatch.setattr(engine, "run_experts", failing)
    with pytest.raises(RuntimeError, match="injected"):
        greedy(model, ids)
    assert all(layer.router.top_k == model.config.num_experts_per_tok for layer in engine.layers)
    assert torch.equal(greedy(model, ids)[1], logits)
