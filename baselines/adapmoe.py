"""AdapMoE (Zhong et al., arXiv 2408.10284): fewer experts where it hardly matters, one guess a layer, a cache a layer.

Gate: the experts of least weight are left out while what is left out stays below tau_l = sqrt(T / w_l), w_l being the
sensitivity of the loss to layer l (T = 0.005); at K = 2 that is the paper's alpha_2 < tau_l. Prefetch: of the next
layer's likeliest experts the first that is not resident, behind this layer's own loads; one that was not chosen is
evicted first. Cache: each layer's share minimises the expected loads (dynamic programming), the least recently used of
the layer is evicted. Lossy in its gate only. Changed: both formulas hold for any K; the weight of what is left out is
added to what runs, in proportion; where a layer's share is below K, it borrows for its step; prefetch looks one layer
ahead and never further. The registered `adapmoe` has measured no model: its sensitivities are all 1 and its guesses
right with probability 0.8. Both can be measured (`baselines.signals.sensitivity` has the formulas), and the file makes
a Strategy:

    python -m baselines.adapmoe fit --model FOLDER --prompts FILE --out adapmoe.json
    measured("adapmoe.json")

Claimed there: 1.35 times faster than existing techniques with a quarter fewer experts activated, for Mixtral.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import comb, sqrt
from os import PathLike
from pathlib import Path

import numpy as np

from baselines.lru import LRU
from baselines.next_gate import NextGate
from baselines.signals.sensitivity import Measured
from mobile.policies import Chosen, CustomRouting, Key, PolicyContext, SlotPool, Strategy

TOLERANCE = 0.005
ACCURACY = 0.8  # 0.8 to 0.9 is what Eliseev and Mazur report of such guesses


def adaptive(routed: Chosen, threshold: float) -> Chosen:
    """Zero the weights (tokens, K) of a token's last experts as long as their share stays below `threshold`.

    Those that run get the others' weight, in proportion. The first always runs.
    """
    index, weights = routed
    ordered, order = weights.float().sort(dim=-1, descending=True, stable=True)
    rest = ordered.flip(-1).cumsum(-1).flip(-1)  # of each expert and all behind it
    runs = rest >= threshold * rest[..., :1]
    runs[..., 0] = True
    kept = ordered * runs
    kept = kept * (rest[..., :1] / kept.sum(-1, keepdim=True))
    unchanged = runs.all(-1, keepdim=True)
    kept = kept.gather(-1, order.argsort(-1)).to(weights.dtype)
    return index, weights.where(unchanged, kept)


def expected_loads(experts: int, cached: int, runs: int, accuracy: float) -> float:
    """Return the expected number of `runs` experts, drawn evenly, that are neither `cached` nor fetched by the guess.

    The sum over m >= 1 missing, hypergeometric, of Pr(m) (m - accuracy).
    """
    some = 1 - comb(cached, runs) / comb(experts, runs)
    return runs * (experts - cached) / experts - accuracy * some


def shares(experts: int, slots: int, runs: int, accuracy: Sequence[float]) -> list[int]:
    """Return the slots of each layer, at least one, that minimise the expected loads of a token; even where it ties.

    `accuracy` gives each layer's chance that its guess is right. O(layers x slots x experts).
    """
    layers = len(accuracy)
    even = 1e-9 / experts**2  # far below a load: it only settles ties
    slots = min(slots, layers * experts)
    best = np.full(slots + 1, np.inf)
    best[0] = 0.0
    choices = []
    for layer in range(layers):
        following, choice = np.full(slots + 1, np.inf), np.zeros(slots + 1, dtype=np.int64)
        for cached in range(min(1, slots // layers), min(experts, slots) + 1):
            cost = expected_loads(experts, cached, runs, accuracy[layer]) + even * cached * cached
            total = best[: slots + 1 - cached] + cost
            better = total < following[cached:]
            following[cached:][better] = total[better]
            choice[cached:][better] = cached
        best = following
        choices.append(choice)
    sizes, left = [], slots
    for choice in reversed(choices):
        sizes.append(int(choice[left]))
        left -= sizes[-1]
    return sizes[::-1]


class Shares:
    """Eviction from the layer itself once it has its share, before that from a layer above its share; each by LRU."""

    def __init__(self, context: PolicyContext, accuracy: Sequence[float] | None = None) -> None:
        geometry = context.geometry
        guessed = [0.0] + [ACCURACY] * (geometry.moe_layers - 1)  # nothing foresees the first layer
        if accuracy is not None:
            guessed = [each for each, layers in zip(accuracy, context.layer_map, strict=True) for _ in layers]
        self.share = shares(geometry.experts, context.slots, geometry.top_k, guessed)
        self._keys = [[(layer, expert) for expert in range(geometry.experts)] for layer in range(geometry.moe_layers)]
        self._layer = -1  # the last one that ran

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Note which layer ran last; the pool keeps the order of use."""
        self._layer = layer

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        """Return the first expert of `_in_order`."""
        return next(self._in_order(pool, incoming[0], protected), None)

    def _in_order(self, pool: SlotPool, layer: int, protected: bool) -> Iterator[Key]:
        """Iterate over the experts that may be evicted for one of `layer`, the first choice first."""
        # 1. Wrong guesses.
        refuted = {
            key
            for key in pool.unused_prefetches
            if key[0] != self._layer + 1 and pool.is_evictable(key, protected=protected)
        }
        if refuted:  # they came in lately: looked for from the newest on
            newest = islice((key for key in reversed(pool.slots) if key in refuted), len(refuted))
            yield from reversed(list(newest))
        # 2. Experts of this layer, if it has its share.
        if self._count(pool, layer) >= self.share[layer]:
            yield from (key for key in pool if key[0] == layer and pool.is_evictable(key, protected=protected))
        # 3. Experts of layers above their share, then any.
        modest = [each for each, share in enumerate(self.share) if self._count(pool, each) <= share]
        yield from pool.evictable(protected=protected, skip_layers=modest)
        yield from pool.evictable(protected=protected)

    def _count(self, pool: SlotPool, layer: int) -> int:
        """Return how many experts of `layer` are in the pool."""
        return sum(map(pool.slots.__contains__, self._keys[layer]))


def adapmoe(
    tolerance: float = TOLERANCE,
    sensitivities: Sequence[float] | None = None,
    accuracy: Sequence[float] | None = None,
) -> Strategy:
    """Return the strategy with measured numbers.

    `sensitivities` are w_l by layer of the model, `accuracy` the chance that a guess of its experts is right.
    """

    def choose(layer: int, routed: Chosen, foreseen: Chosen | None) -> Chosen:
        return adaptive(routed, sqrt(tolerance / (1.0 if sensitivities is None else sensitivities[layer])))

    return replace(
        LRU,
        name="adapmoe",
        summary="run fewer experts where their weight is small; one guess a layer; a cache share for each layer",
        source="Zhong et al., AdapMoE, arXiv 2408.10284 (2024)",
        lossless=False,
        gating=CustomRouting(choose),
        evict=lambda context: Shares(context, accuracy),
        lookahead=NextGate,
        max_prefetch_per_layer=1,
    )


def measured(source: str | PathLike[str], tolerance: float = TOLERANCE) -> Strategy:
    """Return the strategy with what `python -m baselines.adapmoe fit` measured. Raise Refused for another file."""
    found = Measured.load(Path(source))
    return adapmoe(tolerance, found.sensitivities, found.accuracy)


ADAPMOE = adapmoe()


if __name__ == "__main__":
    from baselines.signals.sensitivity import main

    main()
