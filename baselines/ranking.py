"""Keys by rank, for eviction rules that are an order: the lowest of those allowed, in O(log n) amortised."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

from mobile.ledger import Key
from mobile.pool import SlotPool


class Ranking:
    """A heap with an entry a change of rank, those that a later change overtook skipped. Ties go to the lower key."""

    def __init__(self) -> None:
        self._rank: dict[Key, Any] = {}
        self._heap: list[tuple[Any, Key]] = []

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, key: Key) -> bool:
        return key in self._rank

    def put(self, key: Key, rank: Any) -> None:
        """Rank `key`, whether it was ranked before or not."""
        self._rank[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 64 + 4 * len(self._rank):
            self._heap = [(rank, key) for key, rank in self._rank.items()]
            heapify(self._heap)

    def drop(self, key: Key) -> None:
        self._rank.pop(key, None)

    def lowest(self, allowed: Callable[[Key], bool] = lambda key: True) -> Key | None:
        """The allowed key of the lowest rank; it stays ranked. Costs O(log n) for each that is not allowed."""
        passed, found = [], None
        while self._heap and found is None:
            entry = self._heap[0]
            rank, key = entry
            if key not in self._rank or self._rank[key] != rank:
                heappop(self._heap)
            elif allowed(key):
                found = key
            else:
                passed.append(heappop(self._heap))
        for entry in passed:
            heappush(self._heap, entry)
        return found


class Ranked:
    """Evict the held expert of the lowest rank. `rank(key)` may change only when its key is used."""

    def __init__(self, rank: Callable[[Key], Any]) -> None:
        self._rank_of = rank
        self.held = Ranking()

    def note(self, *keys: Key) -> None:
        """These are in the pool or on their way there, and their rank may have changed."""
        for key in keys:
            self.held.put(key, self._rank_of(key))

    def victim(self, pool: SlotPool, coming: Key, *, protected: bool) -> Key | None:
        found = self.first(pool, protected=protected)
        if found is not None:
            self.held.drop(found)
            self.note(coming)
        return found

    def first(self, pool: SlotPool, *, protected: bool = False) -> Key | None:
        """The one that would give way now."""
        if len(self.held) < len(pool):  # prefill leaves experts in free slots without a word
            self.note(*(key for key in pool if key not in self.held))
        return self.held.lowest(lambda key: evictable(pool, key, protected=protected))


def evictable(pool: SlotPool, key: Key, *, protected: bool) -> bool:
    """What `SlotPool.evictable` asks of a key."""
    return key in pool.ready and key not in pool.pinned and (key in pool.protected) is protected
