"""The slower memory, where every expert lies in one contiguous row."""

from mobile.store.layout import ExpertLayout, layout_of
from mobile.store.memory import HostStore

__all__ = ["ExpertLayout", "HostStore", "layout_of"]
