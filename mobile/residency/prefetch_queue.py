"""The prefetch queue: predicted experts that have no slot yet, and how right each layer's prediction was. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mobile.ledger import Key
from mobile.policies.protocols import IdlePrefetcher
from mobile.residency.slot_allocator import SlotAllocator


class PrefetchQueue:
    """A queue of predicted experts without a slot (`pending`), with each layer's prediction until it is routed.

    `max_per_layer` is the most that one prediction of a lookahead fetches, 0 for all of it.
    """

    def __init__(self, allocator: SlotAllocator, max_per_layer: int, idle_prefetcher: IdlePrefetcher | None) -> None:
        self._allocator, self._max_per_layer = allocator, max_per_layer or None
        self._idle_prefetcher = idle_prefetcher
        self.pending: deque[Key] = deque()
        self.predicted: dict[int, set[int]] = {}  # by layer
        self.allow_idle = True  # whether an idle prefetcher may use the link
        self.holds_fallback = False  # whether the running big pass's experts are predicted already

    def extend(self, keys: Sequence[Key]) -> None:
        """Add a fallback's prediction, in the order of its layers, behind what is pending already.

        It is of all layers and nearly sure, so that up to the end of the token it is not kept to guess slots.
        """
        self.holds_fallback = True
        for layer, expert in keys:
            self.predicted.setdefault(layer, set()).add(expert)
        pool = self._allocator.pool
        self.pending.extend(key for key in keys if key not in pool)
        pool.protected.update(key for key in keys if key in pool)
        self.submit_pending()

    def replace(self, keys: Sequence[Key]) -> None:
        """Put a lookahead's prediction, the most urgent first, in place of everything that is pending."""
        pool = self._allocator.pool
        by_layer: dict[int, set[int]] = {}
        for layer, expert in keys:
            if layer in by_layer:
                by_layer[layer].add(expert)
            else:
                by_layer[layer] = {expert}
        self.predicted.update(by_layer)
        slots = pool.slots
        missing = [key for key in keys if key not in slots]
        self.pending = deque(missing[: self._max_per_layer])
        if len(missing) < len(keys):
            pool.protected.update([key for key in keys if key in slots])
        if missing:
            self.submit_pending()

    def resolve(self, layer: int, experts: Sequence[int]) -> None:
        """Compare the prediction of `layer` with the `experts` it was routed to, and cancel its wrong prefetches."""
        allocator = self._allocator
        # 1. Score the prediction.
        predicted = self.predicted.pop(layer, None)
        if predicted is not None:
            allocator.ledger.guess(layer, len(predicted), len(predicted.intersection(experts)), len(experts))
        # 2. Drop what is pending for this layer or an earlier one.
        while self.pending and self.pending[0][0] <= layer:
            self.pending.popleft()
        # 3. Cancel prefetches of this layer that have a slot, are not needed and have not arrived.
        pool = allocator.pool
        unused = pool.unused_prefetches
        if unused:
            ready, pinned = pool.ready, pool.pinned
            allocator.cancel([key for key in unused if key[0] == layer and key not in ready and key not in pinned])

    def clear(self) -> None:
        """Forget all predictions and cancel all prefetches whose copies have not begun: the token has ended."""
        self.pending.clear()
        self.predicted.clear()
        self.holds_fallback = False
        pool = self._allocator.pool
        if pool.unused_prefetches:
            self._allocator.cancel(pool.unused_prefetches - pool.ready)

    def submit_pending(self) -> None:
        """Submit pending prefetches while slots can be had without evicting protected experts."""
        if not self.pending:
            return
        slots = self._allocator.pool.slots
        absent = [key for key in self.pending if key not in slots]
        submitted = self._allocator.prefetch(absent, as_guesses=not self.holds_fallback)
        self.pending = deque(absent[submitted:])

    def prefetch_if_idle(self) -> None:
        """Let an idle prefetcher use an idle link: one copy at a time, chosen, and its slot with it, when it begins."""
        pool = self._allocator.pool
        if self._idle_prefetcher is None or not self.allow_idle or len(pool.ready) < len(pool):
            return
        key = self._idle_prefetcher.idle(pool)
        if key is not None:
            self._allocator.prefetch_idle(key)
