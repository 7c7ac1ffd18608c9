"""What users do with an attached model through Transformers gives what the stock model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import prompt, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import mobile

SHIPPED = Path(__file__).parent.parent / "suites/models/olmoe-tiny"
ATTACHED = [("lru", None), ("mobile", 1.1)]


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_sampling_with_a_seed(family, strategy, gamma):
    model, ids = tiny(family), prompt()

    def sampled() -> list[int]:
        torch.manual_seed(7)
        return model.generate(ids, max_new_tokens=12, do_sample=True, temperature=1.5)[0].tolist()

    expected = sampled()
    mobile.attach(model, strategy, slots=8, gamma=gamma)
    assert sampled() == expected


@pytest.mark.parametrize(("strategy", "gamma"), ATTACHED)
def test_the_text_generation_pipeline(strategy, gamma):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, experts_implementation="eager")
    write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(SHIPPED))
    question = "Q: True and not ( False or True ) is\nA:"
    expected = write(question, max_new_tokens=40, do_sample=False)
    mobile.attach(model, strategy, slots=64, gamma=gamma)
    assert write(question, max_new_tokens=40, do_sample=False) == expected
    assert expected[0]["generated_text"].endswith("So the answer is False.")
