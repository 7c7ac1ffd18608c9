"""Keys by rank, for evictions by an order: finds the lowest of those allowed, in O(log n) amortised."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

from mobile.policies import Key, SlotPool


class Ranking:
    """A priority queue whose ranks may change: a heap with lazy updates. Of equal ranks the lower key comes first.

    Every change of rank may add an entry to the heap; entries that are out of date are skipped when they come up.
    """

    def __init__(self) -> None:
        self.rank: dict[Key, Any] = {}
        self._heap: list[tuple[Any, Key]] = []

    def __len__(self) -> int:
        return len(self.rank)

    def __contains__(self, key: Key) -> bool:
        return key in self.rank

    def put(self, key: Key, rank: Any) -> None:
        """Set the rank of `key`, which may have had another one."""
        self.rank[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 64 + 4 * len(self.rank):
            # Most entries are out of date: rebuild the heap from the current ranks.
            self._heap = [(rank, key) for key, rank in self.rank.items()]
            heapify(self._heap)

    def increase(self, key: Key, rank: Any) -> None:
        """Set the rank of `key`, which had none or a lower one; its entry is corrected when it comes to the top."""
        if key in self.rank:
            self.rank[key] = rank
        else:
            self.put(key, rank)

    def remove(self, key: Key) -> None:
        """Remove `key` if it is ranked; its entries stay in the heap until they come up."""
        self.rank.pop(key, None)

    def lowest(self, allowed: Callable[[Key], bool] | None = None) -> Key | None:
        """Return the allowed key of the lowest rank, which stays ranked. O(log n) for each not allowed."""
        heap, ranks = self._heap, self.rank
        not_allowed, found = [], None
        while heap:
            entry = heap[0]
            rank, key = entry
            current = ranks.get(key)
            if current == rank:
                if allowed is None or allowed(key):
                    found = key
                    break
                not_allowed.append(heappop(heap))
            elif current is not None and rank < current:  # it was increased: correct its entry
                heapreplace(heap, (current, key))
            else:  # the key was removed, or has a newer entry
                heappop(heap)
        for entry in not_allowed:  # they stay ranked
            heappush(heap, entry)
        return found


class RankedEviction:
    """Eviction of the expert of the lowest rank. `rank(key)` may change only when its key is used."""

    def __init__(self, rank: Callable[[Key], Any]) -> None:
        self._rank_of = rank
        self._free_taken = 0  # of the pool, when all its keys were ranked last
        self.ranking = Ranking()

    def update(self, *keys: Key) -> None:
        """Update the rank of keys that are in the pool or on their way there."""
        for key in keys:
            self.ranking.put(key, self._rank_of(key))

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        """Return the evictable expert of the lowest rank, and rank `incoming` in its place."""
        found = self.next_victim(pool, protected=protected)
        if found is not None:
            self.ranking.remove(found)
            self.update(incoming)
        return found

    def next_victim(self, pool: SlotPool, *, protected: bool = False) -> Key | None:
        """Return the expert that would be evicted now."""
        if pool.free_taken != self._free_taken:  # a prefill or a prefetch has put keys into free slots
            self._free_taken = pool.free_taken
            self.update(*(key for key in pool if key not in self.ranking))
        slots, ready, pinned, shielded = pool.slots, pool.ready, pool.pinned, pool.protected
        gone: list[Key] = []

        def is_evictable(key: Key) -> bool:
            if key in ready:
                return key not in pinned and (key in shielded) is protected
            if key not in slots:  # a cancelled prefetch, or a wrong guess
                gone.append(key)
            return False

        found = self.ranking.lowest(is_evictable)
        for key in gone:
            self.ranking.remove(key)
        return found
