"""Checks at attach: that routers obey a smaller top-k, and that rollback leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from mobile import rollback
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


def rolls_back(stock: Forward, engine: Engine) -> frozenset[type]:
    """The types of the model's own cache and its layers, if a little step can be undone in them; else nothing.

    A little step undone and a big step taken must equal, bit for bit, the big step on an untouched cache.
    """
    cache = _run(stock, engine, "prefill", 0, 1, 2, use_cache=True)[0].past_key_values
    if not getattr(cache, "layers", None):
        return frozenset()
    untouched = copy.deepcopy(cache)
    undo = rollback.before_step(cache)
    with engine.little_k():
        _run(stock, engine, "little", 1, past_key_values=cache, use_cache=True)
    undo()
    again = _run(stock, engine, "full", 1, past_key_values=cache, use_cache=True)[0]
    expected = _run(stock, engine, "full", 1, past_key_values=untouched, use_cache=True)[0]
    return rollback.types_of(cache) if torch.equal(again.logits, expected.logits) else frozenset()
