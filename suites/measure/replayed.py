"""A cell: a live run's trace timed under a strategy, on hardware with a memory budget."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from mobile.costs.geometry import Geometry
from mobile.costs.hardware import profile
from mobile.ledger import Ledger
from mobile.policies.strategy import Strategy, resolve
from mobile.replay import trace
from mobile.replay.replay import replay_requests
from suites.budget import replay_setup, timeline
from suites.environment import environment
from suites.plan.cells import Cell
from suites.record import Item, Record, RunFolder, read_json
from suites.tasks.files import items_of, sources

TIMELINE_TOKENS = 3
BINS = 20  # of the confidence histogram
Trace = tuple[list[trace.Request], dict[str, Any]]


def load(first: Cell, run: RunFolder) -> Trace:
    """Read the trace that the cells of one live run are replayed from."""
    environment()  # once, for every fork
    return trace.load(run.trace(first.generation.id))


def measure(cell: Cell, recorded: Trace, run: RunFolder) -> None:
    """Replay the trace under the cell's strategy and write its record."""
    record(cell, recorded, run).save(cell.output(run))


def record(cell: Cell, recorded: Trace, run: RunFolder) -> Record:
    """Return the record of a cell whose generation has been written under `run`. Imports no torch."""
    begun = time.monotonic()
    generation = cell.generation
    live = read_json(run.answers(generation.id))
    requests, about = recorded
    chosen = set(cell.docs)
    answered = [pair for pair in zip(live["answers"], requests, strict=True) if pair[0]["doc"] in chosen]
    requests = [request for _, request in answered]
    strategy = resolve(cell.strategy, cell.gamma)
    card = profile(cell.hardware)
    on = replay_setup(strategy, Geometry.from_record(about["geometry"]), generation.model.geometry, card, cell.budget)
    taken, ledger, training = replay_requests(on, requests)
    items = tuple(
        Item(
            **answer,
            prompt_tokens=counters.prompt_tokens,
            decode_tokens=counters.tokens,
            fallbacks=counters.fallbacks,
            ttft_ns=counters.prefill_ns,
            decode_ns=counters.decode_ns,
            decode_bytes=counters.decode_bytes,
        )
        for (answer, _), counters in zip(answered, taken, strict=True)
    )
    shown = max(requests, key=lambda request: (any(step.kind == "big" for step in request), len(request)))
    drawn = tuple((e.what, e.start_ns, e.end_ns, e.name) for e in timeline(on, shown, TIMELINE_TOKENS))
    return record_of(
        cell,
        strategy,
        on.geometry,
        hardware=card.name,
        slots=on.slots,
        rate=card.link_gb_per_s,
        items=items,
        config={
            "generation": generation.id,
            "control": "canary" if generation.scrambled else None,
            "timing": "replay of recorded routing",
            "batch_of_generation": live["batch"],
            "confidence_histogram": confidences(requests),
            "dtype": "float32",
            "profile_sources": list(card.sources),
        },
        environment={**environment(), "telemetry": None, "training": training and asdict(training)},
        counters=ledger.stats(),
        checks=live["checks"],
        ledger=ledger,
        timeline=drawn if cell.budget == "smallest" else (),
        wall_seconds=time.monotonic() - begun,
    )


def record_of(
    cell: Cell,
    strategy: Strategy,
    charged: Geometry,
    *,
    hardware: str,
    slots: int | None,
    rate: float | None,
    items: tuple[Item, ...],
    config: dict[str, Any],
    ledger: Ledger,
    **rest: Any,
) -> Record:
    """The record of a cell: what the cell itself says, and what `config` and `rest` add. `rate` is the link's, GB/s."""
    generation = cell.generation
    return Record(
        id=cell.id,
        scope=cell.scope,
        weights=generation.model.weights,
        model=generation.model.name,
        geometry=charged.name,
        task=generation.task,
        strategy=strategy.name,
        gamma=cell.gamma,
        lossless=strategy.lossless,
        hardware=hardware,
        budget=cell.budget,
        slots=slots,
        seed=generation.seed,
        config={
            "swept": cell.swept,
            "family": generation.model.family,
            "training_seed": generation.model.training_seed,
            "items": generation.items,
            "timed_items": len(items),
            "task_items": items_of(generation.task, generation.folder),
            "expert_nbytes": charged.expert_nbytes,
            "moe_layers": charged.moe_layers,
            "experts": charged.experts,
            "top_k": charged.top_k,
            "link": cell.link,
            "link_gb_per_s": rate,
            "strategy_source": strategy.source,
            "data": sources(generation.task, generation.folder),
            **config,
        },
        items=items,
        ceiling_tokens_per_s=None if rate is None else charged.on_demand_ceiling(rate),
        guesses=tuple((layer, *seen) for layer, seen in sorted(ledger.guesses.items())),
        **rest,
    )


def confidences(requests: list[trace.Request]) -> list[list[float]] | None:
    """[lower edge, count] of 20 equal bins of the little passes' confidence; None where there was no little pass."""
    sure = [step.confidence for request in requests for step in request if step.confidence is not None]
    counts = [0] * BINS
    for value in sure:
        counts[min(int(value * BINS), BINS - 1)] += 1
    return [[edge / BINS, count] for edge, count in enumerate(counts)] if sure else None
