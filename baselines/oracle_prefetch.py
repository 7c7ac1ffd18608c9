"""Perfect lookahead over a link of finite bandwidth (after Cao, Felten, Karlin and Li, SIGMETRICS 1995).

Their rules of integrated prefetching and caching: fetch the next missing expert in order of use, drop the one whose
next use is farthest, never drop one that is needed before what it makes room for ("do no harm"), and start as soon as
that allows. A limit and not a system: it knows every routing decision to come, so only a recorded trace can be
replayed under it. Lossless. Changed: where a copy takes longer than a layer computes, it waits for the running layer
if one of its experts is the better one to drop, as Delay(d) does (Albers and Büttner, 2005) with d one layer: starting
at once costs extra copies there, and did stall longer than `belady` in small pools. What that paper proves is a bound
and not an optimum (at most 1 + F/k times the best elapsed time, F a fetch in references, k the slots), so that
this strategy never stalls longer than another is a tested property, not a theorem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.belady import BELADY, Farthest
from baselines.ranking import Ranking
from mobile.ledger import Key
from mobile.policy import Setting
from mobile.pool import SlotPool


class Aggressive(Farthest):
    """Load the next missing expert whenever the link is idle and one that is needed later can give way to it."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._slots = setting.slots
        self._waits = setting.load_ns > setting.layer_ns
        self._missing = Ranking()  # by next use; of those in the pool, some are still in here
        for key in self.future.needed():
            self._missing.put(key, self.future.next_use(key))

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        for key in keys:
            self._missing.drop(key)
        super().used(layer, keys)

    def victim(self, pool: SlotPool, coming: Key, *, protected: bool) -> Key | None:
        gone = super().victim(pool, coming, protected=protected)
        if gone is not None and self.future.next_use(gone) < self.future.never:
            self._missing.put(gone, self.future.next_use(gone))
        return gone

    def idle(self, pool: SlotPool) -> Key | None:
        while (key := self._missing.lowest()) is not None and key in pool:
            self._missing.drop(key)
        if key is None or (len(pool) == self._slots and not self._worth_a_slot(key, pool)):
            return None
        self.note(key)
        return key

    def _worth_a_slot(self, key: Key, pool: SlotPool) -> bool:
        """Whether one in the pool is needed later than `key`, and none in the running layer later still."""
        farthest = self.first(pool)
        if farthest is None:
            return False
        future, gap = self.future, self.future.next_use(farthest)
        if gap <= future.next_use(key):
            return False
        if not self._waits or future.next_use(key) == future.visit:
            return True
        return all(future.use_after_next(other) <= gap for other in future.running() if other in pool)


ORACLE_PREFETCH = replace(
    BELADY,
    name="oracle-prefetch",
    summary="load the next missing expert whenever the link is free; needs the future",
    source="after Cao et al., SIGMETRICS 1995",
    evict=Aggressive,
)
