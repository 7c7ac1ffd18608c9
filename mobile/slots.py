"""The slot pool: which expert sits in which slot, what may be evicted, and what must not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set

from mobile.ledger import Key


class SlotPool:
    """A fixed number of expert-sized places, and the keys in them in order of last use.

    Slot numbers run from 0 to `size` - 1. A key in the pool is `ready`, or its copy is queued or in flight. A pinned
    key is in use by the running step and is never evicted; a protected one will likely be asked for again before the
    token ends and is evicted only if there is no other choice.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: dict[Key, int] = {}  # by key in the pool, least recently used first; others only read it
        self.ready: set[Key] = set()
        self.pinned: Set[Key] = frozenset()
        self.protected: set[Key] = set()
        self.unproven: set[Key] = set()  # prefetched and not used yet
        self._free = list(range(size - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.slots)

    def __contains__(self, key: Key) -> bool:
        return key in self.slots

    def __iter__(self) -> Iterator[Key]:
        """Every key in the pool, least recently used first."""
        return iter(self.slots)

    def slot(self, key: Key) -> int:
        return self.slots[key]

    def touch(self, keys: Iterable[Key]) -> None:
        """Make these keys the most recently used, the last one last."""
        slots = self.slots
        for key in keys:
            slots[key] = slots.pop(key)

    def take_free(self, key: Key) -> int | None:
        """A free slot for `key`, whose copy is on its way; None if there is none."""
        if not self._free:
            return None
        slot = self.slots[key] = self._free.pop()
        return slot

    def take_free_for(self, keys: Sequence[Key]) -> int:
        """`take_free` for one key after another, as long as there are free slots; for how many there were."""
        free, slots = self._free, self.slots
        taken = min(len(keys), len(free))
        for number in range(taken):
            slots[keys[number]] = free.pop()
        return taken

    def arrived(self, key: Key) -> None:
        self.ready.add(key)

    def release(self, key: Key) -> int:
        """Empty the slot of `key` and return its number."""
        slot = self._forget(key)
        self._free.append(slot)
        return slot

    def replace(self, victim: Key, coming: Key) -> int:
        """Give the slot of `victim` to `coming`, whose copy is on its way."""
        slot = self.slots[coming] = self._forget(victim)
        return slot

    def _forget(self, key: Key) -> int:
        self.ready.discard(key)
        if self.protected:
            self.protected.discard(key)
        if self.unproven:
            self.unproven.discard(key)
        return self.slots.pop(key)

    def evictable(self, *, protected: bool, spared: Collection[int] = ()) -> Iterator[Key]:
        """Ready, unpinned keys, least recently used first: protected ones, or the others; none of `spared` layers."""
        ready, pinned, shielded = self.ready, self.pinned, self.protected
        for key in self.slots:
            if key[0] not in spared and key in ready and key not in pinned and (key in shielded) is protected:
                yield key

    def may_go(self, key: Key, *, protected: bool) -> bool:
        """Whether `evictable` would name this key."""
        return key in self.ready and key not in self.pinned and (key in self.protected) is protected

    def queued(self) -> list[Key]:
        """Keys whose copy has not arrived, oldest request first."""
        return [key for key in self.slots if key not in self.ready]
