"""Packed rows of a model whose experts lie in another store as they are, which keeps them."""

from __future__ import annotations

from mobile.store.disk import DiskStore
from mobile.store.memory import HostStore
from mobile.store.packed import unpacked


def repack(originals: HostStore | DiskStore, packed: HostStore | DiskStore, layers: int) -> None:
    """Fill the rows of `packed` from those of `originals`, a layer at a time. Raise Refused if a disk is full."""
    for layer in range(layers):
        for name, weights in originals.views(layer).items():
            packed.weights(layer, name).copy_(unpacked(weights))
        packed.complete(layer)
    packed.finish()
