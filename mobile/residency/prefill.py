"""Prefill: experts pass through two staging buffers, and the decode cache's order is left alone. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from mobile.ledger import Key
from mobile.residency.slot_allocator import SlotAllocator

Wave = list[tuple[int, int]]  # (position among the active experts, slot, or HOST: its row is computed where it lies)
HOST = -1
PREFILL_BUFFERS = 2  # buffers that prefill, and any step wider than the pool, streams through


class PrefillStream:
    """The two slots behind the pool's own, `size` and `size + 1`, and what has landed in them."""

    def __init__(self, room: SlotAllocator, *, overlap: bool, settles: bool) -> None:
        """`overlap`: both are filled at a time. `settles`: missing experts may stay in slots that are still free."""
        self._room, self._overlap, self._settles = room, overlap, settles
        self._landed: dict[int, Key] = {}
        self.ahead = PREFILL_BUFFERS if overlap else 1

    def arrived(self, key: Key, slot: int) -> None:
        """A copy into one of them has ended."""
        self._landed[slot] = key

    def stream(
        self, keys: Sequence[Key], absent: Sequence[int], on_cpu: Sequence[int], ns: Sequence[int]
    ) -> Iterator[Wave]:
        """Run these experts in turn, one a wave, for `ns` each on the device; the `absent` positions are loaded."""
        pool, link = self._room.pool, self._room.link
        missing = deque(keys[position] for position in absent)
        buffers = deque(range(pool.size, pool.size + PREFILL_BUFFERS))
        placed: dict[Key, int] = {}
        self._landed.clear()
        for position, key in enumerate(keys):
            while missing and len(placed) < self.ahead:
                coming = missing.popleft()
                free = pool.take_free(coming) if self._settles else None
                placed[coming] = buffers.popleft() if free is None else free
                self._room.ledger.counters.streamed_loads += 1
                link.submit(coming, placed[coming], demand=True)
            if position in on_cpu:
                yield [(position, HOST)]
                continue
            slot = placed.pop(key, None)
            settled = key in pool
            if slot is None:
                slot = pool.slot(key)
                link.promote(key)
            while key not in pool.ready and self._landed.get(slot) != key:
                link.wait(key)
            link.compute(ns[position], key)
            yield [(position, slot)]
            link.used([slot])
            if not self._overlap:
                link.join()
            if not settled:
                buffers.append(slot)
                if self._room.emptied is not None:
                    self._room.emptied(slot)
