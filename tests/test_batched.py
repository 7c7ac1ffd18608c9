"""Answers in batches: whatever leaves a batch, and whichever kernel computes it, tokens and routing are those alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prompt, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import mobile
from mobile.policies.strategy import resolve
from mobile.replay.trace import Request
from suites.measure.generate import all_resident
from suites.scoring.batched import Batch
from suites.scoring.lm_eval import first_tokens, generate, task_config

SUITES = Path(__file__).parents[1] / "suites"
FAMILIES = ("olmoe", "qwen2-moe", "deepseek-v2", "qwen3-moe")
Answers = list[tuple[list[int], Request]]


@cache
def shipped(family: str) -> tuple[Any, Any]:
    folder = SUITES / f"models/{family}-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def prompts(task: str, items: int) -> list[str]:
    lines = (SUITES / f"tasks/data/{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:items]]


def answers(family: str, task: str, groups: list[list[str]], batched: bool, **attached: Any) -> Answers:
    """Return ids and routing of each prompt; `batched` as live runs write them, else by stock generate()."""
    model, tokenizer = shipped(family)
    found: Answers = []
    mobile.attach(model, **attached)
    try:
        for group in groups:
            with model.mobile.recording() as requests:
                batch = Batch(model.mobile.recorder) if batched else None
                written = generate(model, tokenizer, group, task_config(task)["generation_kwargs"], batch=batch)
            found += [(ids, first_tokens(each, len(ids))) for (_, ids), each in zip(written, requests, strict=True)]
    finally:
        mobile.detach(model)
    return found


def routes(answered: Answers) -> list:
    """Return what does not depend on the last bits of a product: all but the confidences."""
    return [(ids, [(step.kind, step.experts, step.predicted) for step in request]) for ids, request in answered]


@pytest.mark.parametrize("task", ["arithmetic", "object_counting"])
@pytest.mark.parametrize("strategy", ["resident", "static-half", "mobile"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_that_rows_leave_writes_and_routes_as_each_row_alone_on_the_reference(family, strategy, task):
    asked, kept, experts = prompts(task, 12), all_resident(resolve(strategy)), mobile_experts(family)
    together = answers(family, task, [asked], True, strategy=kept, slots=experts, kernel="grouped")
    slots = experts if strategy == "resident" else 24
    alone = answers(family, task, [[each] for each in asked], False, strategy=strategy, slots=slots, kernel="loop")
    lengths = [len(ids) for ids, _ in together]
    assert len(set(lengths)) > 3, "all rows end together, which shows nothing"
    assert routes(together) == routes(alone)
    if strategy == "mobile":
        assert any(step.kind == "big" for _, request in together for step in request)


def mobile_experts(family: str) -> int:
    """Return the number of experts in all layers of a shipped model."""
    model, _ = shipped(family)
    mobile.attach(model, "on-demand", slots=8)
    try:
        return model.mobile.geometry.total_experts
    finally:
        mobile.detach(model)


def test_a_row_that_has_ended_is_computed_no_more():
    model, tokenizer = shipped("olmoe")
    widths: list[int] = []
    options = task_config("arithmetic")["generation_kwargs"]
    mobile.attach(model, "on-demand", slots=8)
    hook = model.lm_head.register_forward_hook(lambda _module, given, _output: widths.append(len(given[0])))
    try:
        written = generate(model, tokenizer, prompts("arithmetic", 12), options, batch=Batch(model.mobile.recorder))
    finally:
        hook.remove()
        mobile.detach(model)
    lengths = [len(ids) for _, ids in written]
    assert widths == [sum(length > step for length in lengths) for step in range(max(lengths))]


@pytest.mark.parametrize("strategy", ["on-demand", "on-demand-overlap", "lru"])
def test_a_prompt_whose_experts_are_all_in_slots_runs_in_one_wave(strategy):
    model = tiny("olmoe")
    expected = model(prompt(rows=2)).logits
    mobile.attach(model, all_resident(resolve(strategy)), slots=24, poison=True)
    engine, waves = model.mobile, []
    layer = engine.residency.layer

    def counting(*arguments: Any) -> Any:
        for wave in layer(*arguments):
            waves.append(len(wave))
            yield wave

    engine.residency.layer = counting
    assert torch.equal(model(prompt(rows=2)).logits, expected)
    assert len(waves) == 3, "not one a layer"
    assert engine.stats()["loads"] == 0
