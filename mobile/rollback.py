"""Rollback: undo one decode step in a cache, per cache-layer type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer

Undo = Callable[[], None]


def _crop(layer: DynamicLayer) -> Undo:
    """Keys and values only grow at their end."""
    return lambda: layer.crop(-1)


def _references(layer: Any) -> Undo:
    """A dynamic sliding window's update replaces its tensors and never writes into them; its crop fails when full."""
    before = dict(vars(layer))
    return lambda: vars(layer).update(before)


def _lengths(layer: Any) -> Undo:
    """A static layer's stale tail is overwritten by the next step; only its length must go back."""
    length = layer.cumulative_length.clone()
    return lambda: layer.cumulative_length.copy_(length)


def _contents(layer: Any, skip: tuple[str, ...] = ()) -> Undo:
    """Any layer: its tensors are cloned, and the same tensors get their contents back."""
    before = {name: _saved(value) for name, value in vars(layer).items() if name not in skip}

    def undo() -> None:
        for name, value in before.items():
            setattr(layer, name, _restored(value))

    return undo


def _saved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value, value.clone()
    if isinstance(value, dict):
        return {key: _saved(one) for key, one in value.items()}
    return list(value) if isinstance(value, list) else value


def _restored(saved: Any) -> Any:
    if isinstance(saved, tuple) and len(saved) == 2 and isinstance(saved[0], torch.Tensor):
        return saved[0].copy_(saved[1]) if saved[0].numel() else saved[0]
    if isinstance(saved, dict):
        return {key: _restored(one) for key, one in saved.items()}
    return list(saved) if isinstance(saved, list) else saved


def _crop_and_state(layer: Any) -> Undo:
    """Attention beside a recurrence: the first is cropped, the state of the second is small and cloned."""
    state = _contents(layer, skip=("keys", "values"))

    def undo() -> None:
        DynamicLayer.crop(layer, -1)
        state()

    return undo


# By exact type: a subclass may keep state that these do not know of.
UNDO: dict[str, Callable[[Any], Undo]] = {
    "DynamicLayer": _crop,
    "DynamicIndexedLayer": _crop,
    "DynamicSlidingWindowLayer": _references,
    "StaticLayer": _lengths,
    "StaticSlidingWindowLayer": _contents,
    "StaticIndexedLayer": _contents,
    "LinearAttentionLayer": _contents,
    "LinearAttentionAndFullAttentionLayer": _crop_and_state,
    "LinearAttentionAndSlidingWindowAttentionLayer": _contents,
    "LinearAttentionAndStaticFullAttentionLayer": _contents,
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": _contents,
}


def _known(layer: Any) -> bool:
    name = type(layer).__name__
    return name in UNDO and type(layer) is getattr(cache_utils, name, None)


def supported(cache: Any) -> bool:
    """Whether every layer of the cache can be rolled back."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(_known(layer) for layer in layers)


def before_step(cache: Any) -> Undo:
    """Call before a one-token step; the result, called after it, restores the cache. Needs `supported(cache)`."""
    undos = [UNDO[type(layer).__name__](layer) for layer in cache.layers]

    def undo() -> None:
        for one in undos:
            one()

    return undo
