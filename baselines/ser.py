"""Smart expert reduction: a token runs expert i only while p_i > t * p_0 (ik_llama.cpp pull request 239).

p_0 is the weight of the token's first expert. Lossy, and nothing makes up for it. Changed: the weights are the
router's own, normalised as the model normalises them, and those that are left are not raised; prefill runs all K; the
experts that run are cached as `lru` caches them. Claimed there: a faster CPU decode at a loss that grows with t, for
which users report no common number.
"""

from __future__ import annotations

from dataclasses import replace

from baselines.lru import LRU
from mobile.policies import Chosen, CustomRouting, Strategy

THRESHOLD = 0.4


def smart_reduction(threshold: float = THRESHOLD) -> Strategy:
    """Return the strategy at a threshold between 0, which runs all K, and 1, which runs one."""

    def choose(layer: int, routed: Chosen, foreseen: Chosen | None) -> Chosen:
        index, weights = routed
        first = weights.amax(-1, keepdim=True)
        return index, weights * ((weights > threshold * first) | (weights == first)).to(weights.dtype)

    return replace(
        LRU,
        name="ser",
        summary=f"decode with the experts whose weight is above {threshold:g} of the first one's",
        source="ik_llama.cpp, pull request 239 (2025)",
        lossless=False,
        gating=CustomRouting(choose),
    )


SER = smart_reduction()
