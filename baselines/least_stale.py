"""A cache that drops what earlier passes left behind (Least-Stale, SpecMD, Hoang et al., arXiv 2602.03921).

A forward pass visits the layers in their order, so an expert's next chance is known. What the running pass has used or
loaded is fresh; what earlier passes left is stale, and goes first. Lossless. Changed, or ours where the paper could not
be read: among the stale ones, and then among the fresh ones, the expert goes whose layer is visited again the latest
(this layer's, then those before it, then from the last layer backwards), of one layer's the least recently used; a big
pass goes on with its little pass, both being one token's; one pool for all layers. Claimed there, with speculative
prefetch: up to 85 times fewer collision misses than LRU, over 88 % hits on OLMoE with slots for 5 % of its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from baselines.lru import LRU
from mobile.policies import Key, PolicyContext, SlotPool


class LeastStale:
    """Eviction of experts that earlier passes left, then of others, by how late their layer is visited again."""

    def __init__(self, context: PolicyContext) -> None:
        self._pass = 0
        self._last_run = context.geometry.moe_layers - 1
        # By layer, the pass that used or loaded each expert last, the earliest first. Some have left the pool since.
        self._seen: list[dict[Key, int]] = [{} for _ in range(context.geometry.moe_layers)]
        self._free_taken = 0  # of the pool, when all its keys had been seen

    def begin(self, kind: str) -> None:
        """Make all experts stale, unless this pass is the second one of its token."""
        self._pass += kind != "big"

    def streamed(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Do nothing: a prompt leaves the order in the pool as it is, and what it used is stale in the next pass."""

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Note that the running pass has used these experts."""
        self._last_run = layer
        self._note(keys)

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        """Return the first expert in order; its slot is the one of `incoming` now."""
        return next(iter(self._exchange(pool, [incoming], protected)), None)

    def victims(self, pool: SlotPool, incoming: Sequence[Key]) -> list[Key]:
        """Return the first of them, as many as `incoming`."""
        return self._exchange(pool, incoming, protected=False)

    def _exchange(self, pool: SlotPool, incoming: Sequence[Key], protected: bool) -> list[Key]:
        """Return the first experts in order, in whose slots the running pass loads the first of `incoming`."""
        if pool.free_taken != self._free_taken:
            self._find_unseen(pool)
        gone: list[Key] = []
        found = list(islice(self._in_order(pool, protected, gone), len(incoming)))
        for key in (*found, *gone):
            self._seen[key[0]].pop(key, None)
        self._note(incoming[: len(found)])
        return found

    def _note(self, keys: Sequence[Key]) -> None:
        """Note that the running pass has used or loaded these experts."""
        for key in keys:
            seen = self._seen[key[0]]
            seen.pop(key, None)
            seen[key] = self._pass

    def _find_unseen(self, pool: SlotPool) -> None:
        """Note the experts that came into free slots: fresh if they were prefetched, stale if a prompt left them."""
        self._free_taken = pool.free_taken
        unseen = [key for key in pool if key not in self._seen[key[0]]]
        self._note([key for key in unseen if key in pool.unused_prefetches])
        for key in reversed(unseen):
            if key not in pool.unused_prefetches:
                self._seen[key[0]] = {key: self._pass - 1, **self._seen[key[0]]}

    def _in_order(self, pool: SlotPool, protected: bool, gone: list[Key]) -> Iterator[Key]:
        """Iterate over the experts that may be evicted: stale, then fresh, the layer first that is visited last.

        `gone` grows by those that were noted and are not in the pool any more.
        """
        slots, ready, pinned, shielded = pool.slots, pool.ready, pool.pinned, pool.protected
        running = next(iter(pinned))[0] if pinned else self._last_run
        layers = [*range(running, -1, -1), *range(len(self._seen) - 1, running, -1)]
        for fresh in (False, True):
            for layer in layers:
                for key, seen_in in self._seen[layer].items():
                    if not fresh and seen_in == self._pass:
                        break  # as are all behind it
                    if fresh and seen_in < self._pass:
                        continue
                    if key in ready:
                        if key not in pinned and (key in shielded) is protected:
                            yield key
                    elif key not in slots:
                        gone.append(key)


LEAST_STALE = replace(
    LRU,
    name="least-stale",
    summary="keep what the running pass uses, evict what earlier passes left",
    source="Hoang et al., SpecMD, arXiv 2602.03921 (2026)",
    evict=LeastStale,
)
