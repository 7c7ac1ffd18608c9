"""One child process of a run: a generation, or the timing of a cell. Reads its job as JSON on standard input."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mobile import trace
from mobile.geometry import Geometry
from mobile.hardware import profile
from mobile.strategy import resolve
from suites.environment import environment
from suites.matrix import Cell, Generation, Model
from suites.record import Item, Record, RunFolder
from suites.timing import bench, time_requests, timeline

TIMELINE_TOKENS = 3


def generation_from(data: dict[str, Any]) -> Generation:
    return Generation(**{**data, "model": Model(**data["model"])})


def time_cell(cell: Cell, run: RunFolder) -> Record:
    """The record of a cell whose generation has been written under `run`. Imports no torch."""
    begun = time.monotonic()
    generation = cell.generation
    answers = json.loads(run.answers(generation.id).read_text())
    requests, about = trace.load(run.trace(generation.id))
    strategy = resolve(cell.strategy, cell.gamma)
    card = profile(cell.hardware)
    on = bench(strategy, Geometry(**about["geometry"]), generation.model.geometry, card, cell.budget)
    taken, ledger = time_requests(on, requests)
    items = tuple(
        Item(
            **answer, prompt_tokens=counters.prompt_tokens, decode_tokens=counters.tokens,
            fallbacks=counters.fallbacks, ttft_ns=counters.prefill_ns, decode_ns=counters.decode_ns,
            decode_bytes=counters.decode_bytes,
        )
        for answer, counters in zip(answers["answers"], taken, strict=True)
    )  # fmt: skip
    shown = max(requests, key=lambda request: (any(step.kind == "big" for step in request), len(request)))
    drawn = tuple((e.what, e.start_ns, e.end_ns, e.name) for e in timeline(on, shown, TIMELINE_TOKENS))
    return Record(
        id=cell.id, scope="cpu+virtual", weights=generation.model.weights, model=generation.model.name,
        geometry=on.geometry.name, task=generation.task, strategy=strategy.name, gamma=cell.gamma,
        lossless=strategy.lossless, hardware=card.name, budget=cell.budget, slots=on.slots, seed=generation.seed,
        config={
            "generation": generation.id, "swept": cell.swept,
            "items": generation.items, "batch_of_generation": answers["batch"],
            "dtype": "float32", "expert_nbytes": on.geometry.expert_nbytes, "moe_layers": on.geometry.moe_layers,
            "experts": on.geometry.experts, "top_k": on.geometry.top_k, "link_gb_per_s": card.link_gb_per_s,
            "profile_sources": list(card.sources), "strategy_source": strategy.source,
        },
        environment=environment(), items=items, counters=ledger.stats(),
        ceiling_tokens_per_s=on.geometry.on_demand_ceiling(card.link_gb_per_s), checks=answers["checks"],
        timeline=drawn if cell.budget == "smallest" else (),
        guesses=tuple((layer, *seen) for layer, seen in sorted(ledger.guesses.items())),
        wall_seconds=time.monotonic() - begun,
    )  # fmt: skip


def main() -> None:
    job = json.load(sys.stdin)
    run = RunFolder(Path(job["run"]))
    if "generations" in job:
        from suites import generation as live

        for data in job["generations"]:
            generation = generation_from(data)
            live.run(generation, run, job["hardware"])
    else:
        data = job["cell"]
        cell = Cell(**{**data, "generation": generation_from(data["generation"])})
        time_cell(cell, run).save(run.record(cell.id))


if __name__ == "__main__":
    main()
