"""Modes that the caller has set (gradients, inference, training, default device and dtype): right, or refused."""

from __future__ import annotations

import pytest
import torch
from conftest import greedy, prompt, tiny
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import mobile
from mobile.policies.strategy import strategies

LIVE = [name for name, strategy in strategies().items() if not strategy.needs_future and name != "resident"]
LOSSLESS = [name for name in LIVE if strategies()[name].lossless]


def attached(model: PreTrainedModel, strategy: str) -> PreTrainedModel:
    """With every token falling back under MoBiLE, which makes it the stock model bit for bit."""
    return mobile.attach(model, strategy, slots=8, gamma=1.1 if strategy == "mobile" else None, poison=True)


def loop(model: PreTrainedModel, tokens: int = 5) -> torch.Tensor:
    """The logits (tokens, 1, vocabulary) of a decode loop of the caller's own, in whatever mode is set."""
    ids, cache, seen = prompt(), None, []
    for _ in range(tokens):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        seen.append(out.logits[:, -1].detach())
    return torch.stack(seen)


@pytest.mark.parametrize("strategy", LIVE)
def test_a_loop_that_left_gradients_on_writes_what_it_writes_without(strategy):
    model = attached(tiny("olmoe"), strategy)
    with torch.no_grad():
        expected = loop(model)
    model.mobile.restart()
    given = loop(model)
    assert torch.is_grad_enabled()
    if strategy not in ("trained-predictor", "activation-trace"):  # learn from the first loop, and choose no experts
        assert torch.equal(given, expected)
    if strategies()[strategy].lossless:
        assert torch.equal(given, loop(tiny("olmoe")))


def test_a_recording_with_gradients_on():
    model = attached(tiny("olmoe"), "lru")
    with model.mobile.recording(ahead=True) as requests:
        loop(model)
    assert [step.kind for step in requests[0]] == ["prefill"] + 4 * ["full"]
    assert requests[0][1].ahead is not None


def test_a_loss_cannot_be_taken_back_through_offloaded_experts():
    """Slots are written to again and again: a gradient through them would be wrong, so there is none."""
    model = attached(tiny("olmoe"), "lru")
    loss = model(prompt(), labels=prompt()).loss
    assert torch.equal(loss, tiny("olmoe")(prompt(), labels=prompt()).loss.detach())
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


@pytest.mark.parametrize("strategy", ["lru", "mobile", "speculating-experts-verify"])
def test_inference_mode_around_attach_generate_and_detach(strategy):
    """In any of them or in none; afterwards the stock model learns as before."""
    tokens, logits = greedy(tiny("olmoe"), prompt(), tokens=4)
    for inside in range(8):
        model = tiny("olmoe")
        with torch.inference_mode(bool(inside & 1)):
            attached(model, strategy)
        with torch.inference_mode(bool(inside & 2)):
            ours = greedy(model, prompt(), tokens=4)
        assert torch.equal(ours[0], tokens)
        assert torch.equal(ours[1], logits)
        with torch.inference_mode(bool(inside & 4)):
            mobile.detach(model)
        model(prompt(), labels=prompt()).loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())


def test_a_model_made_in_inference_mode_is_what_it_was_after_detach():
    with torch.inference_mode():
        model = tiny("olmoe")
    tokens, logits = greedy(model, prompt())
    attached(model, "lru")
    assert torch.equal(greedy(model, prompt())[1], logits)
    mobile.detach(model)
    assert all(weight.is_inference() for weight in model.parameters())
    assert torch.equal(greedy(model, prompt())[0], tokens)


@pytest.mark.parametrize("strategy", ["lru", "mobile", "cpu-hybrid", "speculating-experts-verify"])
def test_a_default_device_of_the_callers_is_not_where_anything_goes(strategy):
    model = tiny("olmoe")
    _, logits = greedy(model, prompt())
    with torch.device("meta"):
        attached(model, strategy)
    assert torch.equal(greedy(model, prompt())[1], logits)
    with torch.device("meta"):
        mobile.detach(model)
    assert torch.equal(greedy(model, prompt())[1], logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_of_the_callers_changes_nothing(dtype):
    logits = greedy(tiny("olmoe"), prompt())[1]
    for strategy in LOSSLESS:
        model = tiny("olmoe")
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            attached(model, strategy)
            ours = greedy(model, prompt())[1]
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(ours, logits), strategy


def dropping() -> PreTrainedModel:
    """A model in training mode that drops half of its attention, and whose routers draw noise."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            intermediate_size=16,
            num_local_experts=8,
            num_experts_per_tok=4,
            attention_dropout=0.5,
            router_jitter_noise=0.3,
            pad_token_id=None,
            bos_token_id=1,
            eos_token_id=None,
        )
    )
    model.set_experts_implementation("eager")
    return model.train()


@pytest.mark.parametrize("strategy", [*LOSSLESS, "mobile"])
def test_in_training_mode_the_same_random_numbers_are_drawn(strategy):
    """A little pass that was taken back, and every question to a router beside its own, draw none."""
    stock = dropping()
    torch.manual_seed(1)
    expected = [greedy(stock, prompt())[1] for _ in range(2)]
    assert not torch.equal(*expected)
    model = dropping()
    torch.manual_seed(1)
    attached(model, strategy)
    assert all(torch.equal(greedy(model, prompt())[1], logits) for logits in expected)


def test_a_dtype_or_device_asked_for_after_attach_is_refused_with_nothing_converted():
    model = attached(tiny("olmoe"), "lru")
    whole = [weight.dtype for weight in model.parameters()]
    for convert in (
        lambda: model.half(),
        lambda: model.bfloat16(),
        lambda: model.double(),
        lambda: model.to(torch.bfloat16),
        lambda: model.to("meta"),
        lambda: model.type(torch.float16),
        lambda: model.model.half(),
        lambda: model.model.layers.double(),
        lambda: model.model.layers[1].mlp.experts.half(),
        lambda: torch.nn.Sequential(model).half(),
    ):
        with pytest.raises(mobile.Refused, match=r"stays float32 on cpu.*mobile\.detach"):
            convert()
        assert [weight.dtype for weight in model.parameters()] == whole
    for nothing in (model.float, model.cpu, lambda: model.to("cpu"), lambda: model.to(torch.float32), model.eval):
        assert nothing() is model
    assert torch.equal(greedy(model, prompt())[1], greedy(tiny("olmoe"), prompt())[1])
    assert {weight.dtype for weight in mobile.detach(model).half().parameters()} == {torch.float16}
