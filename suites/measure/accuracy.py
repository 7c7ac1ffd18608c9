"""Accuracy cells measured: fresh items answered by full K, by static K/2, by MoBiLE, and by falling back at random."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import mobile
from mobile.costs.geometry import Geometry
from mobile.live_model.compat import common_layout, geometry_of, moe_layers
from mobile.policies.big_little import MOBILE
from mobile.policies.strategy import BigLittle, Strategy, resolve
from suites.environment import environment
from suites.measure.generate import all_resident
from suites.plan.accuracy_cells import FULL_K, PAPERS, RANDOM, STATIC, AccuracyCell, called
from suites.record import Record, RunFolder
from suites.scoring.lm_eval import Answer, EngineLM, generate, score, task_config
from suites.tasks.fresh import verdict_items
from suites.tasks.item import Item

BATCH = 200
KEY_DIGITS = 8  # of the hash by which a record names an item's substance


class Loaded(NamedTuple):
    """A model, its tokenizer and its sizes."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    native: Geometry


class Answered(NamedTuple):
    """The answers of one gating, and what its ledger counted meanwhile."""

    answers: list[Answer]
    stats: dict[str, Any]

    @property
    def rate(self) -> float:
        """Return the share of decode tokens that fell back."""
        tokens = self.stats["tokens"]
        return self.stats["fallbacks"] / tokens if tokens else 0.0


def load(pieces: Sequence[AccuracyCell], run: RunFolder) -> Loaded:
    """Load the model that the cells share."""
    torch.set_num_threads(1)  # so that results do not depend on the machine's cores
    folder = pieces[0].model.folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    layers = moe_layers(model)
    native = geometry_of(model, layers, common_layout(layers))
    return Loaded(model, AutoTokenizer.from_pretrained(folder), native)


def measure(cell: AccuracyCell, loaded: Loaded, run: RunFolder) -> None:
    """Answer the round's items by every gating and write the record; without items once the verdict is settled."""
    begun = time.monotonic()
    if settled := cell.settled(run):
        ended = dict(zip(("after", "verdict"), settled, strict=True))
        _record(cell, loaded, (), {}, {}, ended, time.monotonic() - begun).save(cell.output(run))
        return
    drawn = verdict_items(cell.task, cell.items * cell.rounds, cell.seed)
    items = drawn[cell.items * (cell.round - 1) : cell.items * cell.round]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{cell.task}.jsonl"
        lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) + "\n" for item in items]
        path.write_text("".join(lines), encoding="utf-8")
        task = {**task_config(cell.task), "dataset_kwargs": {"data_files": {"test": str(path)}}}
        found = {
            FULL_K: _answered(loaded, resolve("resident"), task, len(items)),
            STATIC: _answered(loaded, resolve("static-half"), task, len(items)),
        }
        for gamma in cell.gammas:
            found[called(gamma)] = _answered(loaded, resolve("mobile", gamma), task, len(items))
        # The control falls back as often as MoBiLE at the paper's gamma did on these items, at tokens drawn by lot.
        at_random = replace(MOBILE, gating=BigLittle(found[PAPERS].rate, "random"))
        found[RANDOM] = _answered(loaded, at_random, task, len(items))
    checks = _checks(loaded, items[0].prompt, task["generation_kwargs"], found)
    _record(cell, loaded, items, found, checks, None, time.monotonic() - begun).save(cell.output(run))


def _answered(loaded: Loaded, strategy: Strategy, task: dict[str, Any], items: int) -> Answered:
    """Return the answers to all items under a strategy's gating with every expert in slots, and its ledger's counts."""
    resident, slots = all_resident(strategy), loaded.native.total_experts
    engine = mobile.attach(loaded.model, resident, slots=slots, kernel="grouped").mobile
    try:
        lm = EngineLM(loaded.model, loaded.tokenizer, BATCH, traced=False)
        return Answered(score(lm, task, list(range(items))), engine.stats())
    finally:
        mobile.detach(loaded.model)


def _checks(loaded: Loaded, prompt: str, options: dict[str, Any], found: dict[str, Answered]) -> dict[str, bool]:
    """Answer the first item again, alone: by the stock model, and by MoBiLE. Return what has to hold."""

    def alone() -> str:
        [(text, _)] = generate(loaded.model, loaded.tokenizer, [prompt], options)
        return text

    stock, strategy = alone(), resolve("mobile")
    mobile.attach(loaded.model, strategy, slots=strategy.min_slots(loaded.native))
    try:
        again = alone()
    finally:
        mobile.detach(loaded.model)
    return {
        f"{FULL_K}: the first text of the batch equals the stock model's alone": found[FULL_K].answers[0].output
        == stock,
        f"{PAPERS}: the first text of the batch equals that alone": found[PAPERS].answers[0].output == again,
    }


def _record(
    cell: AccuracyCell,
    loaded: Loaded,
    items: Sequence[Item],
    found: dict[str, Answered],
    checks: dict[str, bool],
    ended: dict[str, Any] | None,
    seconds: float,
) -> Record:
    """Return the record; its counters are what must repeat exactly."""
    counters, gatings = {"items": len(items)}, []
    for name, answered in found.items():
        written = json.dumps([answer.output for answer in answered.answers])
        counts = {count: answered.stats[count] for count in ("tokens", "fallbacks")}
        right = sum(answer.correct for answer in answered.answers)
        gatings.append({"gating": name, "outputs": hashlib.sha256(written.encode()).hexdigest(), **counts})
        counters |= {f"{name} {count}": value for count, value in {**counts, "right": right}.items()}
    return Record(
        id=cell.id,
        scope=cell.scope,
        weights=cell.model.weights,
        model=cell.model.name,
        geometry=cell.model.geometry,
        task=cell.task,
        strategy=cell.strategy,
        gamma=cell.gamma,
        lossless=False,
        hardware=cell.hardware,
        budget=cell.budget,
        slots=None,
        seed=cell.seed,
        config={
            "kind": cell.kind,
            "swept": False,
            "profile_sources": [],
            "link_gb_per_s": None,
            "moe_layers": loaded.native.moe_layers,
            "experts": loaded.native.experts,
            "top_k": loaded.native.top_k,
            "family": cell.model.family,
            "training_seed": cell.model.training_seed,
            "items": cell.items,
            "round": cell.round,
            "rounds": cell.rounds,
            "margin_points": cell.margin_points,
            "ended": ended,
            "prompts": hashlib.sha256(json.dumps([item.prompt for item in items]).encode()).hexdigest(),
            "keys": [hashlib.sha256(item.key.encode()).hexdigest()[:KEY_DIGITS] for item in items],
            "right": {
                name: "".join("01"[answer.correct] for answer in answered.answers) for name, answered in found.items()
            },
            "gatings": gatings,
        },
        environment=environment(),
        counters=counters,
        checks=checks,
        wall_seconds=seconds,
    )
