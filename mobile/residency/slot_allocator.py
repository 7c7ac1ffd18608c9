"""Making room: how an expert that is asked for, or foreseen, comes to a slot. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mobile.ledger import Key, Ledger
from mobile.links.base import Link
from mobile.policies.protocols import BatchEviction, Eviction
from mobile.policies.strategy import Strategy
from mobile.slots import SlotPool


class SlotAllocator:
    """The pool's slots, given out under an eviction rule. `emptied(slot)` is told of every slot that lost its expert.

    Where a strategy has staging slots, experts in use take no more than the others, and a copy never takes a slot from
    another directly: which slots are free decides who may wait.
    """

    def __init__(
        self,
        strategy: Strategy,
        pool: SlotPool,
        link: Link,
        ledger: Ledger,
        evict: Eviction,
        emptied: Callable[[int], None] | None,
    ) -> None:
        self.pool, self.link, self.ledger, self.evict = pool, link, ledger, evict
        self.emptied = emptied
        self._staging = strategy.guess_slots
        self._for_proven = pool.size - strategy.guess_slots  # slots that experts in use may take
        self._several = evict if isinstance(evict, BatchEviction) else None

    # --- for what is asked for ----------------------------------------------------------------------

    def demand(self, keys: Sequence[Key]) -> None:
        """Ask for experts that are not in the pool, each with a slot found when its turn comes."""
        at_once, submit, slots = self.give(keys), self.link.submit, self.pool.slots
        for key in keys[:at_once]:
            submit(key, slots[key], demand=True)
        for key in keys[at_once:]:
            submit(key, self.slot_for(key), demand=True)

    def give(self, keys: Sequence[Key]) -> int:
        """Give slots to the first of `keys`, as far as that needs no thought about each; to how many."""
        if self._staging:
            return 0 if self._several is None else self._give_beside_staging(keys, self._several)
        return self._give_at_once(keys)

    def _give_at_once(self, keys: Sequence[Key]) -> int:
        """Give slots to the first of these: free ones, then evicted ones if the rule names several at a time."""
        given = self.pool.take_free_for(keys)
        if given < len(keys) and self._several is not None:
            rest = keys[given:]
            victims = self._several.victims(self.pool, rest)
            for victim, key in zip(victims, rest, strict=False):
                self._pass_on(victim, key)
            given += len(victims)
        return given

    def _give_beside_staging(self, keys: Sequence[Key], several: BatchEviction) -> int:
        pool = self.pool
        slots, unproven = pool.slots, pool.unproven
        victims: Iterator[Key] | None = None
        for given, key in enumerate(keys):
            while len(slots) - len(unproven) >= self._for_proven or pool.take_free(key) is None:
                if victims is None:
                    victims = iter(several.victims(pool, keys))
                victim = next(victims, None)
                if victim is None:
                    return given
                self.drop(victim)
        return len(keys)

    def slot_for(self, key: Key) -> int:
        """A slot for a demand load, whatever it takes: free, evicted, taken from a queued prefetch, or waited for."""
        pool, victim_of, staged = self.pool, self.evict.victim, self._staging > 0
        while True:
            reserved = staged and len(pool) - len(pool.unproven) >= self._for_proven
            slot = None if reserved else pool.take_free(key)
            if slot is not None:
                return slot
            victim = victim_of(pool, key, protected=False)
            if victim is None:
                slot = pool.take_free(key)
                if slot is not None:
                    return slot
                victim = victim_of(pool, key, protected=True)
            if victim is not None and not staged:
                return self._pass_on(victim, key)
            if victim is not None:
                self.drop(victim)
                continue
            queued = [other for other in pool.queued() if other not in pool.pinned]
            assert queued, "a pool of at least top-k slots always has one to give"
            last = queued[-1]
            self.take_back([last])
            if last in pool:
                self.link.wait(last)

    # --- for what is foreseen -----------------------------------------------------------------------

    def prefetch(self, keys: Sequence[Key]) -> int:
        """Ask for the first of these foreseen experts, as far as slots can be had; none is in the pool. For how many.

        They become part of what this token still needs, for which nothing of that is evicted.
        """
        pool = self.pool
        if self._staging:
            keys = keys[: max(0, self._staging - len(pool.unproven))]
        given = self._give_foreseen(keys)
        slots, submit = pool.slots, self.link.submit
        keys = keys[:given]
        pool.unproven.update(keys)
        pool.protected.update(keys)
        self.ledger.counters.prefetch_loads += given
        for key in keys:
            submit(key, slots[key], demand=False)
        return given

    def _give_foreseen(self, keys: Sequence[Key]) -> int:
        """Give slots to the first of these: free ones, then evicted ones."""
        given = self._give_at_once(keys)
        if self._several is not None:
            return given
        for key in keys[given:]:
            victim = self.evict.victim(self.pool, key, protected=False)
            if victim is None:
                return given
            self._pass_on(victim, key)
            given += 1
        return given

    def preload(self, key: Key) -> None:
        """Ask for an expert that a planner chose, knowing that one may give way."""
        pool = self.pool
        slot = pool.take_free(key)
        if slot is None:
            victim = self.evict.victim(pool, key, protected=False)
            assert victim is not None, "a planner names a key only where one may give way"
            slot = self._pass_on(victim, key)
        pool.unproven.add(key)
        self.ledger.counters.prefetch_loads += 1
        self.link.submit(key, slot, demand=False)

    def take_back(self, keys: Iterable[Key]) -> None:
        """Undo these prefetches as far as their copies have not begun."""
        for key in sorted(keys):
            if self.link.cancel(key):
                self.drop(key)
                self.ledger.counters.prefetch_loads -= 1

    def clear_staging(self, layer: int) -> None:
        """Wrong guesses of this layer leave their slots, and experts in use take no more than their own."""
        pool = self.pool
        for key in sorted(key for key in pool.unproven if key[0] == layer and key in pool.ready):
            self.drop(key)
        while len(pool) - len(pool.unproven) > self._for_proven:
            victim = self.evict.victim(pool, (layer, -1), protected=False)
            if victim is None:
                return
            self.drop(victim)

    def _pass_on(self, victim: Key, key: Key) -> int:
        """The slot of `victim` is given to `key`."""
        slot = self.pool.replace(victim, key)
        if self.emptied is not None:
            self.emptied(slot)
        return slot

    def drop(self, key: Key) -> None:
        """Empty a slot."""
        slot = self.pool.release(key)
        if self.emptied is not None:
            self.emptied(slot)
