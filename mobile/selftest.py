"""Checks at attach: that routers obey a smaller top-k, and that rollback leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mobile import compat, rollback
from mobile.engine import Engine
from mobile.passes import Pass
from mobile.refusal import Refused
from mobile.trace import Kind

Forward = Callable[..., Any]  # the model's own, its experts already served by the engine


@torch.no_grad()
def _run(stock: Forward, engine: Engine, kind: Kind, *ids: int, **extra: Any) -> tuple[Any, Pass]:
    tokens = torch.tensor([ids], device=engine.device)
    running = Pass(kind, torch.ones_like(tokens, dtype=torch.bool))
    with engine.passing(running):
        return stock(input_ids=tokens, **extra), running


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Inside the block the caller's random numbers are not used up, which dropout in training mode would do."""
    place = next(model.parameters()).device
    with torch.random.fork_rng([place] if place.type == "cuda" else [], enabled=model.training):
        yield


def check_confidence(model: Any) -> None:
    """Raise Refused for a model that writes no text: a base model without its head, or one with another head."""
    if not model.can_generate():
        raise Refused(
            f"{type(model).__name__} has no next-token logits to be confident of; use a lossless strategy, or load the "
            "model for text generation."
        )


def check_routers(stock: Forward, engine: Engine) -> None:
    """Run a token with every router told to choose K/2.

    Raises Refused if one does not oblige: halving its choice would need a rule this version does not have.
    """
    with engine.little_k():
        _, running = _run(stock, engine, "little", 0, 1, use_cache=False)
    for layer, (index, _) in zip(engine.layers, running.selections, strict=True):
        if index.shape[-1] != engine.little:
            raise Refused(
                f"{type(layer.router).__name__} always chooses {index.shape[-1]} experts, so no token can run with "
                f"{engine.little}; use a strategy that runs all of them."
            )


def rolls_back(model: Any, stock: Forward, engine: Engine) -> frozenset[type]:
    """The types of the model's own cache and its layers, if a little step can be undone in them; else nothing.

    A little step undone and a big step taken must equal, bit for bit, the big step on an untouched cache.
    """
    cache = compat.cache_of(_run(stock, engine, "prefill", 0, 1, 2, use_cache=True)[0])
    if not getattr(cache, "layers", None):
        return frozenset()
    untouched = copy.deepcopy(cache)
    undo = rollback.before_step(cache)
    with engine.little_k():
        _run(stock, engine, "little", 1, use_cache=True, **compat.going_on(model, cache))
    undo()
    redraw = rollback.random_numbers(engine.device)
    again = _run(stock, engine, "full", 1, use_cache=True, **compat.going_on(model, cache))[0]
    redraw()
    expected = _run(stock, engine, "full", 1, use_cache=True, **compat.going_on(model, untouched))[0]
    return rollback.types_of(cache) if torch.equal(again.logits, expected.logits) else frozenset()
