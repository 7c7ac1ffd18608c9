"""Rollback: undo one decode step in a cache.

A step's update replaces a cache's tensors, with few exceptions: keys and values that only grow are cropped, which holds
no second copy of them, and states that are written in place are cloned, as is every tensor that is a single number: a
static cache counts in those. Everything else is put back by reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer, StaticSlidingWindowLayer

Undo = Callable[[], None]
IN_PLACE = frozenset({"conv_states", "recurrent_states"})
WINDOW = IN_PLACE | {"keys", "values"}  # a static sliding window is rolled in place


def supported(cache: Any, proven: frozenset[type] = frozenset()) -> bool:
    """Return whether the cache and all its layers are Transformers' own, or of types `proven` by the self-test.

    By exact type: a subclass may keep state that this does not know of.
    """
    layers = getattr(cache, "layers", None)
    if not layers:
        return False
    own = {type(layer) for layer in layers} - proven
    own_layers = all(kind is getattr(cache_utils, kind.__name__, None) and "Quant" not in kind.__name__ for kind in own)
    return own_layers and type(cache) in {DynamicCache, StaticCache, *proven}


def types_of(cache: Any) -> frozenset[type]:
    """Return the types of the cache and its layers, which a self-test on it is valid for."""
    return frozenset({type(cache), *(type(layer) for layer in getattr(cache, "layers", ()))})


def before_step(cache: Any) -> Undo:
    """Save what a one-token step changes in the cache; the result, called after the step, restores it."""
    undos = [_put_back(cache, IN_PLACE, leave=frozenset({"layers"})), *(_before_step(layer) for layer in cache.layers)]

    def undo() -> None:
        for one in undos:
            one()

    return undo


def random_numbers(device: torch.device) -> Undo:
    """Save the random state before a step that draws numbers (dropout, in training); the result has them redrawn."""
    host = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def undo() -> None:
        torch.set_rng_state(host)
        if own is not None:
            torch.cuda.set_rng_state(own, device)

    return undo


def _before_step(layer: Any) -> Undo:
    """Save what a step changes in one layer of a cache, as cheaply as its class allows."""
    if type(layer) is DynamicLayer and layer.is_initialized:
        return lambda: layer.crop(-1)
    if isinstance(layer, StaticSlidingWindowLayer):
        return _put_back(layer, WINDOW)
    if isinstance(layer, StaticLayer):  # its stale tail is overwritten by the next step
        return _put_back(layer, IN_PLACE, leave=frozenset({"keys", "values"}))
    return _put_back(layer, IN_PLACE)


def _put_back(holder: Any, in_place: frozenset[str], leave: frozenset[str] = frozenset()) -> Undo:
    """Save the holder's attributes but those to `leave`; tensors named in `in_place` are cloned."""
    before = {name: _saved(value, name in in_place) for name, value in vars(holder).items() if name not in leave}

    def undo() -> None:
        for name, saved in before.items():
            setattr(holder, name, saved())

    return undo


def _saved(value: Any, in_place: bool) -> Callable[[], Any]:
    """Return a function that gives the value as it is now; containers are rebuilt from their saved items."""
    if isinstance(value, dict):
        parts = {key: _saved(item, in_place) for key, item in value.items()}
        return lambda: {key: part() for key, part in parts.items()}
    if isinstance(value, list):
        items = [_saved(item, in_place) for item in value]
        return lambda: [item() for item in items]
    if isinstance(value, torch.Tensor) and (in_place or value.ndim == 0):
        kept = value.clone()
        return lambda: value.copy_(kept)
    return lambda: value
