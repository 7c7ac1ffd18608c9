"""Routers that choose oddly, and callers that ask for tuples: the stock model's answer all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import greedy, live_and_replayed, prompt, tiny
from torch import nn
from transformers import PreTrainedModel

import mobile
from mobile.errors import Refused
from mobile.kernels import group
from mobile.policies.strategy import strategies

STRATEGIES = [
    name for name, one in strategies().items() if one.lossless and not one.needs_future and name != "resident"
]


def rerouted(model: PreTrainedModel, choice: Any) -> PreTrainedModel:
    """The model with a hook on every router that changes its (logits, weights, index)."""
    for module in model.modules():
        if hasattr(module, "top_k") and isinstance(getattr(module, "weight", None), nn.Parameter):
            module.register_forward_hook(lambda _module, _args, output: choice(*output))
    return model


def first_twice(logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> tuple:
    """The second expert is the first again, with a weight of its own."""
    return logits, weights, torch.cat([index[:, :1], index[:, :1], index[:, 2:]], dim=1)


def all_the_same(logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> tuple:
    return logits, weights, index[:, -1:].expand_as(index).contiguous()


@pytest.mark.parametrize("choice", [first_twice, all_the_same])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "mobile"])
def test_an_expert_chosen_twice_for_a_token_is_the_stock_models(strategy, choice):
    for rows in (1, 3):
        ids = prompt(rows=rows)
        expected = greedy(rerouted(tiny("qwen3_moe"), choice), ids)[1]
        model = rerouted(tiny("qwen3_moe"), choice)
        mobile.attach(model, strategy, slots=8, gamma=1.1 if strategy == "mobile" else None, poison=True)
        assert torch.equal(greedy(model, ids)[1], expected)
        assert model.mobile.stats()["loads"] > 0


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_every_kernel_computes_an_expert_chosen_twice(kernel):
    expected = greedy(rerouted(tiny("olmoe"), first_twice), prompt())[1]
    model = mobile.attach(rerouted(tiny("olmoe"), first_twice), "lru", slots=8, kernel=kernel)
    assert torch.allclose(greedy(model, prompt())[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["lru", "cpu-hybrid", "mobile"])
def test_a_trace_with_an_expert_chosen_twice_replays_to_its_ledger(strategy, tmp_path):
    options = {"gamma": 0.3} if strategy == "mobile" else {}
    live, replayed = live_and_replayed(
        rerouted(tiny("olmoe"), first_twice), strategy, 8, tmp_path / "trace.npz", **options
    )
    assert live.stats() == replayed.stats()
    assert list(live.events) == list(replayed.events)


def test_pairs_of_an_expert_chosen_twice_are_grouped_by_rank():
    groups = group(torch.tensor([[5, 2, 5, 8]]), 8)
    assert (groups.experts, groups.counts, groups.starts) == ([2, 5], [1, 2], [0, 1])
    assert groups.tokens.tolist() == [0, 0, 0]
    assert groups.ranks.tolist() == [1, 0, 2]


@pytest.mark.parametrize("ids", [[[0, 9]], [[-1, 3]], [[0, 9], [1, 2]]])
def test_an_expert_that_there_is_not_raises_as_the_stock_model_does(ids):
    with pytest.raises(IndexError, match="which there is not"):
        group(torch.tensor(ids), 8)


# --- outputs ----------------------------------------------------------------------------------------


@torch.no_grad()
def tuples(model: PreTrainedModel, **asked: Any) -> list[tuple]:
    """Two steps asked for as tuples, a cache between them."""
    begun = model(prompt(rows=2), use_cache=True, return_dict=False, **asked)
    cache = next(part for part in begun if hasattr(part, "get_seq_length"))
    return [begun, model(torch.tensor([[5], [7]]), past_key_values=cache, use_cache=True, return_dict=False, **asked)]


@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True}, {"output_router_logits": True}])
@pytest.mark.parametrize(("strategy", "gamma"), [("lru", None), ("next-gate", None), ("mobile", 1.1)])
def test_a_step_asked_for_as_a_tuple_is_one_of_the_same_parts(family, strategy, gamma, asked):
    expected = tuples(tiny(family), **asked)
    given = tuples(mobile.attach(tiny(family), strategy, slots=8, gamma=gamma, poison=True), **asked)
    for ours, theirs in zip(given, expected, strict=True):
        assert isinstance(ours, tuple)
        assert [type(part) for part in ours] == [type(part) for part in theirs]
        logits = next(number for number, part in enumerate(theirs) if torch.is_tensor(part) and part.ndim == 3)
        assert torch.equal(ours[logits], theirs[logits])


@pytest.mark.parametrize("strategy", ["lru", "mobile", "mobile-cached", "static-half", "fate"])
def test_a_configuration_that_asks_for_tuples_without_saying_so_is_followed(family, strategy):
    """`return_dict: null` is falsy: Transformers gives tuples then."""
    model, stock = tiny(family), tiny(family)
    model.config.return_dict = stock.config.return_dict = None
    mobile.attach(model, strategy, slots=8, poison=True)
    with torch.no_grad():
        ours, theirs = model(prompt(rows=2), use_cache=True), stock(prompt(rows=2), use_cache=True)
    assert [type(part) for part in ours] == [type(part) for part in theirs]
    logits = next(number for number, part in enumerate(theirs) if torch.is_tensor(part) and part.ndim == 3)
    assert torch.equal(ours[logits], theirs[logits])
    asked = {"max_new_tokens": 6, "do_sample": False}
    written = model.generate(prompt(rows=1), **asked)
    if mobile.strategies()[strategy].lossless:
        assert torch.equal(written, stock.generate(prompt(rows=1), **asked))


@pytest.mark.parametrize("strategy", ["mobile", "mobile-cached", "static-half", "speculating-experts-verify"])
def test_a_model_whose_own_code_fails_on_ids_is_refused_in_one_sentence_by_what_tries_it(family, strategy):
    model = tiny(family)

    def forward(*_: Any, **__: Any) -> None:
        raise KeyError("no such layer")

    model.forward = forward
    with pytest.raises(Refused, match=r"does not run on token ids alone \('no such layer'\); use a .*, such as lru"):
        mobile.attach(model, strategy, slots=8)
    mobile.detach(mobile.attach(model, "lru", slots=8))
