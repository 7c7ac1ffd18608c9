"""A row of a batch ends where this call of generate() ends it, and then it decides nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import greedy, prompt, tiny
from test_two_pass import between, reference
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

import mobile

ROWS, LENGTH, TOKENS = 4, 9, 12
Settings = dict[str, Any]


def endless(family: str, **settings: Any) -> PreTrainedModel:
    """A model whose configuration ends nothing and pads nothing, but for these settings."""
    model = tiny(family)
    for name, value in ({"pad_token_id": None, "eos_token_id": None} | settings).items():
        setattr(model.generation_config, name, value)
    return model


def batch() -> Settings:
    ids = prompt(rows=ROWS, length=LENGTH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generated(model: PreTrainedModel, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(
        **batch(), max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences, torch.stack(out.logits)


def a_word(family: str, row: int = 0, at: int = 3) -> int:
    """A token that this row writes there, like any other."""
    return int(generated(endless(family))[0][row, LENGTH + at])


def decoded(row: torch.Tensor, end: int) -> int:
    """Decode steps of a row of generate()'s output: one for each token but the last, the end itself among them."""
    written = row[LENGTH:].tolist()
    return written.index(end) if end in written else TOKENS - 1


@pytest.mark.parametrize(
    ("of_the_model", "of_the_call"),
    [
        (("pad_token_id",), {}),
        (("eos_token_id",), {"eos_token_id": [], "pad_token_id": 0}),
        (("eos_token_id",), {"eos_token_id": 2, "pad_token_id": 0}),
        (("pad_token_id", "eos_token_id"), {"eos_token_id": 2}),
    ],
    ids=["pad is a word", "ends ignored", "another end", "pad and end are a word, another end"],
)
def test_a_live_row_that_writes_what_the_model_calls_an_end_is_the_stock_models(family, of_the_model, of_the_call):
    model = endless(family, **dict.fromkeys(of_the_model, a_word(family)))
    tokens, logits = generated(model, **of_the_call)
    mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
    ours = generated(model, **of_the_call)
    assert torch.equal(ours[0], tokens)
    assert torch.equal(ours[1], logits)


@pytest.mark.parametrize("given", ["to the model", "to generate()"])
def test_rows_that_end_count_what_they_wrote(family, given):
    """The stock model's logits to the last, those of ended rows among them, and no token is counted after an end."""
    ends = {"eos_token_id": [a_word(family), a_word(family, row=2, at=6)], "pad_token_id": 63}
    model = endless(family, **(ends if given == "to the model" else {}))
    options = {} if given == "to the model" else ends
    tokens, logits = generated(model, **options)
    steps = [min(decoded(row, end) for end in ends["eos_token_id"]) for row in tokens]
    assert len({*steps}) > 1
    for strategy, gamma in (("mobile", 1.1), ("lru", None)):
        mobile.attach(model, strategy, slots=8, gamma=gamma, poison=True)
        with model.mobile.recording() as requests:
            ours = generated(model, **options)
        assert torch.equal(ours[0], tokens)
        assert torch.equal(ours[1], logits)
        assert [sum(step.kind in ("little", "full") for step in request) for request in requests] == steps
        assert model.mobile.stats()["tokens"] == sum(steps)
        assert model.mobile.stats()["fallbacks"] == (sum(steps) if strategy == "mobile" else 0)
        mobile.detach(model)


def alone_and_together(model: PreTrainedModel, **options: Any) -> None:
    """Assert that each row of the batch writes, counts, falls back and is traced as it does alone."""
    ids, engine = batch()["input_ids"], model.mobile
    with engine.recording() as together:
        tokens, _ = generated(model, **options)
    counted = engine.stats()
    engine.restart()
    with engine.recording() as alone:
        for row in range(ROWS):
            single = model.generate(
                ids[row : row + 1],
                attention_mask=torch.ones(1, LENGTH, dtype=torch.long),
                do_sample=False,
                max_new_tokens=TOKENS,
                **options,
            )
            assert single[0].tolist() == tokens[row, : single.shape[1]].tolist()
    assert len({len(request) for request in alone}) > 1, "the rows should end at different steps"
    single = engine.stats()
    assert [counted[name] for name in ("tokens", "prompt_tokens", "fallbacks")] == [
        single[name] for name in ("tokens", "prompt_tokens", "fallbacks")
    ]
    for ours, theirs in zip(together, alone, strict=True):
        assert [step.kind for step in ours] == [step.kind for step in theirs]
        assert [step.experts for step in ours] == [step.experts for step in theirs]
        assert [step.predicted for step in ours] == [step.predicted for step in theirs]


def middle(model: PreTrainedModel) -> float:
    return between([c for row in batch()["input_ids"] for c in reference(model, row[None], 0.0, TOKENS)[2]])


def test_a_batch_whose_rows_end_apart_equals_its_rows_alone(family):
    model = endless(family)
    mobile.attach(model, "mobile", slots=8, gamma=(gamma := middle(model)), poison=True)
    word = int(generated(model)[0][1, LENGTH + 2])
    mobile.detach(model)
    mobile.attach(model, "mobile", slots=8, gamma=gamma, poison=True)
    alone_and_together(model, eos_token_id=word, pad_token_id=word)


class EndsAt(StoppingCriteria):
    """Ends each row at a length of its own, as stop strings do, without an end token."""

    def __init__(self, first: torch.Tensor) -> None:
        self.lengths = {int(row[LENGTH]): LENGTH + 3 + number for number, row in enumerate(first)}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([len(row) >= self.lengths[int(row[LENGTH])] for row in input_ids])


def test_rows_ended_by_the_callers_own_criteria_end_as_well():
    model = endless("olmoe")
    ends = EndsAt(generated(model)[0])
    assert len(ends.lengths) == ROWS, "each row should begin with a token of its own"
    mobile.attach(model, "mobile", slots=8, gamma=middle(model), poison=True)
    criteria = StoppingCriteriaList([ends])
    alone_and_together(model, stopping_criteria=criteria, eos_token_id=63, pad_token_id=63)


def test_sampled_sequences_of_one_prompt_end_apart():
    model, ends = endless("olmoe"), list(range(20))

    def sampled() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(
            prompt(), do_sample=True, num_return_sequences=6, max_new_tokens=20, eos_token_id=ends, pad_token_id=63
        )

    expected = sampled()
    steps = [next((n for n, token in enumerate(row[LENGTH:].tolist()) if token in ends), 19) for row in expected]
    assert len({*steps}) > 2
    mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
    assert torch.equal(sampled(), expected)
    assert model.mobile.stats()["tokens"] == model.mobile.stats()["fallbacks"] == sum(steps)


def test_outside_of_generate_every_row_is_live():
    """A loop of the caller's own feeds what it likes: the padding token is a token."""
    model = endless("olmoe", pad_token_id=0, eos_token_id=2)
    token, ids = torch.tensor([[0], [2], [5], [0]]), prompt(rows=ROWS)

    @torch.no_grad()
    def two_steps() -> torch.Tensor:
        cache = model(ids, use_cache=True).past_key_values
        return torch.stack([model(token, past_key_values=cache, use_cache=True).logits for _ in range(2)])

    expected = two_steps()
    mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
    assert torch.equal(two_steps(), expected)
    assert model.mobile.stats()["tokens"] == model.mobile.stats()["fallbacks"] == 2 * ROWS


class Within(LogitsProcessor):
    """Calls generate() in the middle of another call, with other ends."""

    def __init__(self, model: PreTrainedModel, written: list[torch.Tensor]) -> None:
        self.model, self.written = model, written

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == LENGTH + 5:
            self.written.append(generated(self.model, eos_token_id=[])[0])
        return scores


def test_a_call_of_generate_within_another_keeps_its_own_rows():
    seen = []
    for attached in (False, True):
        model, inner = endless("olmoe", eos_token_id=a_word("olmoe"), pad_token_id=63), []
        if attached:
            mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)
        outer, logits = generated(model, logits_processor=LogitsProcessorList([Within(model, inner)]))
        seen.append((outer, logits, inner[0]))
    assert all(map(torch.equal, *seen))


def test_calls_on_two_threads_keep_their_own_rows():
    model = endless("olmoe")
    calls = [{"eos_token_id": a_word("olmoe"), "pad_token_id": 63}, {"eos_token_id": [], "pad_token_id": 0}]
    expected, seen = [generated(model, **call) for call in calls], [None, None]
    mobile.attach(model, "mobile", slots=8, gamma=1.1, poison=True)

    def run(number: int) -> None:
        for _ in range(3):
            seen[number] = generated(model, **calls[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("strategy", ["static-half", "mobile", "lru"])
def test_a_prompt_read_in_chunks_is_a_prompt_to_its_last_chunk_of_one_token(strategy):
    model, seen = tiny("olmoe"), []
    mobile.attach(model, strategy, slots=8, gamma=0.3 if strategy == "mobile" else None)
    for chunk in (None, 4, 1):
        model.mobile.restart()
        tokens, _ = greedy(model, prompt(), prefill_chunk_size=chunk)
        stats = model.mobile.stats()
        seen.append((tokens.tolist(), stats["tokens"], stats["prompt_tokens"], stats["fallbacks"]))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1:3] == (9, LENGTH)


def test_a_turn_of_one_token_is_a_prompt():
    """Half the experts would give other logits for it; with all of them it is the stock model's."""
    seen = []
    for strategy in (None, "static-half"):
        model = tiny("olmoe")
        if strategy:
            mobile.attach(model, strategy, slots=8)
        cache, ids = DynamicCache(config=model.config), prompt()
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        turn = torch.cat([ids, torch.tensor([[7]])], dim=1)
        out = model.generate(
            turn,
            past_key_values=cache,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        seen.append(out.logits[0])
    assert torch.equal(*seen)
    assert model.mobile.stats()["tokens"] == 0
    assert model.mobile.stats()["prompt_tokens"] == LENGTH + 1
