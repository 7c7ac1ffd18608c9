"""Small runs of records that follow a stated rule, so that a test knows what the report must say of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from reports.data.results import Results, read
from suites.record import Item, Record, RunFolder, write_json

ITEMS = 40
NANOSECONDS = {
    "resident": 5_000_000,
    "on-demand": 66_000_000,
    "on-demand-overlap": 64_000_000,
    "lru": 56_000_000,
    "static-half": 32_000_000,
    "mobile": 40_000_000,
}  # a token
LOSSY = ("static-half", "mobile")
PACKAGES = {"torch": "2.13.0", "numpy": "2.4.6"}


@dataclass(frozen=True)
class Rule:
    """The contents of the records; `wrong` are the items full K gets wrong, `lost` those a lossy strategy loses."""

    models: tuple[tuple[str, str, int], ...] = (("olmoe-tiny", "olmoe", 0),)
    tasks: tuple[str, ...] = ("arithmetic", "web_of_lies")
    scope: str = "cpu+virtual"
    weights: str = "shipped-tiny"
    wrong: tuple[int, ...] = (1, 5, 9)
    lost: tuple[int, ...] = (2, 7)
    timed: int = ITEMS
    canary_correct: int = 0
    canary_slowdown: float = 1.0
    gpu: dict[str, Any] | None = None
    telemetry: dict[str, Any] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def item(rule: Rule, task: str, strategy: str, doc: int) -> Item:
    """Return item number `doc` as a strategy answered it; later items take a little longer."""
    right = doc not in rule.wrong and not (strategy in LOSSY and doc in rule.lost)
    text = f" {doc} + 1 = {doc + 1 if right else doc}. So the answer is {doc + 1 if right else doc}."
    nanoseconds = NANOSECONDS[strategy] * (1 + doc / 1000)
    return Item(
        doc=doc,
        prompt_sha256=hashlib.sha256(f"{task} {doc}".encode()).hexdigest(),
        prompt=f"What is {doc} + 1? <b>&",
        output=text,
        fallback_spans=((1, 3), (4, 5)) if strategy == "mobile" else (),
        answer=str(doc),
        correct=right,
        prompt_tokens=8,
        decode_tokens=10,
        fallbacks=2 if strategy == "mobile" else 0,
        ttft_ns=300_000_000,
        decode_ns=round(10 * nanoseconds),
        decode_bytes=1_000,
    )


def record(
    rule: Rule, model: tuple[str, str, int], task: str, strategy: str, gamma: float | None, budget: str
) -> Record:
    """Return a cell; `model` is (name, family, training seed), and a gamma other than 0.7 belongs to the sweep."""
    swept = gamma is not None and gamma != 0.7
    few = ITEMS if strategy in ("resident", *LOSSY) else rule.timed
    items = tuple(item(rule, task, strategy, doc) for doc in range(ITEMS) if doc % (ITEMS // few) == 0)
    tokens, seconds = sum(i.decode_tokens for i in items), sum(i.decode_ns for i in items) / 1e9
    counters = {
        "tokens": tokens,
        "fallbacks": sum(i.fallbacks for i in items),
        "hits": 10 * tokens,
        "demand_loads": 90 * tokens,
        "late_prefetches": 0,
        "prefetch_loads": 20,
        "prefetch_useful": 15,
        "loads": 110,
        "decode_bytes": len(items) * 1000,
        "bytes_loaded": 2_000_000,
        "decode_seconds": seconds,
        "decode_stall_seconds": 0.9 * seconds,
    }
    named = hashlib.sha256("-".join(map(str, (model[0], task, strategy, gamma, budget))).encode()).hexdigest()[:16]
    config = {
        "generation": named,
        "swept": swept,
        "control": None,
        "family": model[1],
        "training_seed": model[2],
        "dtype": "float32",
        "items": ITEMS,
        "task_items": ITEMS,
        "expert_nbytes": 12_582_912,
        "moe_layers": 16,
        "experts": 64,
        "top_k": 8,
        "link_gb_per_s": 25.0,
        "profile_sources": ["assumed"],
        "strategy_source": "a paper",
        "confidence_histogram": [[edge / 20, edge] for edge in range(20)] if strategy == "mobile" else None,
    }
    made = Record(
        id=named,
        scope=rule.scope,
        weights=rule.weights,
        model=model[0],
        geometry="olmoe-1b-7b",
        task=task,
        strategy=strategy,
        gamma=gamma,
        lossless=strategy not in LOSSY,
        hardware="rtx4080-pcie4",
        budget="all" if strategy == "resident" else budget,
        slots=None if strategy == "resident" else 64,
        seed=0,
        config=config,
        environment={
            "cpu": "a processor",
            "fingerprint": f"{rule.gpu}",
            "telemetry": rule.telemetry,
            "cores": 2,
            "gpu": rule.gpu,
            "packages": PACKAGES,
            "python": "3.11",
            "platform": "Linux",
            "git_commit": "0" * 40,
            "git_dirty": False,
        },
        items=items,
        counters=counters,
        ceiling_tokens_per_s=16.0,
        checks={f"{strategy}: live ledger equals replay": True},
        timeline=(("load", 0, 500, "load 0.1"), ("compute", 500, 900, "compute dense")) if budget == "smallest" else (),
        guesses=((0, 8, 6, 8), (1, 8, 4, 8)) if strategy == "mobile" else (),
    )
    return replace(made, **rule.overrides)


def canary(rule: Rule, sound: Record) -> Record:
    """Return the same cell with a scrambled router, by the rule's number of right answers and slowdown."""
    items = tuple(
        replace(i, output=" ?", correct=n < rule.canary_correct, decode_ns=round(i.decode_ns * rule.canary_slowdown))
        for n, i in enumerate(sound.items)
    )
    named = f"c{sound.id[1:]}"
    config = {**sound.config, "control": "canary", "generation": named}
    return replace(sound, id=named, items=items, config=config, checks={})


def records(rule: Rule) -> list[Record]:
    """Return every cell of a small preset: all strategies at two budgets, a gamma sweep, and a canary a model."""
    made = []
    for model in rule.models:
        for task in rule.tasks:
            made.append(record(rule, model, task, "resident", None, "all"))
            for budget in ("smallest", "16GiB"):
                for strategy in ("on-demand", "on-demand-overlap", "lru", "static-half"):
                    made.append(record(rule, model, task, strategy, None, budget))
                made.append(record(rule, model, task, "mobile", 0.7, budget))
            made.append(record(rule, model, task, "mobile", 0.9, "smallest"))
        sound = next(r for r in made if (r.model, r.strategy) == (model[0], "on-demand-overlap"))
        made.append(canary(rule, sound))
    return made


def results(rule: Rule) -> Results:
    """Return the records as `reports.data.results.read` would."""
    made = records(rule)
    controls = tuple(r for r in made if r.config["control"])
    return Results("tiny", tuple(r for r in made if r not in controls), (), controls)


def live_run(record: Record, folder: RunFolder) -> None:
    """Write the answers that a record is replayed from, and the head of their trace."""
    named = record.config["generation"]
    kept = ("doc", "prompt_sha256", "prompt", "output", "fallback_spans", "answer", "correct")
    about = {"generation": named, "model": record.model, "task": record.task}
    answers = [{name: getattr(item, name) for name in kept} for item in record.items]
    said = {"answers": answers, "checks": record.checks, "batch": 1, "wall_seconds": 1.0}
    write_json(folder.answers(named), {**said, **about})
    header = json.dumps({"about": {**about, "docs": [item.doc for item in record.items]}}).encode()
    np.savez(folder.trace(named), header=np.frombuffer(header, dtype=np.uint8))


def write(rule: Rule, run: Path) -> Path:
    """Write the records as a run folder and return it."""
    folder = RunFolder(run)
    made = records(rule)
    cells = [{"id": r.id, "label": f"{r.model} {r.task} {r.strategy} {r.budget}"} for r in made]
    write_json(folder.plan, {"preset": "tiny", "minutes": 2, "cells": cells})
    for one in made:
        one.save(folder.record(one.id))
        live_run(one, folder)
    assert len(read(run).records) + len(read(run).controls) == len(made)
    return run
