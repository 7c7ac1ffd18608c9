"""The slot allocator: finds a slot for each expert to be copied, evicting another where it must. No torch.

Every eviction happens here, and every copy into the decode pool is submitted to the link here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mobile.ledger import Key, Ledger
from mobile.links.base import Link
from mobile.policies.protocols import BatchEviction, Eviction
from mobile.policies.strategy import Strategy
from mobile.slots import SlotPool


class SlotAllocator:
    """An allocator of the pool's slots under an eviction policy, which also submits the copies into them.

    `on_emptied(slot)` is called for every slot that lost its expert. Where a strategy has guess slots, experts in use
    take no more than the others, and an eviction frees a slot instead of reassigning it: which kind of expert takes
    it then depends on how many of each kind are in the pool.
    """

    def __init__(
        self,
        strategy: Strategy,
        pool: SlotPool,
        link: Link,
        ledger: Ledger,
        eviction: Eviction,
        on_emptied: Callable[[int], None] | None,
    ) -> None:
        self.pool, self.link, self.ledger = pool, link, ledger
        self.on_emptied = on_emptied
        self._eviction = eviction
        self._batch_eviction = eviction if isinstance(eviction, BatchEviction) else None
        self._guess_slots = strategy.guess_slots
        self._used_slots = pool.size - strategy.guess_slots  # the most that experts in use may take

    # --- demand loads -------------------------------------------------------------------------------

    def demand_load(self, keys: Sequence[Key]) -> None:
        """Submit demand loads of experts that are not in the pool, each with a slot of its own."""
        assigned, submit, slots = self.assign_batch(keys), self.link.submit, self.pool.slots
        for key in keys[:assigned]:
            submit(key, slots[key], demand=True)
        for key in keys[assigned:]:  # one by one: the next may have to wait until a queued copy has arrived
            submit(key, self.allocate(key), demand=True)

    def assign_batch(self, keys: Sequence[Key]) -> int:
        """Assign slots to the first of `keys` as far as batch eviction goes; return how many got one."""
        if self._guess_slots:
            return 0 if self._batch_eviction is None else self._assign_beside_guesses(keys, self._batch_eviction)
        return self._assign_free_and_batch(keys)

    def _assign_free_and_batch(self, keys: Sequence[Key]) -> int:
        """Assign free slots, then those that a batch eviction yields; return how many of `keys` got one."""
        assigned = self.pool.take_free_for(keys)
        if assigned < len(keys) and self._batch_eviction is not None:
            rest = keys[assigned:]
            victims = self._batch_eviction.victims(self.pool, rest)
            for victim, key in zip(victims, rest, strict=False):
                self._reassign(victim, key)
            assigned += len(victims)
        return assigned

    def _assign_beside_guesses(self, keys: Sequence[Key], batch_eviction: BatchEviction) -> int:
        """Assign slots to `keys`, leaving the guess slots alone; return how many got one."""
        pool = self.pool
        slots, unused = pool.slots, pool.unused_prefetches
        victims: Iterator[Key] | None = None
        for assigned, key in enumerate(keys):
            # Evict until experts in use take less than their share and a slot is free.
            while len(slots) - len(unused) >= self._used_slots or pool.take_free(key) is None:
                if victims is None:
                    victims = iter(batch_eviction.victims(pool, keys))
                victim = next(victims, None)
                if victim is None:
                    return assigned
                self.release(victim)
        return len(keys)

    def allocate(self, key: Key) -> int:
        """Assign a slot to `key` for a demand load, whatever it takes, and return its number.

        A free slot comes first, then one of an evicted expert, then one of a cancelled prefetch. If none can be had
        at once, compute waits for a queued copy, whose expert may then be evicted.
        """
        pool, choose_victim, has_guess_slots = self.pool, self._eviction.victim, self._guess_slots > 0
        while True:
            # 1. A free slot, unless all that are free are guess slots.
            reserved = has_guess_slots and len(pool) - len(pool.unused_prefetches) >= self._used_slots
            slot = None if reserved else pool.take_free(key)
            if slot is not None:
                return slot
            # 2. Evict an expert that is not protected; else borrow a guess slot; else evict a protected expert.
            victim = choose_victim(pool, key, protected=False)
            if victim is None:
                slot = pool.take_free(key)
                if slot is not None:
                    return slot
                victim = choose_victim(pool, key, protected=True)
            if victim is not None and not has_guess_slots:
                return self._reassign(victim, key)
            if victim is not None:
                self.release(victim)
                continue
            # 3. Everything is pinned or on its way: cancel the newest prefetch, or wait for it if it cannot be.
            queued = [other for other in pool.queued() if other not in pool.pinned]
            assert queued, "a pool of at least top-k slots always has one to give"
            last = queued[-1]
            self.cancel([last])
            if last in pool:
                self.link.wait(last)

    # --- prefetches ---------------------------------------------------------------------------------

    def prefetch(self, keys: Sequence[Key], *, as_guesses: bool = True) -> int:
        """Submit prefetches of the first of `keys`, none of them in the pool, while slots last; return how many.

        They become protected, and nothing protected is evicted for them. Guesses take no more than the guess slots,
        where there are some.
        """
        pool = self.pool
        if as_guesses and self._guess_slots:
            keys = keys[: max(0, self._guess_slots - len(pool.unused_prefetches))]
        assigned = self._assign_prefetches(keys)
        slots, submit = pool.slots, self.link.submit
        keys = keys[:assigned]
        pool.unused_prefetches.update(keys)
        pool.protected.update(keys)
        self.ledger.counters.prefetch_loads += assigned
        for key in keys:
            submit(key, slots[key], demand=False)
        return assigned

    def _assign_prefetches(self, keys: Sequence[Key]) -> int:
        """Assign slots that are free or of unprotected experts; return how many of `keys` got one."""
        assigned = self._assign_free_and_batch(keys)
        if self._batch_eviction is not None:
            return assigned
        for key in keys[assigned:]:
            victim = self._eviction.victim(self.pool, key, protected=False)
            if victim is None:
                return assigned
            self._reassign(victim, key)
            assigned += 1
        return assigned

    def prefetch_idle(self, key: Key) -> None:
        """Submit a prefetch of the expert that an idle prefetcher chose, which has made sure that a slot can be had."""
        pool = self.pool
        slot = pool.take_free(key)
        if slot is None:
            victim = self._eviction.victim(pool, key, protected=False)
            assert victim is not None, "an idle prefetcher names a key only where a slot is free or can be"
            slot = self._reassign(victim, key)
        pool.unused_prefetches.add(key)
        self.ledger.counters.prefetch_loads += 1
        self.link.submit(key, slot, demand=False)

    def cancel(self, keys: Iterable[Key]) -> None:
        """Cancel these prefetches and free their slots, as far as their copies have not begun."""
        for key in sorted(keys):
            if self.link.cancel(key):
                self.release(key)
                self.ledger.counters.prefetch_loads -= 1

    def clear_guess_slots(self, layer: int) -> None:
        """Release the wrong guesses of a layer that has run, and evict until experts in use take only their share."""
        pool = self.pool
        for key in sorted(key for key in pool.unused_prefetches if key[0] == layer and key in pool.ready):
            self.release(key)
        while len(pool) - len(pool.unused_prefetches) > self._used_slots:
            victim = self._eviction.victim(pool, (layer, -1), protected=False)
            if victim is None:
                return
            self.release(victim)

    # --- slots that lose their expert ---------------------------------------------------------------

    def _reassign(self, victim: Key, key: Key) -> int:
        """Evict `victim`, assign its slot to `key` and return the slot's number."""
        slot = self.pool.replace(victim, key)
        if self.on_emptied is not None:
            self.on_emptied(slot)
        return slot

    def release(self, key: Key) -> None:
        """Empty the slot of `key`, which is then free."""
        slot = self.pool.release(key)
        if self.on_emptied is not None:
            self.on_emptied(slot)
