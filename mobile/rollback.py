"""Rollback: undo one decode step in a cache, per cache-layer type, and a test that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Undo = Callable[[], None]


def _dynamic(layer: DynamicLayer) -> Undo:
    return lambda: layer.crop(-1)


def _sliding(layer: DynamicSlidingWindowLayer) -> Undo:
    """Its update replaces the tensors and never writes into them, and its own crop fails past the window."""
    keys, values, length = layer.keys, layer.values, layer.cumulative_length

    def undo() -> None:
        layer.keys, layer.values, layer.cumulative_length = keys, values, length

    return undo


# By exact type: a subclass may keep state that these do not know of.
UNDO: dict[type, Callable[[Any], Undo]] = {DynamicLayer: _dynamic, DynamicSlidingWindowLayer: _sliding}


def supported(cache: Any) -> bool:
    """Whether every layer of the cache can be rolled back."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(type(layer) in UNDO for layer in layers)


def before_step(cache: Any) -> Undo:
    """Call before a one-token step; the result, called after it, restores the cache. Needs `supported(cache)`."""
    undos = [UNDO[type(layer)](layer) for layer in cache.layers]

    def undo() -> None:
        for one in undos:
            one()

    return undo
