"""Routing of the shipped models, recorded where it is needed: plain generate() on test items, in seconds on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mobile
from mobile.policies.strategy import resolve
from mobile.replay.trace import Request, Step
from suites.synthetic.script import Script, recorded
from suites.tasks.files import DATA

ALWAYS = 2.0  # above every probability: each token's little and big pass are both recorded
ANSWER_TOKENS = 112  # as many as all shipped tasks but one allow


def scripts_of(
    folder: Path, *, scripts: int, layers: int, prompt_tokens: int, steps: int, warmup: int, gamma: float, seed: int
) -> list[Script]:
    """Scripts from the model in `folder` answering shuffled test items, one after another, on its own greedy tokens.

    Every token falls back, so its text is that of all K experts, and each step tells what both passes chose and how
    sure the little one was; the script is unsure where that lies below `gamma`. (Under MoBiLE itself the cache would
    hold little tokens too: that is left out.) A prompt is the end of an item, `prompt_tokens` long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same routing on any number of cores
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        mobile.attach(model, resolve("mobile", ALWAYS), memory="16GiB", link="virtual")
        items = iter(_shuffled(seed))
        return [
            _script(model, tokenizer, items, folder.name, layers, prompt_tokens, steps, warmup, gamma)
            for _ in range(scripts)
        ]
    finally:
        torch.set_num_threads(threads)


def _shuffled(seed: int) -> Iterator[str]:
    """The prompts of every shipped test item, again and again, each time in another order."""
    lines = [line for path in sorted(DATA.glob("*.jsonl")) for line in path.read_text().splitlines()]
    prompts, random = [json.loads(line)["prompt"] for line in lines], Random(seed)
    while True:
        random.shuffle(prompts)
        yield from prompts


def _script(
    model: Any,
    tokenizer: Any,
    items: Iterator[str],
    name: str,
    layers: int,
    prompt_tokens: int,
    steps: int,
    warmup: int,
    gamma: float,
) -> Script:
    prompt: Step | None = None
    decoded: list[Request] = []
    while prompt is None or sum(map(len, decoded)) < 2 * steps:
        ids = tokenizer(next(items), return_tensors="pt")["input_ids"]
        if prompt is None and ids.shape[1] >= prompt_tokens:
            prompt = _record(model, tokenizer, ids[:, -prompt_tokens:], 1)[0]
        decoded.append(_record(model, tokenizer, ids, ANSWER_TOKENS)[1:])
    script = recorded(prompt, decoded, layers=layers, gamma=gamma, warmup=warmup, source=f"recorded from {name}")
    return script.first(steps)


def _record(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int) -> Request:
    """The routing of one greedy answer, to the end of its line."""
    with model.mobile.recording() as requests:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            stop_strings=["\n"],
            tokenizer=tokenizer,
        )
    return requests[0]
