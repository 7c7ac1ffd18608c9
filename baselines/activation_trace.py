"""Prefetch and evict by how earlier sequences used their experts (MoE-Infinity, Xue et al., arXiv 2401.14361).

A sequence's activation matrix M counts, for each layer and expert, the tokens routed there. At every layer the stored
matrix M* nearest to the running one (cosine of rows, mean over layers) gives what comes: the prefetch queue is issued
anew in order of p[l', e] = (M*[l', e] + eps) (1 - (l' - l) / (L + 1)). The expert with the lowest product of its
frequency in the running sequence and the nearness of its layer is evicted, never one that is on its way. Lossless.
Changed: rows are compared and used as shares of their tokens; nearness in eviction has the form it has in p and goes on
counting past the last layer at the first, where the next token begins; a full collection gives up the matrix nearest to
the newcomer; the queue is cut at top-k keys, because here a queued prefetch already holds a slot (uncut it costs more
loads than it saves); a matrix is of a prefill and the steps up to the next, a batch making one. Claimed there: 3.1 to
16.7 times lower latency per token than vLLM, Ollama, DeepSpeed and BrainStorm.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence

import numpy as np

from mobile.policies import Geometry, Key, NextLayerLogits, PolicyContext, SlotPool, Strategy

COLLECTION = 128  # matrices; the paper keeps a few hundred, and each is compared at every layer
EPSILON = 1e-4
FEW = 256  # slots up to which all experts in them are sorted for eviction
RANKED = 32  # with more slots, candidates for eviction that are sorted at a time


class Collection:
    """A bounded set of activation matrices, and the cosine of each to the running one, updated as that grows.

    Counts are whole numbers in float64, so their products do not depend on the order of a machine's sums.
    """

    def __init__(self, layers: int, experts: int, most: int = COLLECTION) -> None:
        self.size = 0
        self.running = np.zeros((layers, experts))
        self._stored = np.zeros((layers, experts, most))
        self._inverse = np.zeros((layers, most))  # 1 / norm of each stored row
        self._dots = np.zeros((layers, most))  # running row x stored row
        self._cosines = np.zeros((layers, most))
        self._nearness = np.zeros(most)  # their sum over layers

    def add(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> None:
        """Count a use of these experts by the running sequence, for one token each where `counts` is None."""
        row, chosen, dots, cosines = self.running[layer], list(experts), self._dots[layer], self._cosines[layer]
        if counts is None:
            row[chosen] += 1
            dots += np.add.reduce(self._stored[layer].take(chosen, axis=0))
        else:
            times = np.asarray(counts, dtype=np.float64)
            row[chosen] += times
            dots += times @ self._stored[layer, chosen]
        self._nearness -= cosines
        np.multiply(dots, self._inverse[layer], out=cosines)
        cosines /= math.sqrt(row @ row)
        self._nearness += cosines

    def nearest(self) -> int | None:
        """Return the place of the stored matrix nearest to the running one; None of an empty collection."""
        return int(self._nearness[: self.size].argmax()) if self.size else None

    def shares(self, number: int) -> np.ndarray:
        """Return the matrix (layers, experts) stored at place `number`, as shares of each layer's tokens."""
        matrix = self._stored[:, :, number]
        return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    def close(self) -> int | None:
        """Store the running matrix, start a new one and return the place it took; None if it was empty."""
        if not self.running.any():
            return None
        place: int | None = self.size
        if self.size == self._stored.shape[2]:
            place = self.nearest()
        assert place is not None
        self.size = max(self.size, place + 1)
        self._stored[:, :, place] = self.running
        norms = np.sqrt((self.running**2).sum(axis=1))
        self._inverse[:, place] = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        for each in (self.running, self._dots, self._cosines, self._nearness):
            each[:] = 0
        return place


class ActivationTrace:
    """The eviction and the lookahead of the paper, on one running matrix."""

    def __init__(self, context: PolicyContext) -> None:
        geometry = context.geometry
        self._layers, self._experts, self._top_k = geometry.moe_layers, geometry.experts, geometry.top_k
        self._collection = Collection(self._layers, self._experts)
        self._queues: dict[tuple[int, int], list[Key]] = {}  # by stored matrix and layer
        self._least = EPSILON * (1 + 1e-6 * np.arange(self._experts))  # distinct, lest a tie depend on the machine
        self._frequency = np.tile(self._least, (self._layers, 1))
        ahead = (np.arange(self._layers) - np.arange(self._layers)[:, None] - 1) % self._layers  # [at, of]
        self._nearness = (1 - ahead / (self._layers + 1))[:, :, None]
        self._keys = [(layer, expert) for layer in range(self._layers) for expert in range(self._experts)]
        self._absent = array("d", [np.inf]) * geometry.total_experts  # 0: may be in the pool
        self._issued: Sequence[Key] = ()
        self._layer = 0
        self._counted = False
        self._order: deque[int] = deque()  # key numbers, the lowest score first
        self._protected_order: deque[int] = deque()  # of these, the protected ones
        self._ordered = self._complete = False

    # --- observing the run ---

    def begin(self, kind: str) -> None:
        """Store the last sequence's matrix when a prefill begins a new one."""
        self._invalidate_order()
        if kind == "prefill":
            place = self._collection.close()
            self._queues = {at: keys for at, keys in self._queues.items() if at[0] != place}
            self._frequency[:] = self._least

    def streamed(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Count the use of a prompt's experts."""
        self._count(layer, experts, counts)
        self._invalidate_order()
        self._mark_present([(layer, expert) for expert in experts])

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Count the use of a decode step's experts, unless `routed` has."""
        if not self._counted:
            self._count(layer, [expert for _, expert in keys])
        self._counted = False
        self._invalidate_order()
        self._mark_present(keys)

    def _mark_present(self, keys: Sequence[Key]) -> None:
        """Note that these keys may be in the pool."""
        absent, experts = self._absent, self._experts
        for layer, expert in keys:
            absent[layer * experts + expert] = 0

    def _count(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> None:
        """Add the use of `experts` to the running matrix and to the frequencies."""
        self._collection.add(layer, experts, counts)
        row = self._collection.running[layer]
        np.add(row / np.add.reduce(row), self._least, out=self._frequency[layer])
        self._layer = layer

    # --- prefetching and evicting ---

    def routed(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> Sequence[Key]:
        """Return what the nearest stored sequence used after `layer`, by priority."""
        self._count(layer, experts)
        self._counted = True
        nearest = self._collection.nearest()
        if nearest is None:
            return ()
        place_and_layer = nearest, layer
        if place_and_layer not in self._queues:
            self._queues[place_and_layer] = self._queue(self._collection.shares(nearest), layer)
        queue = self._queues[place_and_layer]
        self._issued = queue
        self._mark_present(queue)
        return queue

    def _queue(self, shares: np.ndarray, layer: int) -> list[Key]:
        """Return the keys that a sequence of these shares will need after `layer`, by priority."""
        likeliest = np.argsort(-shares[layer + 1 :], axis=1, kind="stable")[:, : self._top_k]
        share = np.take_along_axis(shares[layer + 1 :], likeliest, axis=1)
        distance = np.arange(1, len(share) + 1)[:, None]
        priority = np.where(share > 0, (share + EPSILON) * (1 - distance / (self._layers + 1)), 0).ravel()
        order = np.argsort(-priority, kind="stable")[: self._top_k]
        order = order[priority[order] > 0]
        return list(zip((layer + 1 + order // self._top_k).tolist(), likeliest.ravel()[order].tolist(), strict=True))

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        """Return the evictable expert of the lowest score."""
        if not self._ordered:
            self._rank(pool, everything=False)
        found = self._lowest(pool, protected)
        if found is None and (protected or not self._complete):
            self._rank(pool, everything=True)
            if protected:
                self._lowest(pool, protected=False)
            found = self._lowest(pool, protected)
        if found is not None:
            self._mark_present([incoming])  # a fallback's prefetch may come unused, and was not of this queue
        return found

    def _lowest(self, pool: SlotPool, protected: bool) -> Key | None:
        """Return the first evictable key in order. Protected ones are put aside: they stay so until the next order."""
        order, passed, found = self._protected_order if protected else self._order, [], None
        while order:
            number = order.popleft()
            key = self._keys[number]
            if not protected and key in pool.protected:
                self._protected_order.append(number)
            elif key in pool.ready and key not in pool.pinned:
                self._absent[number] = np.inf
                found = key
                break
            elif key in pool:
                passed.append(number)
            elif key not in self._issued:
                self._absent[number] = np.inf
        order.extendleft(reversed(passed))
        return found

    def _invalidate_order(self) -> None:
        """Have the next eviction sort anew."""
        self._ordered = False

    def _rank(self, pool: SlotPool, everything: bool) -> None:
        """Sort the keys with the lowest scores by score, or those of all ready experts."""
        scores = (self._frequency * self._nearness[self._layer]).ravel()
        if everything:
            lowest = np.array([layer * self._experts + expert for layer, expert in pool.ready], dtype=np.intp)
        elif pool.size <= FEW:
            lowest = np.flatnonzero(np.frombuffer(self._absent) == 0)
        else:
            scores += np.frombuffer(self._absent)
            lowest = scores.argpartition(RANKED)[:RANKED]
        lowest.sort()
        self._order, self._protected_order = deque(lowest[scores[lowest].argsort()].tolist()), deque()
        self._ordered, self._complete = True, everything


def _one_token_and_queue(geometry: Geometry) -> int:
    """Return the slots of one token's experts and of the prefetch queue."""
    return min(geometry.total_experts, (geometry.moe_layers + 1) * geometry.top_k)


ACTIVATION_TRACE = Strategy(
    name="activation-trace",
    summary="prefetch what the most similar earlier sequence used, evict what this one uses least",
    source="MoE-Infinity, arXiv 2401.14361 (2024)",
    lossless=True,
    retain="some",
    evict=ActivationTrace,
    lookahead=ActivationTrace,
    min_slots=_one_token_and_queue,
)
