"""Prefetch and evict by how earlier sequences used their experts (MoE-Infinity, Xue et al., arXiv 2401.14361).

A sequence's activation matrix M counts, for each layer and expert, the tokens routed there. At every layer the stored
matrix M* nearest to the running one (cosine of rows, mean over layers) gives what comes: the prefetch queue is issued
anew in order of p[l', e] = (M*[l', e] + eps) (1 - (l' - l) / (L + 1)). Out goes what has the lowest product of its
frequency in the running sequence and the nearness of its layer, and never what is on its way.
Lossless. Ours: rows are compared and used as shares of their tokens; nearness in eviction has the form it has in p and
counts layers on round the end, because decoding begins again at the first; a full collection gives up the matrix
nearest to the newcomer; the queue is cut at top-k keys, because here a queued prefetch already holds a slot (uncut it
costs more loads than it saves); a matrix is of a prefill and the steps up to the next, a batch making one.
Claimed there: 3.1 to 16.7 times lower latency per token than vLLM, Ollama, DeepSpeed and BrainStorm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mobile.geometry import Geometry
from mobile.ledger import Key
from mobile.policy import Setting
from mobile.pool import SlotPool
from mobile.strategy import Strategy

COLLECTION = 128  # the paper keeps at most a few hundred, its code a thousand
EPSILON = 1e-4
RANKED = 32  # candidates for eviction that are put in order at a time


class Collection:
    """A bounded set of activation matrices, and how near each is to the running one, kept up to date as it grows.

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
        """The running sequence used these experts, for one token each where `counts` is None."""
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
        """The stored matrix nearest to the running one; None of an empty collection."""
        return int(self._nearness[: self.size].argmax()) if self.size else None

    def shares(self, number: int) -> np.ndarray:
        """The stored matrix (layers, experts) as shares of each layer's tokens."""
        matrix = self._stored[:, :, number]
        return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    def close(self) -> int | None:
        """The sequence is over: keep its matrix, and say in which place. None if it did nothing."""
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
    """Both policies of the paper, on one running matrix."""

    def __init__(self, setting: Setting) -> None:
        geometry = setting.geometry
        self._layers, self._experts, self._top_k = geometry.moe_layers, geometry.experts, geometry.top_k
        self._collection = Collection(self._layers, self._experts)
        self._queues: dict[tuple[int, int], list[int]] = {}  # key numbers, by stored matrix and layer
        self._frequency = np.full((self._layers, self._experts), EPSILON)
        ahead = (np.arange(self._layers) - np.arange(self._layers)[:, None] - 1) % self._layers  # [at, of]
        self._nearness = (1 - ahead / (self._layers + 1))[:, :, None]
        self._keys = [(layer, expert) for layer in range(self._layers) for expert in range(self._experts)]
        self._numbers = np.arange(geometry.keys)
        self._held = bytearray(geometry.keys)  # may be in the pool; what is not is found out in passing
        self._held_mask = np.frombuffer(self._held, dtype=np.bool_)
        self._at = 0
        self._counted = False
        self._ranked: list[int] = []
        self._complete = False

    # --- what it is told ---

    def begin(self, kind: str) -> None:
        if kind == "prefill":
            place = self._collection.close()
            self._queues = {asked: keys for asked, keys in self._queues.items() if asked[0] != place}
            self._frequency[:] = EPSILON
            self._forget_order()

    def streamed(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        self._count(layer, experts, counts)
        self._hold(layer * self._experts + expert for expert in experts)

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        experts = [expert for _, expert in keys]
        if not self._counted:
            self._count(layer, experts)
        self._counted = False
        self._hold(layer * self._experts + expert for expert in experts)

    def _hold(self, numbers: Iterable[int]) -> None:
        held = self._held
        for number in numbers:
            held[number] = True

    def _count(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> None:
        self._collection.add(layer, experts, counts)
        row = self._collection.running[layer]
        self._frequency[layer] = row / row.sum() + EPSILON
        self._at = layer
        self._forget_order()

    # --- what it is asked ---

    def routed(self, layer: int, experts: Sequence[int], ahead: np.ndarray | None) -> Sequence[Key]:
        self._count(layer, experts)
        self._counted = True
        nearest = self._collection.nearest()
        if nearest is None:
            return ()
        asked = nearest, layer
        if asked not in self._queues:
            self._queues[asked] = self._queue(self._collection.shares(nearest), layer)
        queue = self._queues[asked]
        self._hold(queue)
        return [self._keys[number] for number in queue]

    def _queue(self, shares: np.ndarray, layer: int) -> list[int]:
        """What a sequence of these shares will need after `layer`, by priority."""
        likeliest = np.argsort(-shares[layer + 1 :], axis=1, kind="stable")[:, : self._top_k]
        share = np.take_along_axis(shares[layer + 1 :], likeliest, axis=1)
        distance = np.arange(1, len(share) + 1)[:, None]
        priority = np.where(share > 0, (share + EPSILON) * (1 - distance / (self._layers + 1)), 0).ravel()
        order = np.argsort(-priority, kind="stable")[: self._top_k]
        order = order[priority[order] > 0]
        return ((layer + 1 + order // self._top_k) * self._experts + likeliest.ravel()[order]).tolist()

    def victim(self, pool: SlotPool, coming: Key, *, protected: bool) -> Key | None:
        ready, pinned, kept = pool.ready, pool.pinned, pool.protected
        while True:
            for place, number in enumerate(self._ranked):
                key = self._keys[number]
                if key in ready:
                    if (key in kept) is protected and key not in pinned:
                        del self._ranked[place]
                        self._held[number] = False
                        return key
                elif key not in pool:
                    self._held[number] = False
            if self._complete:
                return None
            self._rank(everything=bool(self._ranked))

    def _forget_order(self) -> None:
        self._ranked, self._complete = [], False

    def _rank(self, everything: bool) -> None:
        """Put the lowest scores in order, or all. They are made distinct, lest a tie depend on the machine."""
        scores = (self._frequency * self._nearness[self._at]).ravel()[self._held_mask]
        distinct = (scores * 1e9).astype(np.int64) * len(self._keys) + self._numbers[self._held_mask]
        if not everything and len(distinct) > RANKED:
            distinct.partition(RANKED)
            distinct = distinct[:RANKED]
            self._complete = False
        else:
            self._complete = True
        distinct.sort()
        self._ranked = (distinct % len(self._keys)).tolist()


def _one_token_and_queue(geometry: Geometry) -> int:
    return min(geometry.keys, (geometry.moe_layers + 1) * geometry.top_k)


ACTIVATION_TRACE = Strategy(
    name="activation-trace",
    summary="prefetch what the most similar earlier sequence used, evict what this one uses least",
    source="MoE-Infinity, arXiv 2401.14361 (2024)",
    lossless=True,
    retain="some",
    evict=ActivationTrace,
    lookahead=ActivationTrace,
    needs=_one_token_and_queue,
)
