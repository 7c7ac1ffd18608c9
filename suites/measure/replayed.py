"""Replayed cells: the trace of a live run timed under a strategy, on hardware with a memory budget. No torch."""

from __future__ import annotations

import gc
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mobile.costs.geometry import Geometry
from mobile.costs.hardware import profile
from mobile.errors import Refused
from mobile.ledger import Ledger
from mobile.policies.strategy import Strategy, resolve, strategies
from mobile.replay import trace
from mobile.replay.replay import ReplaySetup, replay_requests
from suites.budget import replay_setup, timeline
from suites.environment import environment
from suites.plan.cells import Cell
from suites.record import Item, Record, RunFolder
from suites.record_fields import DOUBT_EDGES
from suites.run_files import read_answers
from suites.tasks.files import items_of, sources

TIMELINE_TOKENS = 3
BINS = 20  # of the confidence histogram
Trace = tuple[list[trace.Request], dict[str, Any]]


def load(pieces: Sequence[Cell], run: RunFolder) -> Trace:
    """Read the trace that the cells of one live run are replayed from. Raise Refused, also for that of another one."""
    # 1. Do once what every fork would do again.
    environment()
    strategies()
    # 2. Read the trace.
    generation = pieces[0].generation.id
    requests, about = trace.load(run.trace(generation))
    if about.get("generation") != generation:
        raise Refused(f"{run.trace(generation)} is the trace of another live run; delete it, and it is made again.")
    gc.freeze()  # so that no fork copies all of it, to look for cycles
    return requests, about


def measure(cell: Cell, recorded: Trace, run: RunFolder) -> None:
    """Replay the trace under the cell's strategy and write its record."""
    record(cell, recorded, run).save(cell.output(run))


def record(cell: Cell, recorded: Trace, run: RunFolder) -> Record:
    """Return the record of a cell whose live run has been written under `run`."""
    begun = time.monotonic()
    generation = cell.generation
    live = read_answers(run, generation.id)
    requests, about = recorded
    chosen = set(cell.docs)
    agreed = live.agreed or [None] * len(requests)
    whole = zip(live.answers, requests, agreed, strict=True)
    answered = [(answer, request, alike) for answer, request, alike in whole if answer.doc in chosen]
    requests = [request for _, request, _ in answered]
    strategy = resolve(cell.strategy, cell.gamma)
    card = profile(cell.hardware)
    native = Geometry.from_record(about["geometry"])
    setup = replay_setup(strategy, native, generation.model.geometry, card, cell.budget, rows=generation.rows)
    taken, ledger, training = replay_requests(setup, requests)
    items = tuple(
        Item(
            **vars(answer),
            prompt_tokens=counters.prompt_tokens,
            decode_tokens=counters.tokens,
            fallbacks=counters.fallbacks,
            ttft_ns=counters.prefill_ns,
            decode_ns=counters.decode_ns,
            decode_bytes=counters.decode_bytes,
        )
        for (answer, *_), counters in zip(answered, taken, strict=True)
    )
    drawn = _timeline(setup, requests) if cell.budget == "smallest" else ()
    return record_of(
        cell,
        strategy,
        Measured(setup.geometry, card.name, setup.slots, card.link_gb_per_s, items, ledger),
        config={
            "generation": generation.id,
            "control": "canary" if generation.scrambled else None,
            "timing": "replay of recorded routing",
            "batch_of_generation": live.batch,
            "confidence_histogram": confidences(requests),
            "doubt_histogram": doubts(requests, [alike for *_, alike in answered]),
            "dtype": "float32",
            "profile_sources": list(card.sources),
        },
        environment={**environment(), "telemetry": None, "training": training and asdict(training)},
        counters=ledger.stats(),
        checks=live.checks,
        timeline=drawn,
        wall_seconds=time.monotonic() - begun,
    )


def _timeline(setup: ReplaySetup, requests: list[trace.Request]) -> tuple[tuple[str, int, int, str], ...]:
    """Return the events of a few tokens of the longest request, of those with a fallback where there are some."""
    shown = max(requests, key=lambda request: (any(step.kind == "big" for step in request), len(request)))
    return tuple((e.what, e.start_ns, e.end_ns, e.name) for e in timeline(setup, shown, TIMELINE_TOKENS))


@dataclass(frozen=True)
class Measured:
    """A timed cell: the sizes, hardware and slots it was timed with, its items, and its ledger.

    `link_gb_per_s` is the link's rate, None where it is not known.
    """

    geometry: Geometry
    hardware: str
    slots: int | None
    link_gb_per_s: float | None
    items: tuple[Item, ...]
    ledger: Ledger


def record_of(cell: Cell, strategy: Strategy, measured: Measured, *, config: dict[str, Any], **fields: Any) -> Record:
    """Return the record of a scored cell; `config` and `fields` add what depends on how it was timed."""
    generation, geometry, rate = cell.generation, measured.geometry, measured.link_gb_per_s
    return Record(
        id=cell.id,
        scope=cell.scope,
        weights=generation.model.weights,
        model=generation.model.name,
        geometry=geometry.name,
        task=generation.task,
        strategy=strategy.name,
        gamma=cell.gamma,
        lossless=strategy.lossless,
        hardware=measured.hardware,
        budget=cell.budget,
        slots=measured.slots,
        seed=generation.seed,
        config={
            "swept": cell.swept,
            "family": generation.model.family,
            "training_seed": generation.model.training_seed,
            "items": generation.items,
            "timed_items": len(measured.items),
            "task_items": items_of(generation.task, generation.folder),
            "expert_nbytes": geometry.expert_nbytes,
            "moe_layers": geometry.moe_layers,
            "experts": geometry.experts,
            "top_k": geometry.top_k,
            "link": cell.link,
            "link_gb_per_s": rate,
            "rows": generation.rows,
            "answers_of": generation.strategy,
            "needs_future": strategy.needs_future,
            "strategy_source": strategy.source,
            "data": sources(generation.task, generation.folder),
            **config,
        },
        items=measured.items,
        ceiling_tokens_per_s=None if rate is None else geometry.on_demand_ceiling(rate),
        guesses=tuple((layer, *seen) for layer, seen in sorted(measured.ledger.guesses.items())),
        **fields,
    )


def confidences(
    requests: Sequence[trace.Request], kinds: Sequence[trace.Kind] = ("little",)
) -> list[list[float]] | None:
    """Return [lower edge, count] of 20 equal bins of the little passes' confidence; None without a little pass.

    Records without a doubt_histogram counted a token that fell back twice: their `kinds` are little and big.
    """
    steps = [step for request in requests for step in request if step.kind in kinds]
    sure = [step.confidence for step in steps if step.confidence is not None]
    counts = [0] * BINS
    for value in sure:
        counts[min(int(value * BINS), BINS - 1)] += 1
    return [[edge / BINS, count] for edge, count in enumerate(counts)] if sure else None


def doubts(
    requests: Sequence[trace.Request], agreed: Sequence[Sequence[int] | None]
) -> list[list[float | None]] | None:
    """Return by bin of 1 - confidence its lower edge, tokens, fallbacks, and on how many of these the passes disagree.

    `agreed` has by request and fallback whether both passes write the same token; None where that was not recorded, and
    then disagreements are None, too. None without a little pass that was judged.
    """
    known = all(alike is not None for alike in agreed)
    counts = [[0, 0, 0] for _ in DOUBT_EDGES]
    for request, alike in zip(requests, agreed, strict=True):
        same = iter(alike or ())
        for step in request:
            if step.confidence is None:
                continue
            found = counts[bisect_right(DOUBT_EDGES, 1 - step.confidence) - 1]
            if step.kind == "little":
                found[0] += 1
            else:
                found[1] += 1
                found[2] += known and not next(same)
    if not any(tokens for tokens, *_ in counts):
        return None
    return [
        [edge, tokens, fell, wrong if known else None]
        for edge, (tokens, fell, wrong) in zip(DOUBT_EDGES, counts, strict=True)
    ]
