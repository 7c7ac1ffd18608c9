"""Keys by rank, for eviction rules that are an order: the lowest of those allowed, in O(log n) amortised."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

from mobile.policies import Key, SlotPool


class Ranking:
    """A heap with an entry a change of rank, those that a later change overtook skipped. Ties go to the lower key."""

    def __init__(self) -> None:
        self.rank: dict[Key, Any] = {}
        self._heap: list[tuple[Any, Key]] = []

    def __len__(self) -> int:
        return len(self.rank)

    def __contains__(self, key: Key) -> bool:
        return key in self.rank

    def put(self, key: Key, rank: Any) -> None:
        """Rank `key`, whether it was ranked before or not."""
        self.rank[key] = rank
        heappush(self._heap, (rank, key))
        if len(self._heap) > 64 + 4 * len(self.rank):
            self._heap = [(rank, key) for key, rank in self.rank.items()]
            heapify(self._heap)

    def raised(self, key: Key, rank: Any) -> None:
        """Rank `key`, which was ranked no higher before: its entry is mended when it comes to the top."""
        if key in self.rank:
            self.rank[key] = rank
        else:
            self.put(key, rank)

    def drop(self, key: Key) -> None:
        self.rank.pop(key, None)

    def lowest(self, allowed: Callable[[Key], bool] | None = None) -> Key | None:
        """The allowed key of the lowest rank; it stays ranked. Costs O(log n) for each that is not allowed."""
        heap, ranks = self._heap, self.rank
        passed, found = [], None
        while heap:
            entry = heap[0]
            rank, key = entry
            now = ranks.get(key)
            if now == rank:
                if allowed is None or allowed(key):
                    found = key
                    break
                passed.append(heappop(heap))
            elif now is not None and rank < now:
                heapreplace(heap, (now, key))
            else:
                heappop(heap)
        for entry in passed:
            heappush(heap, entry)
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

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        found = self.first(pool, protected=protected)
        if found is not None:
            self.held.drop(found)
            self.note(incoming)
        return found

    def first(self, pool: SlotPool, *, protected: bool = False) -> Key | None:
        """The one that would give way now."""
        if len(self.held) < len(pool):  # prefill leaves experts in free slots without a word
            self.note(*(key for key in pool if key not in self.held))
        ready, pinned, shielded = pool.ready, pool.pinned, pool.protected

        def may_go(key: Key) -> bool:
            return key in ready and key not in pinned and (key in shielded) is protected

        return self.held.lowest(may_go)
