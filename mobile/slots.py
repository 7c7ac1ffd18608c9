"""The slot pool: which expert sits in which slot, and which of them may be evicted.

Eviction policies read it, the slot allocator changes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set

from mobile.ledger import Key


class SlotPool:
    """A fixed number of expert-sized places, and the keys in them in order of last use.

    Slot numbers run from 0 to `size` - 1. A key in the pool is `ready`, or its copy is queued or in flight. A pinned
    key is in use by the running step and is never evicted; a protected one will likely be needed again before the
    token ends and is evicted only if there is no other choice.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: dict[Key, int] = {}  # by key in the pool, least recently used first; policies only read it
        self.ready: set[Key] = set()
        self.pinned: Set[Key] = frozenset()
        self.protected: set[Key] = set()
        self.unused_prefetches: set[Key] = set()  # prefetched, or on the way, and not used yet
        self.free_taken = 0  # how many free slots were assigned, of which no policy was asked
        self._free = list(range(size - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.slots)

    def __contains__(self, key: Key) -> bool:
        return key in self.slots

    def __iter__(self) -> Iterator[Key]:
        """Iterate over every key in the pool, least recently used first."""
        return iter(self.slots)

    def slot(self, key: Key) -> int:
        """Return the slot number of `key`. Raise KeyError if it is not in the pool."""
        return self.slots[key]

    def touch(self, keys: Iterable[Key]) -> None:
        """Make these keys the most recently used, the last one last."""
        slots = self.slots
        for key in keys:
            slots[key] = slots.pop(key)

    def take_free(self, key: Key) -> int | None:
        """Assign a free slot to `key`, whose copy is on its way, and return its number; None if there is none."""
        if not self._free:
            return None
        self.free_taken += 1
        slot = self.slots[key] = self._free.pop()
        return slot

    def take_free_for(self, keys: Sequence[Key]) -> int:
        """Assign free slots to the first of `keys`, as `take_free` does for one; return how many there were."""
        free, slots = self._free, self.slots
        taken = min(len(keys), len(free))
        self.free_taken += taken
        for number in range(taken):
            slots[keys[number]] = free.pop()
        return taken

    def take_free_slots(self, most: int) -> list[int]:
        """Return the numbers of so many free slots, or of as many as there are; the caller assigns them."""
        if not self._free:
            return []
        taken = self._free[-most:]
        del self._free[-most:]
        self.free_taken += len(taken)
        return taken

    def arrived(self, key: Key) -> None:
        """Mark `key` as ready: its copy has ended."""
        self.ready.add(key)

    def release(self, key: Key) -> int:
        """Empty the slot of `key` and return its number."""
        slot = self._remove(key)
        self._free.append(slot)
        return slot

    def replace(self, victim: Key, incoming: Key) -> int:
        """Assign the slot of `victim` to `incoming`, whose copy is on its way, and return its number."""
        slot = self.slots[incoming] = self._remove(victim)
        return slot

    def _remove(self, key: Key) -> int:
        self.ready.discard(key)
        if self.protected:
            self.protected.discard(key)
        if self.unused_prefetches:
            self.unused_prefetches.discard(key)
        return self.slots.pop(key)

    def evictable(self, *, protected: bool, skip_layers: Collection[int] = ()) -> Iterator[Key]:
        """Iterate over ready, unpinned keys, least recently used first: the protected ones, or only the others.

        Keys of `skip_layers` are left out.
        """
        ready, pinned, shielded = self.ready, self.pinned, self.protected
        for key in self.slots:
            if key[0] not in skip_layers and key in ready and key not in pinned and (key in shielded) is protected:
                yield key

    def is_evictable(self, key: Key, *, protected: bool) -> bool:
        """Return whether `evictable` would name this key."""
        return key in self.ready and key not in self.pinned and (key in self.protected) is protected

    def queued(self) -> list[Key]:
        """Return the keys whose copy has not arrived, oldest request first."""
        return [key for key in self.slots if key not in self.ready]
