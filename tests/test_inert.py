"""A strategy acts wherever the model is called from, or says once, loudly, that it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import greedy, prompt, tiny
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

import mobile
from mobile.runtime.decoding import holds_tokens

ATTACHED = [("lru", None), ("static-half", None), ("mobile", 1.1)]
INERT = "does not act"


@contextmanager
def told() -> Iterator[list[str]]:
    """Inside the block warnings are collected, as sentences."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


@torch.no_grad()
def loop(model: nn.Module, tokens: int = 6) -> torch.Tensor:
    """Logits (tokens + 1, 1, vocabulary) of a plain decode loop."""
    out = model(prompt(), use_cache=True)
    seen = [out.logits[:, -1]]
    for _ in range(tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        seen.append(out.logits[:, -1])
    return torch.stack(seen)


class Around(nn.Module):
    """A wrapper such as adapters and callers put around a model; it passes on nothing but the forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Passing(Around):
    """And one that passes everything on."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def compiled(model: PreTrainedModel, run_before: bool = False) -> nn.Module:
    made = torch.compile(model, backend="eager")
    if run_before:
        loop(made, tokens=1)
    return made


def compiled_in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.compile(backend="eager")
    loop(model, tokens=1)
    return model


WRAPPERS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "one that passes nothing on": Around,
    "one that passes all on": Passing,
    "one in one": lambda model: Around(Passing(model)),
    "compiled": compiled,
    "compiled and run": lambda model: compiled(model, run_before=True),
    "compiled in place": compiled_in_place,
}


@pytest.mark.filterwarnings("ignore:Dynamo", "ignore:.*recompile")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_a_wrapped_model_is_looked_into(wrapper, strategy, gamma):
    expected, outer = loop(tiny("olmoe")), WRAPPERS[wrapper](tiny("olmoe"))
    assert mobile.attach(outer, strategy, slots=8, gamma=gamma, poison=True) is outer
    given, stats = loop(outer), outer.mobile.stats()
    assert stats["tokens"] == 6
    assert stats["fallbacks"] == (6 if strategy == "mobile" else 0)
    assert torch.equal(given, expected) is (strategy != "static-half")
    with pytest.raises(mobile.Refused, match="already attached"):
        mobile.attach(outer, strategy, slots=8)
    assert mobile.detach(outer) is outer
    assert not hasattr(outer, "mobile")
    assert torch.equal(loop(outer), expected)


@pytest.mark.filterwarnings("ignore:Dynamo", "ignore:.*recompile")
def test_a_model_compiled_after_attach_runs_the_engine_as_it_is():
    expected = loop(tiny("olmoe"))
    for change in (lambda model: torch.compile(model, backend="eager"), compiled_in_place):
        model = mobile.attach(tiny("olmoe"), "mobile", slots=8, gamma=1.1, poison=True)
        outer = change(model)
        model.mobile.restart()
        assert torch.equal(loop(outer), expected)
        assert model.mobile.stats()["fallbacks"] == 6
    model = mobile.attach(tiny("olmoe"), "mobile", slots=8, gamma=1.1, poison=True)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert torch.equal(loop(model), expected)
    assert model.mobile.stats()["fallbacks"] == 6


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (lambda model: nn.DataParallel(model), r"attach its \.module"),
        (lambda model: nn.ModuleList([model, tiny("olmoe")]), "holds 2 Transformers models"),
        (lambda model: model.model.layers[0], "holds no Transformers model"),
        (lambda model: model.model.layers[0].mlp.experts, "holds no Transformers model"),
        (type, "is no Transformers model"),
        (lambda model: "a/path", "is no Transformers model"),
        (lambda model: None, "is no Transformers model"),
    ],
    ids=["DataParallel", "two models", "a layer", "experts", "a class", "a path", "nothing"],
)
def test_what_is_no_model_or_part_of_one_is_refused(part, says):
    with pytest.raises(mobile.Refused, match=says):
        mobile.attach(part(tiny("olmoe")), "lru", slots=8)


def test_layers_compiled_by_themselves_are_refused_and_left_as_they_are():
    model = tiny("olmoe")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with pytest.raises(mobile.Refused, match=r"model\.layers\.0 .* compiled by itself.*attach first, then compile"):
        mobile.attach(model, "lru", slots=8)
    assert not hasattr(model, "mobile")


def test_parts_of_an_attached_model_are_not_attached_again_nor_what_holds_them():
    for first, second in ((lambda m: m, lambda m: m.model), (lambda m: m.model, lambda m: m)):
        model = tiny("olmoe")
        mobile.attach(first(model), "lru", slots=8)
        with pytest.raises(mobile.Refused, match=r"attached with another model that holds them; call mobile\.detach"):
            mobile.attach(second(model), "lru", slots=8)
        mobile.detach(first(model))
        mobile.detach(mobile.attach(second(model), "lru", slots=8))


# --- callers of a base model, or of another head ----------------------------------------------------


@torch.no_grad()
def by_hand(model: PreTrainedModel, tokens: int = 4) -> torch.Tensor:
    """A decode loop around the base model, with the head called by hand."""
    ids, cache, seen = prompt(), DynamicCache(config=model.config), []
    for _ in range(tokens + 1):
        hidden = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        seen.append(model.lm_head(hidden[:, -1:])[:, -1])
        ids = seen[-1].argmax(-1)[:, None]
    return torch.stack(seen)


def test_the_base_model_called_by_hand_decodes_under_the_strategy(family):
    expected = by_hand(tiny(family))
    for strategy, gamma in ATTACHED:
        model = mobile.attach(tiny(family), strategy, slots=8, gamma=gamma, poison=True)
        with told() as said:
            given = by_hand(model)
        assert model.mobile.stats()["tokens"] == 4
        assert torch.equal(given, expected) is (strategy != "static-half")
        assert [INERT in sentence for sentence in said] == ([True] if strategy == "mobile" else [])
        assert all("without its head" in sentence for sentence in said)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_model_without_next_token_logits_runs_lossless_strategies_and_refuses_mobile(kind):
    def made() -> PreTrainedModel:
        torch.manual_seed(0)
        return kind.from_config(tiny("qwen3_moe").config).eval()

    with torch.no_grad():
        made()
        stock = made()
        stock.set_experts_implementation("eager")
        expected = stock(prompt())[0]
        assert torch.equal(mobile.attach(made(), "lru", slots=8)(prompt())[0], expected)
    model = made()
    with pytest.raises(mobile.Refused, match="has no next-token logits to be confident of; use a lossless strategy"):
        mobile.attach(model, "mobile", slots=8)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(prompt())[0], expected)


def test_layers_called_by_hand_say_that_no_strategy_acts():
    model = mobile.attach(tiny("olmoe"), "mobile", slots=8)
    with torch.no_grad(), told() as said:
        hidden = model.model.embed_tokens(prompt())
        positions = torch.arange(9)[None]
        for _ in range(2):
            for layer in model.model.layers:
                hidden = layer(
                    hidden, position_embeddings=model.model.rotary_emb(hidden, positions), position_ids=positions
                )
    assert [INERT in sentence for sentence in said] == [True]


# --- steps that are not one token each --------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "gamma"), [*ATTACHED, ("on-demand", None)])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_cache": False}, "Without a cache of keys and values"),
        ({"prompt_lookup_num_tokens": 3}, "Assisted generation"),
    ],
    ids=["no cache", "prompt lookup"],
)
def test_generation_of_another_kind_is_the_stock_models_and_says_once_what_does_not_act(strategy, gamma, options, says):
    ids = prompt(length=4).repeat(1, 3)
    expected = tiny("olmoe").generate(ids, max_new_tokens=12, do_sample=False, **options)
    model = mobile.attach(tiny("olmoe"), strategy, slots=8, gamma=gamma, poison=True)
    with told() as said:
        for _ in range(2):
            given = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
    if strategy != "static-half" or "use_cache" in options:
        assert torch.equal(given, expected)
    said = [sentence for sentence in said if INERT in sentence]
    assert len(said) == (0 if strategy == "on-demand" else 1)  # which keeps nothing and halves nothing anyway
    assert all(sentence.startswith(says) and f"the strategy {strategy} " in sentence for sentence in said)


def test_continuous_batching_says_that_no_strategy_acts():
    continuous = pytest.importorskip("transformers.generation.configuration_utils").ContinuousBatchingConfig
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=63, pad_token_id=0)

    def written(model: PreTrainedModel) -> list[int]:
        out = model.generate_batch(
            inputs=[prompt()[0].tolist()],
            generation_config=settings,
            progress_bar=False,
            continuous_batching_config=continuous(num_blocks=16, max_batch_tokens=64),
        )
        return next(iter(out.values())).generated_tokens

    expected = written(tiny("qwen3_moe"))
    assert len(expected) == 6
    for strategy, gamma in ATTACHED:
        model = mobile.attach(tiny("qwen3_moe"), strategy, slots=8, gamma=gamma, poison=True)
        with told() as said:
            assert written(model) == expected
        assert sum(INERT in sentence for sentence in said) == 1


class Sealed:
    """A cache of a caller's own, which does what a model asks of it and does not show its layers."""

    def __init__(self, cache: DynamicCache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        if name in ("layers", "get_seq_length"):
            raise AttributeError(name)
        return getattr(self._cache, name)


def test_a_cache_that_does_not_tell_whether_it_holds_tokens_is_said_so():
    assert holds_tokens(None) is False
    assert holds_tokens(DynamicCache()) is False
    assert holds_tokens(Sealed(DynamicCache())) is None
    model = mobile.attach(tiny("olmoe"), "mobile", slots=8)
    with torch.no_grad(), told() as said:
        model(prompt(), past_key_values=Sealed(DynamicCache()), position_ids=torch.arange(9)[None])
    assert [INERT in sentence for sentence in said] == [True]
    assert "A Sealed does not tell" in said[0]


def test_an_assistant_that_is_attached_itself_writes_its_candidates_under_its_strategy():
    expected = greedy(tiny("olmoe"), prompt())[0]
    model, assistant = tiny("olmoe"), tiny("olmoe")
    mobile.attach(model, "lru", slots=8)
    mobile.attach(assistant, "mobile", slots=8, gamma=1.1)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    out = model.generate(prompt(), max_new_tokens=10, min_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert torch.equal(out, expected)
    assert assistant.mobile.stats()["fallbacks"] == assistant.mobile.stats()["tokens"] > 0
