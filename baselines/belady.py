"""MIN: drop the expert whose next use is farthest away (Belady, IBM Systems Journal 5(2), 1966).

A limit and not a system: it knows every routing decision to come, so only a recorded trace can be replayed under it.
Lossless. Changed: one pool for all layers; the experts of the running step are never dropped. It loads on demand only,
and no cache that loads on demand only has fewer misses; one that loads ahead may wait less (`oracle-prefetch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.lru import LRU
from baselines.ranking import Ranked
from mobile.ledger import Key
from mobile.policy import Setting


class Future:
    """When each expert is used next, counted in visits; `never` where it is not."""

    def __init__(self, setting: Setting) -> None:
        assert setting.future is not None, "a strategy with foresight is told the future"
        self._visits = setting.future
        self.never = len(setting.future)
        self.visit = 0  # the one that runs, or comes next
        self._uses: dict[Key, list[int]] = {}  # the last one first
        for visit in range(self.never - 1, -1, -1):
            layer, experts = setting.future[visit]
            for expert in experts:
                self._uses.setdefault((layer, expert), []).append(visit)

    def next_use(self, key: Key) -> int:
        uses = self._uses.get(key)
        return uses[-1] if uses else self.never

    def next_use_from(self, visit: int, key: Key) -> int:
        """Its first use in `visit` or later; looks at each of its uses before that."""
        return next((use for use in reversed(self._uses.get(key, ())) if use >= visit), self.never)

    def experts(self, visit: int) -> Sequence[Key]:
        """What that visit runs."""
        layer, experts = self._visits[visit]
        return [(layer, expert) for expert in experts]

    def needed(self) -> Sequence[Key]:
        """Every expert that will be used."""
        return [key for key, uses in self._uses.items() if uses]

    def passed(self, keys: Sequence[Key]) -> None:
        """The visit that used these has run."""
        for key in keys:
            use = self.next_use(key)
            assert use == self.visit, f"expert {key} ran in visit {self.visit} and was foreseen for {use}"
            self._uses[key].pop()
        self.visit += 1


class Farthest(Ranked):
    """Evict the expert that is not needed for the longest time."""

    def __init__(self, setting: Setting) -> None:
        self.future = Future(setting)
        super().__init__(lambda key: -self.future.next_use(key))

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        self.future.passed(keys)
        self.note(*keys)


BELADY = replace(
    LRU,
    name="belady",
    summary="evict the expert whose next use is farthest away; needs the future",
    source="Belady, IBM Systems Journal 5(2), 1966",
    evict=Farthest,
    foresight=True,
)
