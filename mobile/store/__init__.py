"""The slower memory, CPU memory or a disk, where every expert lies in one contiguous row."""

from mobile.store.disk import DiskStore
from mobile.store.formats import format_named
from mobile.store.layout import ExpertLayout, layout_of, poison
from mobile.store.memory import HostStore
from mobile.store.packed import PackedWeights, Weights, plain, unpacked
from mobile.store.repack import repack

Store = HostStore | DiskStore

__all__ = [
    "DiskStore",
    "ExpertLayout",
    "HostStore",
    "PackedWeights",
    "Store",
    "Weights",
    "format_named",
    "layout_of",
    "plain",
    "poison",
    "repack",
    "unpacked",
]
