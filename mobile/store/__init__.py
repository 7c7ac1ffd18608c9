"""The slower memory, CPU memory or a disk, where every expert lies in one contiguous row."""

from mobile.store.disk import DiskStore
from mobile.store.layout import ExpertLayout, layout_of
from mobile.store.memory import HostStore

Store = HostStore | DiskStore

__all__ = ["DiskStore", "ExpertLayout", "HostStore", "Store", "layout_of"]
