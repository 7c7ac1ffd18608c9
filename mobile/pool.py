"""The slot pool: which expert sits in which slot, what may be evicted, and what must not."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from mobile.ledger import Key


class SlotState(Enum):
    QUEUED = "queued"  # a copy was asked for and has not arrived
    READY = "ready"


class SlotPool:
    """A fixed number of expert-sized places, and the keys in them in order of last use.

    Slot numbers run from 0 to `size` - 1. A pinned key is in use by the running step; a protected one will
    likely be asked for again before the token ends. Neither is evicted while any other choice exists, a pinned
    one never.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pinned: frozenset[Key] | set[Key] = frozenset()
        self.protected: set[Key] = set()
        self.unproven: set[Key] = set()  # prefetched and not used yet
        self._free = list(range(size - 1, -1, -1))
        self._slot: dict[Key, int] = {}  # in order of last use, oldest first
        self._state: dict[Key, SlotState] = {}

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def slot(self, key: Key) -> int:
        return self._slot[key]

    def ready(self, key: Key) -> bool:
        return self._state.get(key) is SlotState.READY

    def touch(self, key: Key) -> None:
        """Make `key` the most recently used."""
        self._slot[key] = self._slot.pop(key)

    def take_free(self, key: Key) -> int | None:
        """A free slot for `key`, whose copy is on its way; None if there is none."""
        if not self._free:
            return None
        slot = self._slot[key] = self._free.pop()
        self._state[key] = SlotState.QUEUED
        return slot

    def arrived(self, key: Key) -> None:
        self._state[key] = SlotState.READY

    def release(self, key: Key) -> int:
        """Empty the slot of `key` and return its number."""
        slot = self._slot.pop(key)
        del self._state[key]
        self.protected.discard(key)
        self.unproven.discard(key)
        self._free.append(slot)
        return slot

    def evictable(self, *, protected: bool) -> Iterator[Key]:
        """Ready, unpinned keys, least recently used first; those protected, or those not."""
        for key in self._slot:
            if key not in self.pinned and (key in self.protected) is protected and self.ready(key):
                yield key

    def queued(self) -> list[Key]:
        """Keys whose copy has not arrived, oldest request first."""
        return [key for key, state in self._state.items() if state is SlotState.QUEUED]
