"""A cache of often used experts: the rule that MoE-Infinity ships (Xue et al., arXiv 2401.14361).

Lossless. Changed: uses are counted from the start of the run over decode steps, in one pool for all layers, and of
equally used experts the least recent is evicted. Its paper describes another policy (request-level activation traces,
a strategy of its own here), so no number is claimed for this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from baselines.lru import LRU
from baselines.signals.ranking import RankedEviction
from mobile.policies import Key, PolicyContext


class Frequent(RankedEviction):
    """Eviction of the least frequently used expert, of equal ones the least recently used."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(lambda key: self._uses.get(key, (0, 0)))
        self._uses: dict[Key, tuple[int, int]] = {}  # how many, and the time of the last
        self._clock = 0

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Count these uses."""
        uses, ranking = self._uses, self.ranking
        for key in keys:
            self._clock += 1
            rank = uses[key] = (uses[key][0] + 1 if key in uses else 1, self._clock)
            ranking.increase(key, rank)


LFU = replace(
    LRU,
    name="lfu",
    summary="keep often used experts, evict the least frequently used",
    source="Xue et al., MoE-Infinity, arXiv 2401.14361 (2024), as shipped",
    evict=Frequent,
)
