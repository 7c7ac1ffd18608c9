"""Checks at attach: a token runs each layer once, routers obey a smaller top-k, rollback leaves no trace.

No family is trusted by its name: whatever a strategy needs of a model is tried on it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from mobile.errors import Refused, one_line
from mobile.live_model import compat
from mobile.live_model.overrides import Overrides
from mobile.policies.strategy import BigLittle
from mobile.replay.trace import Kind
from mobile.runtime import cached_routing, rollback
from mobile.runtime.confidence import replay_routers
from mobile.runtime.engine import Engine
from mobile.runtime.experts import bind
from mobile.runtime.forward_pass import ForwardPass

PROBED = 32  # tokens on which routers are asked how they weigh
Forward = Callable[..., Any]  # the model's own, its experts already served by the engine


@torch.no_grad()
def _run(stock: Forward, engine: Engine, kind: Kind, *ids: int, **extra: Any) -> tuple[Any, ForwardPass]:
    """Run these tokens as one pass; return the model's output and the pass."""
    tokens = torch.tensor([ids], device=engine.device)
    running = ForwardPass(kind, torch.ones_like(tokens, dtype=torch.bool))
    with engine.passing(running):
        return stock(input_ids=tokens, **extra), running


@contextmanager
def on_ids_alone() -> Iterator[None]:
    """Raise Refused in place of what the model's own code raises when it is given token ids and nothing else."""
    try:
        yield
    except Refused:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Refused(
            f"The model does not run on token ids alone ({one_line(error)}); use a strategy that tries nothing when "
            "it is attached, such as lru."
        ) from error


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Use up none of the caller's random numbers inside the block, as dropout in training mode would."""
    place = next(model.parameters()).device
    with torch.random.fork_rng([place] if place.type == "cuda" else [], enabled=model.training):
        yield


class _Visits:
    """A stand-in for the engine that computes nothing, and notes which layers are run, in order."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def run_experts(self, layer: int, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.order.append(layer)
        return torch.zeros_like(hidden)


@torch.no_grad()
def check_order(model: Any, layers: Sequence[compat.MoeLayer], overrides: Overrides) -> None:
    """Raise Refused unless text runs every MoE layer once, in order, as the engine expects of a pass.

    Two tokens run past experts that compute nothing. A forward that needs more than token ids is let through.
    """
    visits, before = _Visits(), len(overrides)
    for number, layer in enumerate(layers):
        bind(layer.experts, visits, number, overrides)
    try:
        with undisturbed(model):
            model.forward(input_ids=torch.tensor([[0, 1]], device=compat.device_of(layers)))
    except Exception:  # the model's own code may raise anything when it is given ids alone
        return
    finally:
        overrides.undo(before)
    kind = type(model).__name__
    for number, layer in enumerate(layers):
        times = visits.order.count(number)
        if times > 1:
            raise Refused(
                f"{kind} runs {layer.name} {times} times for a token, and only layers that run once are offloaded; "
                "use it as it is."
            )
        if not times:
            raise Refused(
                f"{kind} does not run {layer.name} for text, and only layers that every token runs are offloaded; "
                "use it as it is, or its text model alone."
            )
    if visits.order != sorted(visits.order):
        raise Refused(f"{kind} runs its MoE layers in another order than it lists them; use it as it is.")


def check_confidence(model: Any) -> None:
    """Raise Refused for a model that writes no text: a base model without its head, or one with another head."""
    if not model.can_generate():
        raise Refused(
            f"{type(model).__name__} has no next-token logits to be confident of; use a lossless strategy, or load the "
            "model for text generation."
        )


def check_routers(stock: Forward, engine: Engine) -> None:
    """Run a token with every router set to choose K/2 experts.

    Raise Refused if one chooses another number: halving its choice would need a rule this version does not have.
    """
    with engine.little_k():
        _, running = _run(stock, engine, "little", 0, 1, use_cache=False)
    little_k = engine.plan.native.little_k
    for layer, (index, _) in zip(engine.layers, running.selections, strict=True):
        if index.shape[-1] != little_k:
            raise Refused(
                f"{type(layer.router).__name__} always chooses {index.shape[-1]} experts, so no token can run with "
                f"{little_k}; use a strategy that runs all of them."
            )


@torch.no_grad()
def learn_routers(model: Any, stock: Forward, engine: Engine) -> Sequence[cached_routing.RouterFacts]:
    """Run tokens under the routers' own choices, and find out how they weigh others.

    Raise Refused for a router of which that cannot be said.
    """
    gating, kind = engine.strategy.cached_routing, cached_routing.kind_of(engine.strategy)
    assert gating is not None, "asked of strategies that choose by what is in slots"
    ids = [token % model.get_input_embeddings().weight.shape[0] for token in range(PROBED)]
    with engine.little_k() if kind == "little" else nullcontext():
        _, running = _run(stock, engine, kind, *ids, use_cache=False)
        return cached_routing.learn(gating, engine.layers, running, engine.plan.native.top_k)


def check_signal(stock: Forward, engine: Engine, gating: BigLittle) -> None:
    """Raise Refused if the gating's signal needs router weights, and a router gives none with its choice."""
    if gating.replays_routers:
        with engine.little_k():
            _, running = _run(stock, engine, "little", 0, use_cache=False)
        replay_routers(engine.layers, running)


def rolls_back(model: Any, stock: Forward, engine: Engine) -> frozenset[type]:
    """Return the types of the model's own cache and its layers if a little step can be undone in them, else none.

    It can if a big step after one that was undone equals, bit for bit, the big step on an untouched cache.
    """
    prompt = (0, 1, 2)
    more: dict[str, Any] = {"use_cache": True, "return_dict": True}  # whatever the configuration says
    cache = compat.cache_of(_run(stock, engine, "prefill", *prompt, **more)[0])
    if not getattr(cache, "layers", None):
        return frozenset()
    untouched = copy.deepcopy(cache)
    if "position_ids" in inspect.signature(type(model).forward).parameters:  # else some go by what they wrote last
        more["position_ids"] = torch.tensor([[len(prompt)]], device=engine.device)
    undo = rollback.before_step(cache)
    with engine.little_k():
        _run(stock, engine, "little", 1, **compat.going_on(model, cache), **more)
    undo()
    redraw = rollback.random_numbers(engine.device)
    again = _run(stock, engine, "full", 1, **compat.going_on(model, cache), **more)[0]
    redraw()
    expected = _run(stock, engine, "full", 1, **compat.going_on(model, untouched), **more)[0]
    return rollback.types_of(cache) if torch.equal(again.logits, expected.logits) else frozenset()
