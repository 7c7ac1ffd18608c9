"""Perfect lookahead over a link of finite bandwidth (after Cao, Felten, Karlin and Li, SIGMETRICS 1995).

Their rules of integrated prefetching and caching: fetch the next missing expert in order of use, evict the one whose
next use is farthest, never evict one that is needed before what it makes room for ("do no harm"), and start as soon as
that allows. A limit and not a system: it knows every routing decision to come, so only a recorded trace can be
replayed under it. Lossless. Changed: it waits if a better expert to evict comes free before a copy begun now would end,
as Delay(d) does (Albers and Büttner, 2005), d being the whole layers that compute in one copy's time: starting at once
costs extra copies and stalled longer than `belady` in small pools, as did d = 1 where a copy takes three layers.
Proven of such rules is a bound (at most 1 + F/k times the best elapsed time, F a copy in references, k the
slots) and not an optimum, so that this strategy never waits longer for the link than others is a tested property and
not a theorem. It says nothing of `cpu-hybrid`, which computes where others wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.belady import BELADY, Farthest
from baselines.signals.ranking import Ranking
from mobile.policies import Key, PolicyContext, SlotPool


class Aggressive(Farthest):
    """An idle prefetcher of the next missing expert, for which one that is needed later is evicted."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._slots = context.slots
        self._delay = context.load_ns // context.layer_ns  # visits
        self._missing = Ranking()  # by next use; of those in the pool, some are still in here
        for key, use in self.future.next_use.items():
            self._missing.put(key, use)

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Advance to the next visit; these keys are in the pool. The visit's other experts ran on the CPU."""
        ran = self.future.experts(self.future.visit)
        super().used(layer, keys)
        for key in ran:
            self._missing.remove(key)
        for key in set(ran).difference(keys) if len(keys) < len(ran) else ():
            if (use := self._next_use(key)) < self.future.never:
                self._missing.put(key, use)

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        """Return the expert whose next use is farthest away, which is then missing."""
        evicted = super().victim(pool, incoming, protected=protected)
        if evicted is not None and (use := self._next_use(evicted)) < self.future.never:
            self._missing.put(evicted, use)
        return evicted

    def _next_use(self, key: Key) -> int:
        """Return the next visit that uses `key`, or `never`."""
        return self.future.next_use.get(key, self.future.never)

    def idle(self, pool: SlotPool) -> Key | None:
        """Return the missing expert that is used next, if a slot is free or worth emptying for it."""
        while (key := self._missing.lowest()) is not None and key in pool:
            self._missing.remove(key)
        if key is None or (len(pool) == self._slots and not self._worth_a_slot(key, pool)):
            return None
        self.update(key)
        return key

    def _worth_a_slot(self, key: Key, pool: SlotPool) -> bool:
        """Return whether one in the pool is needed later than `key`, and none that the delay frees is needed later."""
        farthest = self.next_victim(pool)
        if farthest is None:
            return False
        future, gap, wanted = self.future, self._next_use(farthest), self._next_use(key)
        if gap <= wanted:
            return False
        until = min(future.visit + self._delay, wanted)
        soon = (other for visit in range(future.visit, until) for other in future.experts(visit))
        return all(future.next_use_from(until, other) <= gap for other in soon if other in pool)


ORACLE_PREFETCH = replace(
    BELADY,
    name="oracle-prefetch",
    summary="load the next missing expert whenever the link is free; needs the future",
    source="after Cao et al., SIGMETRICS 1995",
    evict=Aggressive,
)
