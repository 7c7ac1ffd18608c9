"""The live half of a cell: a model answers its items under one gating, scored by lm-eval, routing recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mobile
from mobile import trace
from mobile.compat import common_layout, geometry_of, moe_layers
from mobile.geometry import Geometry
from mobile.hardware import profile
from mobile.strategy import Strategy, resolve, strategies
from suites.accuracy import EngineLM, evaluate, generate, prompts_of, task_config
from suites.matrix import Generation
from suites.record import RunFolder, write_json
from suites.timing import bench, time_requests

BATCH = 64
CHECKED = 2  # items run again, live and alone, under every strategy the generation stands for


def run(generation: Generation, folder: RunFolder, hardware: str) -> None:
    """Answer, score, record, check, and write both files, the answers last."""
    begun = time.monotonic()
    torch.set_num_threads(1)  # so that results do not depend on the machine's cores
    strategy = resolve(generation.strategy, generation.gamma)
    model: Any = AutoModelForCausalLM.from_pretrained(
        generation.model.folder, dtype=torch.float32, use_safetensors=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(generation.model.folder)
    layers = moe_layers(model)
    own = geometry_of(model, layers, common_layout(layers))
    mobile.attach(model, strategy, slots=strategy.needs(own))
    lm = EngineLM(model, tokenizer, BATCH)
    answers = evaluate(lm, generation.task, generation.docs)
    mobile.detach(model)
    requests = [lm.traces[answer.prompt_sha256] for answer in answers]
    outputs = [answer.output for answer in answers]
    checks = dict(_checks(generation, strategy, own, hardware, model, tokenizer, requests, outputs))
    path = folder.trace(generation.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "geometry": asdict(own), "model": generation.model.name, "strategy": strategy.name, "gamma": generation.gamma,
        "docs": generation.docs,
    }  # fmt: skip
    trace.save(path, requests, own.moe_layers, about)
    write_json(
        folder.answers(generation.id),
        {
            "answers": [asdict(answer) for answer in answers],
            "checks": checks,
            "batch": BATCH,
            "wall_seconds": time.monotonic() - begun,
        },
    )


def _checks(
    generation: Generation, strategy: Strategy, own: Geometry, hardware: str, model: Any, tokenizer: Any,
    requests: list[trace.Request], outputs: list[str],
) -> Iterator[tuple[str, bool]]:  # fmt: skip
    """Run the first items alone under each strategy this generation stands for: same text, same ledger as replay.

    The batch's numbers may differ from a single row's in their last bits, so this is looked at, not assumed.
    """
    same_routing = [s for s in strategies().values() if s.routes_as_full_k and not s.foresight]
    stands_for = same_routing if strategy.routes_as_full_k else [strategy]
    options = task_config(generation.task)["generation_kwargs"]
    prompts = prompts_of(generation.task, generation.docs[:CHECKED])
    for one in stands_for:
        on = bench(one, own, generation.model.geometry, profile(hardware), "smallest")
        mobile.attach(model, one, slots=on.slots, geometry=generation.model.geometry, hardware=hardware)
        texts = [generate(model, tokenizer, [prompt], options)[0][0] for prompt in prompts]
        model.mobile.residency.end_token()
        live = model.mobile.ledger
        mobile.detach(model)
        _, replayed = time_requests(on, requests[:CHECKED])
        yield f"{one.name}: text alone equals text in the batch", texts == outputs[:CHECKED]
        equal = (live.counters, live.guesses) == (replayed.counters, replayed.guesses)
        yield f"{one.name}: live ledger equals replay", equal
