"""MIN: evict the expert whose next use is farthest away (Belady, IBM Systems Journal 5(2), 1966).

A limit and not a system: it knows every routing decision to come, so only a recorded trace can be replayed under it.
Lossless. Changed: one pool for all layers; the experts of the running step are never evicted. It loads on demand only,
and no cache that loads on demand only has fewer misses; one that loads ahead may wait less (`oracle-prefetch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.lru import LRU
from baselines.signals.ranking import RankedEviction
from mobile.policies import Key, PolicyContext


class Future:
    """The next use of each expert, counted in visits; `never` where there is none."""

    def __init__(self, context: PolicyContext) -> None:
        assert context.future is not None, "a strategy that needs the future is given it"
        self._visits = context.future
        self.never = len(context.future)
        self.visit = 0  # the one that runs, or comes next
        self.next_use: dict[Key, int] = {}  # of every expert that will be used; of others nothing, or `never`
        self._after: list[list[int]] = []  # by visit, the next use of each of its experts after it
        for visit in range(self.never - 1, -1, -1):
            keys = self.experts(visit)
            self._after.append([self.next_use.get(key, self.never) for key in keys])
            self.next_use.update(dict.fromkeys(keys, visit))
        self._after.reverse()

    def next_use_from(self, visit: int, key: Key) -> int:
        """Return the first use of `key` in `visit` or later, looking at each of its uses from the running visit on."""
        use = self.next_use.get(key, self.never)
        while use < visit:
            use = self._after[use][self._visits[use][1].index(key[1])]
        return use

    def experts(self, visit: int) -> Sequence[Key]:
        """Return the keys of the experts that `visit` runs."""
        layer, experts = self._visits[visit]
        return [(layer, expert) for expert in experts]

    def advance(self, keys: Sequence[Key]) -> list[int]:
        """Advance by the visit that used these keys; return when each is used next."""
        visit, next_use = self.visit, self.next_use
        for key in keys:
            use = next_use.get(key, self.never)
            assert use == visit, f"expert {key} ran in visit {visit} and was foreseen for {use}"
        after = self._after[visit]
        if len(keys) < len(after):  # the others ran on the CPU
            next_uses = dict(zip(self.experts(visit), after, strict=True))
            next_use.update(next_uses)
            after = [next_uses[key] for key in keys]
        else:
            next_use.update(zip(keys, after, strict=True))
        self.visit = visit + 1
        return after


class Farthest(RankedEviction):
    """Eviction of the expert that is not needed for the longest time."""

    def __init__(self, context: PolicyContext) -> None:
        self.future = Future(context)
        uses, never = self.future.next_use, self.future.never
        super().__init__(lambda key: -uses.get(key, never))

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Advance to the next visit, ranking these keys by their next use."""
        put = self.ranking.put
        for key, use in zip(keys, self.future.advance(keys), strict=True):
            put(key, -use)


BELADY = replace(
    LRU,
    name="belady",
    summary="evict the expert whose next use is farthest away; needs the future",
    source="Belady, IBM Systems Journal 5(2), 1966",
    evict=Farthest,
    needs_future=True,
)
