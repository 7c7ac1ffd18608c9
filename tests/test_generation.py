"""Every way to generate with an attached model through Transformers gives what the stock model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt, tiny
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

import mobile
from mobile.errors import Refused
from suites.scoring.lm_eval import task_config

SHIPPED = Path(__file__).parent.parent / "suites/models/olmoe-tiny"
ATTACHED = [("lru", None), ("mobile", 1.1)]
QUESTION = "Question: Ava has 27 coins. Ava finds 13 more. Then Ava sells 8 coins.\nAnswer:"  # unsure here and there
Call = Callable[[PreTrainedModel], list[torch.Tensor]]


def shipped() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, experts_implementation="eager")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@torch.no_grad()
def unchanged(model: PreTrainedModel, call: Call) -> list[dict]:
    """Assert that `call` gives the stock model's tensors, bit for bit, under each strategy; what each one counted."""
    model.generation_config.pad_token_id = None  # random models write id 0 like any other
    expected, counted = call(model), []
    for strategy, gamma in ATTACHED:
        mobile.attach(model, strategy, slots=8, gamma=gamma, poison=True)
        given = call(model)
        counted.append(model.mobile.stats())
        mobile.detach(model)
        assert len(given) == len(expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, expected, strict=True)), strategy
        assert counted[-1]["loads"] > 0
    lru, full = counted
    assert lru["fallbacks"] == 0
    assert full["fallbacks"] == full["tokens"] == lru["tokens"], "a gamma above 1 falls back for every token"
    return counted


def written(ids: torch.Tensor, tokens: int = 12, **options: object) -> Call:
    """Greedy generation with these options, and the logits behind it where they are one a token."""

    def call(model: PreTrainedModel) -> list[torch.Tensor]:
        out = model.generate(
            ids,
            max_new_tokens=tokens,
            **{"do_sample": False} | options,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return [out.sequences, *out.logits]

    return call


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_sampling_with_a_seed(family, strategy, gamma):
    model, ids = tiny(family), prompt()

    def sampled() -> list[int]:
        torch.manual_seed(7)
        return model.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.5)[0].tolist()

    expected = sampled()
    mobile.attach(model, strategy, slots=8, gamma=gamma)
    assert sampled() == expected


def test_beam_search(family):
    counted = unchanged(tiny(family), written(prompt(), num_beams=3, num_return_sequences=2))
    assert counted[0]["tokens"] == 3 * 11


def test_several_sampled_sequences_of_one_prompt(family):
    def call(model: PreTrainedModel) -> list[torch.Tensor]:
        torch.manual_seed(7)
        options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3, "min_new_tokens": 12}
        return written(prompt(), **options)(model)

    unchanged(tiny(family), call)
    sequences = call(tiny(family))[0]
    assert len({tuple(row) for row in sequences.tolist()}) == 3


def test_a_batch_with_padding_on_the_left(family):
    ids = prompt(rows=3)
    ids[0, :6], ids[1, :2] = 0, 0
    counted = unchanged(tiny(family), written(ids, attention_mask=(ids != 0).long(), min_new_tokens=12))
    assert counted[0]["tokens"] == 3 * 11


@pytest.mark.filterwarnings("ignore:Assisted generation")
def test_prompt_lookup(family):
    """Candidates are checked many at a time, which is no decode step; the crops after it must not hurt."""
    ids = prompt(length=4).repeat(1, 3)
    model = tiny(family)
    with torch.no_grad():
        assert torch.equal(written(ids)(model)[0], written(ids, prompt_lookup_num_tokens=3)(model)[0])
    lru, _ = unchanged(model, written(ids, prompt_lookup_num_tokens=3))
    assert lru["prompt_tokens"] > ids.shape[1], "no candidate was looked up"
    assert lru["tokens"] > 0, "every step was a wide one"


def test_a_cache_handed_to_the_next_turn(family):
    def call(model: PreTrainedModel) -> list[torch.Tensor]:
        cache, ids, seen = DynamicCache(config=model.config), prompt(), []
        for turn in range(3):
            written_ids, *logits = written(ids, tokens=6, past_key_values=cache)(model)
            seen += [written_ids, *logits]
            ids = torch.cat([written_ids, prompt(length=4, seed=turn)], dim=1)
        return seen

    counted = unchanged(tiny(family), call)
    assert counted[0]["tokens"] == 3 * 5


def test_the_static_cache(family):
    """Bit for bit the stock model's static cache, and close to its dynamic one."""
    model, ids = tiny(family), prompt()
    counted = unchanged(model, written(ids, cache_implementation="static", min_new_tokens=12))
    assert counted[0]["tokens"] == 11
    mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
    with torch.no_grad():
        tokens, *logits = written(ids, cache_implementation="static", min_new_tokens=12)(model)
        mobile.detach(model)
        dynamic_tokens, *dynamic_logits = written(ids, min_new_tokens=12)(model)
    assert torch.equal(tokens, dynamic_tokens)
    assert torch.allclose(torch.stack(logits), torch.stack(dynamic_logits), atol=1e-4)


def test_a_static_cache_under_a_gamma_in_the_middle(family):
    """The rollback of a static cache: the same tokens and fallbacks as with the cache that grows."""
    model, ids, seen = tiny(family), prompt(), []
    for options in ({}, {"cache_implementation": "static"}):
        mobile.attach(model, "mobile", slots=8, gamma=0.3, poison=True)
        tokens, logits = greedy(model, ids, tokens=16, **options)
        seen.append((tokens.tolist(), model.mobile.stats()["fallbacks"], logits))
        mobile.detach(model)
    assert seen[0][:2] == seen[1][:2]
    assert 0 < seen[0][1] < 15
    assert torch.allclose(seen[0][2], seen[1][2], atol=1e-4)


def test_without_a_cache(family):
    """Every step is a prefill of all that was written: nothing to roll back and no token that could fall back."""
    with pytest.warns(UserWarning, match="Without a cache .* the strategy lru does not act"):
        lru, full = unchanged(tiny(family), written(prompt(), use_cache=False))
    assert lru["tokens"] == full["tokens"] == 0
    assert lru["prompt_tokens"] == sum(range(9, 9 + 12))


def test_embeddings_instead_of_ids(family):
    def call(model: PreTrainedModel) -> list[torch.Tensor]:
        embeds = model.get_input_embeddings()(prompt())
        out = model.generate(
            inputs_embeds=embeds, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return [out.sequences, *out.logits]

    counted = unchanged(tiny(family), call)
    assert counted[0]["tokens"] > 0


def test_hidden_states_of_every_token(family):
    """Those of the pass that counts: a big pass that showed the little one's would differ."""

    def call(model: PreTrainedModel) -> list[torch.Tensor]:
        out = model.generate(
            prompt(),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        assert len(out.hidden_states) == 6
        return [out.sequences, *(layer for token in out.hidden_states for layer in token)]

    unchanged(tiny(family), call)


def test_a_forward_with_labels_gives_the_loss(family):
    """Not what an engine is for, but a caller may score a text: a forward with labels is a prefill."""

    def call(model: PreTrainedModel) -> list[torch.Tensor]:
        out = model(prompt(rows=2), labels=prompt(rows=2))
        return [out.loss, out.logits]

    unchanged(tiny(family), call)


def test_a_stopping_criterion_of_the_callers_own(family):
    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9 + 5)

    counted = unchanged(tiny(family), written(prompt(), stopping_criteria=StoppingCriteriaList([AfterFive()])))
    assert counted[0]["tokens"] <= 4


@pytest.mark.parametrize(("strategy", "gamma"), [*ATTACHED, ("mobile", 0.3)])
def test_callers_see_one_forward_a_token_whatever_falls_back(family, strategy, gamma):
    class Counting(LogitsProcessor):
        lengths: list[int]

        def __call__(self, input_ids, scores):
            self.lengths.append(input_ids.shape[1])
            return scores

    model, counting, outside = tiny(family), Counting(), []
    counting.lengths = []
    model.register_forward_hook(lambda *_: outside.append(1))
    mobile.attach(model, strategy, slots=8, gamma=gamma, poison=True)
    greedy(model, prompt(), tokens=16, logits_processor=LogitsProcessorList([counting]))
    assert counting.lengths == list(range(9, 9 + 16))
    assert len(outside) == 16
    stats = model.mobile.stats()
    assert stats["tokens"] == 15
    assert (stats["fallbacks"] > 0) is (strategy == "mobile")
    assert stats["fallbacks"] < 15 or gamma != 0.3


class Overheard(TextStreamer):
    """A streamer that keeps what it is given and what it prints."""

    def __init__(self, tokenizer) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.given: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        self.given += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


@pytest.mark.parametrize(("strategy", "gamma"), [*ATTACHED, ("mobile", 0.8)])
def test_what_is_streamed_is_what_was_written_each_token_once(tokenizer, strategy, gamma):
    model, inputs = shipped(), tokenizer(QUESTION, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist()
    mobile.attach(model, strategy, slots=64, gamma=gamma, poison=True)
    streamer = Overheard(tokenizer)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, streamer=streamer)[0].tolist()
    stats = model.mobile.stats()
    assert streamer.given == output
    assert streamer.text == tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert stats["tokens"] == len(output) - inputs["input_ids"].shape[1] - 1 > 10
    if gamma == 0.8:
        assert 0 < stats["fallbacks"] < stats["tokens"]
    else:
        assert output == expected


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_the_text_generation_pipeline(tokenizer, strategy, gamma):
    model = shipped()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    question = "Q: True and not ( False or True ) is\nA:"
    expected = write(question, max_new_tokens=40, do_sample=False)
    mobile.attach(model, strategy, slots=64, gamma=gamma)
    assert write(question, max_new_tokens=40, do_sample=False) == expected
    assert expected[0]["generated_text"].endswith("So the answer is False.")


def hflm(model: PreTrainedModel, tokenizer, batch_size: int):
    """lm-eval's own class for Transformers models, which needs accelerate to be imported at all."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def answers(model: PreTrainedModel, tokenizer, batch_size: int) -> list[str]:
    """The text it writes for four items of a task."""
    lm = hflm(model, tokenizer, batch_size)
    result = simple_evaluate(
        lm,
        tasks=[task_config("arithmetic")],
        limit=4,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
        task_manager=TaskManager(include_defaults=False),
    )
    samples = sorted(result["samples"]["arithmetic"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_evals_own_model_class(tokenizer, batch_size):
    model = shipped()
    expected = answers(model, tokenizer, batch_size)
    assert len({*expected}) == 4
    assert all("####" in answer for answer in expected)
    mobile.attach(model, "lru", slots=16, poison=True)
    assert answers(model, tokenizer, batch_size) == expected
    lossless = model.mobile.stats()
    assert lossless["tokens"] > 4 * 10
    assert lossless["loads"] > 0
    mobile.detach(model)
    mobile.attach(model, "mobile", slots=16, gamma=0.7, poison=True)
    assert all("####" in answer for answer in answers(model, tokenizer, batch_size))
    stats = model.mobile.stats()
    assert 0 < stats["fallbacks"] < stats["tokens"] / 2


def test_lm_evals_own_model_class_scores_given_texts(tokenizer):
    """Log-likelihoods are one prefill each: the same under every strategy, and no token is ever halved."""
    model, pairs = shipped(), [("Q: not True is\nA:", " False."), ("Q: I have a cat.\nA:", " 1")]

    def scores() -> list[tuple[float, bool]]:
        lm = hflm(model, tokenizer, 2)
        asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        return lm.loglikelihood(asked, disable_tqdm=True)

    expected = scores()
    for strategy in ("lru", "mobile"):
        mobile.attach(model, strategy, slots=16, poison=True)
        assert scores() == expected
        assert model.mobile.stats()["tokens"] == 0
        assert model.mobile.stats()["prompt_tokens"] > 0
        mobile.detach(model)


def test_an_attached_model_refuses_to_be_saved_and_a_detached_one_is_saved_whole(family, tmp_path):
    model = tiny(family)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    mobile.attach(model, "lru", slots=8)
    with pytest.raises(Refused, match="detach"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    greedy(model, prompt())
    mobile.detach(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(weight, loaded[name]) for name, weight in expected.items())
