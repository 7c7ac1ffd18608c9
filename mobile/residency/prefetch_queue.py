"""Foresight: what later layers will probably need, brought in while the link has time, and held against the truth."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mobile.ledger import Key
from mobile.policies.protocols import IdlePrefetcher
from mobile.residency.slot_allocator import SlotAllocator


class PrefetchQueue:
    """What was predicted and has no slot yet (`wanted`), and by layer what was foreseen of its next visit.

    `guesses` is the most that one word of a lookahead fetches, 0 for all of it.
    """

    def __init__(self, room: SlotAllocator, guesses: int, planner: IdlePrefetcher | None) -> None:
        self._room, self._most, self._planner = room, guesses or None, planner
        self.wanted: deque[Key] = deque()
        self.guessed: dict[int, set[int]] = {}
        self.idle = True  # whether a planner may use the link

    def expect(self, keys: Sequence[Key]) -> None:
        """A fallback's prediction, in the order of its layers, beside what is wanted already."""
        for layer, expert in keys:
            self.guessed.setdefault(layer, set()).add(expert)
        pool = self._room.pool
        self.wanted.extend(key for key in keys if key not in pool)
        pool.protected.update(key for key in keys if key in pool)
        self.pump()

    def look(self, keys: Sequence[Key]) -> None:
        """A lookahead's word on what comes next, the most urgent first: it stands in place of what it said before."""
        pool = self._room.pool
        said: dict[int, set[int]] = {}
        for layer, expert in keys:
            if layer in said:
                said[layer].add(expert)
            else:
                said[layer] = {expert}
        self.guessed.update(said)
        slots = pool.slots
        missing = [key for key in keys if key not in slots]
        self.wanted = deque(missing[: self._most])
        if len(missing) < len(keys):
            pool.protected.update([key for key in keys if key in slots])
        if missing:
            self.pump()

    def refute(self, layer: int, experts: Sequence[int]) -> None:
        """The router has spoken: what was predicted for this layer and not chosen is not worth a copy any more."""
        room = self._room
        guessed = self.guessed.pop(layer, None)
        if guessed is not None:
            room.ledger.guess(layer, len(guessed), len(guessed.intersection(experts)), len(experts))
        while self.wanted and self.wanted[0][0] <= layer:
            self.wanted.popleft()
        pool = room.pool
        if pool.unproven:
            ready, pinned = pool.ready, pool.pinned
            room.take_back([key for key in pool.unproven if key[0] == layer and key not in ready and key not in pinned])

    def forget(self) -> None:
        """The token is settled: prefetches not begun are taken back."""
        self.wanted.clear()
        self.guessed.clear()
        pool = self._room.pool
        if pool.unproven:
            self._room.take_back(pool.unproven - pool.ready)

    def pump(self) -> None:
        """Start wanted prefetches while a slot can be had without evicting what this token still needs."""
        if not self.wanted:
            return
        slots = self._room.pool.slots
        absent = [key for key in self.wanted if key not in slots]
        asked = self._room.prefetch(absent)
        self.wanted = deque(absent[asked:])

    def plan(self) -> None:
        """Let a planner use an idle link: one copy at a time, so that each is chosen, and its slot, when it begins."""
        pool = self._room.pool
        if self._planner is None or not self.idle or len(pool.ready) < len(pool):
            return
        key = self._planner.idle(pool)
        if key is not None:
            self._room.preload(key)
