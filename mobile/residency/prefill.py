"""Prefill: a prompt's experts stream through two buffers, and the decode pool keeps what it holds. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from mobile.ledger import Key
from mobile.residency.slot_allocator import SlotAllocator

Wave = list[tuple[int, int]]  # (position among the active experts, slot, or HOST: its row is computed where it lies)
HOST = -1
PREFILL_BUFFERS = 2  # slots that prefill, and any step wider than the pool, streams through


class PrefillStream:
    """The two buffers, slots `size` and `size + 1` behind the pool's own, and which expert arrived in each.

    `overlap` fills one while the other is computed on. `fill_free_slots` copies missing experts into slots of the
    pool that are still free, where they stay. No expert is evicted.
    """

    def __init__(self, allocator: SlotAllocator, *, overlap: bool, fill_free_slots: bool) -> None:
        self._allocator, self._overlap, self._fill_free_slots = allocator, overlap, fill_free_slots
        self._arrived: dict[int, Key] = {}  # by buffer
        self.max_in_flight = PREFILL_BUFFERS if overlap else 1

    def arrived(self, key: Key, slot: int) -> None:
        """Note that the copy of `key` into buffer `slot` has ended."""
        self._arrived[slot] = key

    def stream(
        self, keys: Sequence[Key], absent: Sequence[int], on_cpu: Sequence[int], ns: Sequence[int], host_ns: int
    ) -> Iterator[Wave]:
        """Yield each of `keys` in turn as a wave of its own, ready until the next wave is asked for.

        The experts at the positions `absent` are copied, those at `on_cpu` are the CPU's to compute, and `ns` are the
        nanoseconds that the device computes on each, which the host launches in `host_ns`.
        """
        pool, link, on_emptied = self._allocator.pool, self._allocator.link, self._allocator.on_emptied
        missing = deque(keys[position] for position in absent)
        buffers = deque(range(pool.size, pool.size + PREFILL_BUFFERS))
        in_flight: dict[Key, int] = {}
        self._arrived.clear()
        for position, key in enumerate(keys):
            # 1. Submit the next copies, as many as there are buffers for.
            while missing and len(in_flight) < self.max_in_flight:
                incoming = missing.popleft()
                free = pool.take_free(incoming) if self._fill_free_slots else None
                in_flight[incoming] = buffers.popleft() if free is None else free
                self._allocator.ledger.counters.streamed_loads += 1
                link.submit(incoming, in_flight[incoming], demand=True)
            if position in on_cpu:
                yield [(position, HOST)]
                continue
            # 2. Wait until this expert is in its buffer or slot.
            slot = in_flight.pop(key, None)
            stays = key in pool
            if slot is None:
                slot = pool.slot(key)
                link.promote(key)
            while key not in pool.ready and self._arrived.get(slot) != key:
                link.wait(key)
            # 3. Compute on it, then free its buffer.
            link.compute(ns[position], key, host_ns)
            yield [(position, slot)]
            link.used([slot])
            if not self._overlap:
                link.join()
            if not stays:
                buffers.append(slot)
                if on_emptied is not None:
                    on_emptied(slot)
