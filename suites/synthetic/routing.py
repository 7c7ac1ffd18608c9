"""Routing of the shipped models, recorded when a run needs it: plain generate() on test items, seconds on a CPU."""

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
from suites.synthetic.script import Script, ScriptLength, recorded
from suites.tasks.files import DATA

ALWAYS = 2.0  # above every probability: each token's little and big pass are both recorded
ANSWER_TOKENS = 112  # as many as all shipped tasks but one allow


def scripts_of(
    folder: Path, length: ScriptLength, *, scripts: int, layers: int, gamma: float, seed: int
) -> list[Script]:
    """Record scripts: the model in `folder` answers shuffled test items, one after another, on its own greedy tokens.

    Every token falls back, so its text is that of all K experts, and each step has what both passes chose and how
    sure the little one was; the script is unsure where that lies below `gamma`. (Under MoBiLE itself the cache would
    hold little tokens too: that is left out.) A prompt is the end of an item, as long as `length` says.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same routing on any number of cores
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        mobile.attach(model, resolve("mobile", ALWAYS), memory="16GiB", link="virtual")
        items = iter(_shuffled(seed))
        found = []
        for _ in range(scripts):
            prompt, decoded = _answers(model, tokenizer, items, length)
            source = f"recorded from {folder.name}"
            script = recorded(prompt, decoded, layers=layers, gamma=gamma, warmup=length.warmup, source=source)
            found.append(script.first(length.steps))
        return found
    finally:
        torch.set_num_threads(threads)


def _shuffled(seed: int) -> Iterator[str]:
    """Yield the prompts of every shipped test item, again and again, each time in another order."""
    lines = [line for path in sorted(DATA.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts, random = [json.loads(line)["prompt"] for line in lines], Random(seed)
    while True:
        random.shuffle(prompts)
        yield from prompts


def _answers(model: Any, tokenizer: Any, items: Iterator[str], length: ScriptLength) -> tuple[Step, list[Request]]:
    """Return the prefill of one prompt of that length, and the decode steps of as many answers as fill the script."""
    prompt: Step | None = None
    decoded: list[Request] = []
    while prompt is None or sum(map(len, decoded)) < 2 * length.steps:
        ids = tokenizer(next(items), return_tensors="pt")["input_ids"]
        if prompt is None and ids.shape[1] >= length.prompt_tokens:
            prompt = _record(model, tokenizer, ids[:, -length.prompt_tokens :], 1)[0]
        decoded.append(_record(model, tokenizer, ids, ANSWER_TOKENS)[1:])
    return prompt, decoded


def _record(model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int) -> Request:
    """Return the routing of one greedy answer, to the end of its line."""
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
