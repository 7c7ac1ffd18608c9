"""One child process of a run: some live runs of a model, or the timing of cells that share one live run.

Reads its job as JSON on standard input and answers on standard output with a line of JSON for each thing done; all
else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mobile import trace
from mobile.geometry import Geometry
from mobile.hardware import profile
from mobile.strategy import resolve
from suites.environment import environment
from suites.matrix import Cell, Generation, Model
from suites.record import Finished, Item, Record, RunFolder
from suites.timing import bench, time_requests, timeline

TIMELINE_TOKENS = 3
BINS = 20  # of the confidence histogram
Trace = tuple[list[trace.Request], dict[str, Any]]


def generation_from(data: dict[str, Any]) -> Generation:
    return Generation(**{**data, "model": Model(**data["model"])})


def cell_from(data: dict[str, Any]) -> Cell:
    return Cell(**{**data, "generation": generation_from(data["generation"])})


def time_cell(cell: Cell, run: RunFolder, recorded: Trace) -> Record:
    """The record of a cell whose generation has been written under `run`. Imports no torch."""
    begun = time.monotonic()
    generation = cell.generation
    answers = json.loads(run.answers(generation.id).read_text())
    requests, about = recorded
    requests = requests[: cell.timed]
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
        for answer, counters in zip(answers["answers"][: cell.timed], taken, strict=True)
    )  # fmt: skip
    shown = max(requests, key=lambda request: (any(step.kind == "big" for step in request), len(request)))
    drawn = tuple((e.what, e.start_ns, e.end_ns, e.name) for e in timeline(on, shown, TIMELINE_TOKENS))
    return Record(
        id=cell.id, scope="cpu+virtual", weights=generation.model.weights, model=generation.model.name,
        geometry=on.geometry.name, task=generation.task, strategy=strategy.name, gamma=cell.gamma,
        lossless=strategy.lossless, hardware=card.name, budget=cell.budget, slots=on.slots, seed=generation.seed,
        config={
            "generation": generation.id, "swept": cell.swept, "control": "canary" if generation.scrambled else None,
            "family": generation.model.family, "training_seed": generation.model.training_seed,
            "items": generation.items, "timed_items": len(requests), "batch_of_generation": answers["batch"],
            "confidence_histogram": confidences(requests),
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


def confidences(requests: list[trace.Request]) -> list[list[float]] | None:
    """[lower edge, count] of 20 equal bins of the little passes' confidence; None where there was no little pass."""
    sure = [step.confidence for request in requests for step in request if step.confidence is not None]
    counts = [0] * BINS
    for value in sure:
        counts[min(int(value * BINS), BINS - 1)] += 1
    return [[edge / BINS, count] for edge, count in enumerate(counts)] if sure else None


def attempt(name: str, label: str, action: Callable[[], Any]) -> Finished:
    """Do one thing; an exception's traceback goes to the log."""
    begun = time.monotonic()
    try:
        action()
    except Exception as error:
        traceback.print_exc()
        return Finished(name, label, time.monotonic() - begun, f"{type(error).__name__}: {error}")
    return Finished(name, label, time.monotonic() - begun)


def apart(cell: Cell, run: RunFolder, recorded: Trace) -> Finished:
    """Time one cell in a process of its own, which shares the loaded trace where the system can fork."""
    ways = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in ways else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_timed, args=(cell, run, recorded, theirs))
    begun = time.monotonic()
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        child.join()
        why = f"its process ended with code {child.exitcode} and said nothing"
        return Finished(cell.id, cell.label, time.monotonic() - begun, why)
    finally:
        child.join()


def _timed(cell: Cell, run: RunFolder, recorded: Trace, answer: Any) -> None:
    answer.send(attempt(cell.id, cell.label, lambda: time_cell(cell, run, recorded).save(run.record(cell.id))))


def main() -> None:
    job = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = RunFolder(Path(job["run"]))

    def say(done: Finished) -> None:
        print(json.dumps(asdict(done)), file=answers, flush=True)

    if "generations" in job:
        from suites import generation as live

        for one in map(generation_from, job["generations"]):
            say(attempt(one.id, one.label, partial(live.run, one, run, job["hardware"])))
    else:
        cells = [cell_from(data) for data in job["cells"]]
        loaded: list[Trace] = []
        opened = attempt("", "", lambda: loaded.append(trace.load(run.trace(cells[0].generation.id))))
        for cell in cells:
            say(apart(cell, run, loaded[0]) if loaded else Finished(cell.id, cell.label, 0.0, opened.error))


if __name__ == "__main__":
    main()
