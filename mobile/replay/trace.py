"""Traces: the routing decisions of a run, which can be replayed under another strategy.

`trace_file` defines their file format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobile.ledger import Counters
from mobile.policies.next_logits import NextLayerLogits, StepLogits, predicting_layer
from mobile.policies.protocols import LayerMap, Visit
from mobile.replay import trace_file
from mobile.replay.fast_residency import FastResidency

Kind = Literal["prefill", "full", "little", "big"]
KINDS: tuple[Kind, ...] = ("prefill", "full", "little", "big")  # a file numbers them in this order
Experts = tuple[tuple[int, ...], ...]  # per MoE layer of the recorded model, ascending


@dataclass(frozen=True)
class Step:
    """A forward pass of one sequence.

    `experts` names each layer's active experts and `counts` the tokens each of them got (empty: one each).
    `confidence` is the gating's signal after a little pass (the paper's: the highest softmax probability), `predicted`
    the experts per layer that a fallback expected before its big pass. `ahead` (layers - 1, experts), float16, holds
    for each layer but the last the next layer's router logits on this layer's router input: all that next-layer
    predictors need of that input.
    Recorded under `Strategy.quasi`, they are logits on the quasi-hidden state, and serve no other kind of lookahead.
    """

    kind: Kind
    tokens: int
    experts: Experts
    counts: Experts = ()
    confidence: float | None = None
    predicted: Experts = ()
    ahead: np.ndarray | None = field(default=None, compare=False)


Request = list[Step]  # one prompt and its decode steps, in order


def run_step(step: Step, residency: FastResidency, layer_map: LayerMap) -> None:
    """Replay one step: run each recorded layer once for every layer that `layer_map` gives it."""
    if step.kind == "big":
        residency.fallback(
            [
                (layer, expert)
                for mine, experts in zip(layer_map, step.predicted, strict=True)
                for layer in mine
                for expert in experts
            ]
        )
    residency.begin(step.kind, step.tokens)
    predicts = residency.lookahead is not None and step.ahead is not None
    ahead = StepLogits(step.ahead[:, None]) if predicts and step.ahead is not None else None
    run_layer, experts, counts, running = residency.run_layer, step.experts, step.counts, _layer_visits(layer_map)
    if counts or step.kind == "prefill" or not residency.run_pass(running, experts):
        for mine, layer, source in running:
            signal = None if ahead is None or source is None else NextLayerLogits(ahead, source)
            run_layer(layer, experts[mine], counts[mine] if counts else (), signal)
    residency.finish()


@cache
def _layer_visits(layer_map: tuple[tuple[int, ...], ...]) -> list[tuple[int, int, int | None]]:
    """Return (recorded layer, layer, recorded layer whose next-layer logits it is given, or None) in running order."""
    return [
        (mine, layer, predicting_layer(mine, layer == layers[-1], len(layer_map)))
        for mine, layers in enumerate(layer_map)
        for layer in layers
    ]


def visits(requests: Iterable[Request], layer_map: LayerMap) -> tuple[Visit, ...]:
    """Return every decode visit of a layer, in order: the future that some strategies need to know."""
    return tuple(
        (layer, step.experts[mine])
        for request in requests
        for step in request
        if step.kind != "prefill"
        for mine, layers in enumerate(layer_map)
        for layer in layers
    )


def replay(requests: Iterable[Request], residency: FastResidency, layer_map: LayerMap) -> list[Counters]:
    """Replay every request in order on one residency; return what each added to the counters."""
    taken = []
    for request in requests:
        before = residency.ledger.counters.copy()
        for step in request:
            run_step(step, residency, layer_map)
        residency.end_token()
        taken.append(residency.ledger.counters.since(before))
    return taken


def _pack(rows: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """Return the rows' lengths, and their values one after another."""
    return [len(row) for row in rows], [value for row in rows for value in row]


def _unpack(lengths: np.ndarray, values: np.ndarray) -> list[tuple[int, ...]]:
    """Return the rows that `_pack` took apart."""
    ends = np.cumsum(lengths.astype(np.int64))
    flat = values.tolist()
    return [tuple(flat[end - n : end]) for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)]


def save(path: Path, requests: Sequence[Request], layers: int, about: dict[str, Any]) -> None:
    """Write requests of a model with `layers` MoE layers; see `trace_file` for the format and for `about`."""
    steps = [step for request in requests for step in request]
    empty: Experts = ((),) * layers
    columns: dict[str, Any] = {
        "request_steps": [len(request) for request in requests],
        "kind": [KINDS.index(s.kind) for s in steps],
        "tokens": [s.tokens for s in steps],
        "confidence": [np.nan if s.confidence is None else s.confidence for s in steps],
    }
    for name in ("experts", "counts", "predicted"):
        rows = [row for step in steps for row in (getattr(step, name) or empty)]
        columns[f"{name}_lengths"], columns[f"{name}_values"] = _pack(rows)
    with_logits = [(i, step.ahead) for i, step in enumerate(steps) if step.ahead is not None]
    columns["ahead_steps"] = [i for i, _ in with_logits]
    columns["ahead"] = [ahead for _, ahead in with_logits] or np.empty((0, layers - 1, 0))
    trace_file.write(
        path, {n: np.array(columns[n], dtype) for n, (dtype, _) in trace_file.ARRAYS.items()}, layers, about
    )


def load(path: Path) -> tuple[list[Request], dict[str, Any]]:
    """Read a saved trace; return its requests and `about`. Raise Refused for a file that is not a complete trace."""
    data, layers, about = trace_file.read(path)
    per_layer = {
        name: _unpack(data[f"{name}_lengths"], data[f"{name}_values"]) for name in ("experts", "counts", "predicted")
    }
    ahead = dict(zip(data["ahead_steps"].tolist(), data["ahead"], strict=True))
    sure = data["confidence"].tolist()
    steps = []
    for i, (kind, tokens) in enumerate(zip(data["kind"].tolist(), data["tokens"].tolist(), strict=True)):
        experts, counts, predicted = (tuple(rows[i * layers : (i + 1) * layers]) for rows in per_layer.values())
        steps.append(
            Step(
                kind=KINDS[kind],
                tokens=tokens,
                experts=experts,
                counts=counts if any(counts) else (),
                confidence=None if sure[i] != sure[i] else sure[i],
                predicted=predicted if KINDS[kind] == "big" else (),
                ahead=ahead.get(i),
            )
        )
    left = iter(steps)
    return [list(islice(left, n)) for n in data["request_steps"].tolist()], about
