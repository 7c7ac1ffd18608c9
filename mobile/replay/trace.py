"""Traces: the routing decisions of a run, replayable under another strategy; `trace_file` defines their file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobile.ledger import Counters
from mobile.policies.next_logits import NextLayerLogits, StepLogits
from mobile.policies.protocols import Visit
from mobile.replay import trace_file
from mobile.replay.fast_residency import FastResidency

Kind = Literal["prefill", "full", "little", "big"]
KINDS: tuple[Kind, ...] = ("prefill", "full", "little", "big")  # a file numbers them in this order
Experts = tuple[tuple[int, ...], ...]  # per MoE layer of the recorded model, ascending
StandsFor = tuple[tuple[int, ...], ...]  # for each of those layers, the layers charged with its routing


@dataclass(frozen=True)
class Step:
    """One forward pass of one sequence.

    `experts` names each layer's active experts and `counts` the tokens each of them got (empty: one each).
    `confidence` is the highest softmax probability after a little pass, `predicted` the experts per layer that
    a fallback expected before its big pass. `ahead` (layers - 1, experts), float16, holds for each layer but the last
    the next layer's router logits on this layer's router input: all that next-layer predictors need of that input.
    (Recorded under `Strategy.quasi`, they are logits on what stands in for it, and serve no other kind of lookahead.)
    """

    kind: Kind
    tokens: int
    experts: Experts
    counts: Experts = ()
    confidence: float | None = None
    predicted: Experts = ()
    ahead: np.ndarray | None = field(default=None, compare=False)


Request = list[Step]  # one prompt and its decode steps, in order


def run(step: Step, residency: FastResidency, layer_map: StandsFor) -> None:
    """Charge one step: each recorded layer is run for all the layers it stands for."""
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
    looks = residency.lookahead is not None and step.ahead is not None
    ahead = StepLogits(step.ahead[:, None]) if looks and step.ahead is not None else None
    run_layer, experts, counts = residency.run_layer, step.experts, step.counts
    for mine, layer, source in _visited(tuple(layer_map)):
        signal = None if ahead is None or source is None else NextLayerLogits(ahead, source)
        run_layer(layer, experts[mine], counts[mine] if counts else (), signal)
    residency.finish()


@cache
def _visited(layer_map: tuple[tuple[int, ...], ...]) -> list[tuple[int, int, int | None]]:
    """Each layer of a step in order, behind the recorded one that stands for it and before the one that foresees."""
    return [
        (mine, layer, foreseen_from(mine, layer == layers[-1], len(layer_map)))
        for mine, layers in enumerate(layer_map)
        for layer in layers
    ]


def foreseen_from(mine: int, last: bool, layers: int) -> int | None:
    """The recorded layer whose input foresees the layer after one that recorded layer `mine` stands for.

    Within a group of layers that one recorded layer stands for, the next is that same layer, foreseen from the one
    before it: so every real layer is foreseen as well as a recorded one, and those of the first group not at all.
    """
    source = mine if last else mine - 1
    return source if 0 <= source < layers - 1 else None


def visits(requests: Iterable[Request], layer_map: StandsFor) -> tuple[Visit, ...]:
    """Every decode visit of a layer in order: the future that a strategy with foresight is told."""
    return tuple(
        (layer, step.experts[mine])
        for request in requests
        for step in request
        if step.kind != "prefill"
        for mine, layers in enumerate(layer_map)
        for layer in layers
    )


def replay(requests: Iterable[Request], residency: FastResidency, layer_map: StandsFor) -> list[Counters]:
    """Charge every request in order on one engine's state; returns what each added to the counters."""
    taken = []
    for request in requests:
        before = residency.ledger.counters.copy()
        for step in request:
            run(step, residency, layer_map)
        residency.end_token()
        taken.append(residency.ledger.counters.since(before))
    return taken


def _pack(rows: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    return [len(row) for row in rows], [value for row in rows for value in row]


def _unpack(lengths: np.ndarray, values: np.ndarray) -> list[tuple[int, ...]]:
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
    told = [(i, step.ahead) for i, step in enumerate(steps) if step.ahead is not None]
    columns["ahead_steps"] = [i for i, _ in told]
    columns["ahead"] = [ahead for _, ahead in told] or np.empty((0, layers - 1, 0))
    trace_file.write(
        path, {n: np.array(columns[n], dtype) for n, (dtype, _) in trace_file.ARRAYS.items()}, layers, about
    )


def load(path: Path) -> tuple[list[Request], dict[str, Any]]:
    """Requests and `about` of a saved trace. Raises Refused for a file that is not a whole and sound trace."""
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
