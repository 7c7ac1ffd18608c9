"""The slot pool: which expert sits in which slot, what may be evicted, and what must not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from mobile.ledger import Key


class SlotPool:
    """A fixed number of expert-sized places, and the keys in them in order of last use.

    Slot numbers run from 0 to `size` - 1. A key in the pool is `ready`, or its copy is queued or in flight. A pinned
    key is in use by the running step and is never evicted; a protected one will likely be asked for again before the
    token ends and is evicted only if there is no other choice.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ready: set[Key] = set()
        self.pinned: Set[Key] = frozenset()
        self.protected: set[Key] = set()
        self.unproven: set[Key] = set()  # prefetched and not used yet
        self._free = list(range(size - 1, -1, -1))
        self._slot: dict[Key, int] = {}  # in order of last use, oldest first

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot

    def __iter__(self) -> Iterator[Key]:
        """Every key in the pool, least recently used first."""
        return iter(self._slot)

    def slot(self, key: Key) -> int:
        return self._slot[key]

    def touch(self, keys: Iterable[Key]) -> None:
        """Make these keys the most recently used, the last one last."""
        slots = self._slot
        for key in keys:
            slots[key] = slots.pop(key)

    def take_free(self, key: Key) -> int | None:
        """A free slot for `key`, whose copy is on its way; None if there is none."""
        if not self._free:
            return None
        slot = self._slot[key] = self._free.pop()
        return slot

    def arrived(self, key: Key) -> None:
        self.ready.add(key)

    def release(self, key: Key) -> int:
        """Empty the slot of `key` and return its number."""
        slot = self._forget(key)
        self._free.append(slot)
        return slot

    def replace(self, victim: Key, coming: Key) -> int:
        """Give the slot of `victim` to `coming`, whose copy is on its way."""
        slot = self._slot[coming] = self._forget(victim)
        return slot

    def _forget(self, key: Key) -> int:
        self.ready.discard(key)
        if self.protected:
            self.protected.discard(key)
        if self.unproven:
            self.unproven.discard(key)
        return self._slot.pop(key)

    def evictable(self, *, protected: bool) -> Iterator[Key]:
        """Ready, unpinned keys, least recently used first; those protected, or those not."""
        ready, pinned, shielded = self.ready, self.pinned, self.protected
        for key in self._slot:
            if key in ready and key not in pinned and (key in shielded) is protected:
                yield key

    def queued(self) -> list[Key]:
        """Keys whose copy has not arrived, oldest request first."""
        return [key for key in self._slot if key not in self.ready]
