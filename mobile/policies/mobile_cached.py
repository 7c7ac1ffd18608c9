"""MoBiLE with a little pass that prefers what is there: experts in slots come before missing ones.

draft
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mobile.policies.big_little import MOBILE
from mobile.policies.cached_choice import Routed
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import CachedBigLittle, CachedRouting, Strategy


@dataclass(frozen=True)
class PreferResident:
    keep: int = 1
    reach: int = 0  # candidates; 0: all offered
    strength: float = 1.0
    loads: int = 1000

    def __call__(self, context: PolicyContext) -> PreferResident:
        return self

    def choose(self, routed: Routed) -> Any:
        scores = routed.scores
        never = scores.isinf()
        if self.reach:
            never = never | ~routed.marked(scores.topk(self.reach).indices)
        count = routed.chosen[0].shape[-1]
        span = scores.amax(-1, keepdim=True) - scores.masked_fill(scores.isinf(), float("inf")).amin(-1, keepdim=True)
        lowered = (scores - self.strength * span * ~routed.resident).masked_fill(never, float("-inf"))
        kept = routed.marked(scores.topk(min(self.keep, count)).indices)
        lowered = lowered.masked_fill(kept, float("inf"))
        runs = routed.marked(lowered.topk(count).indices) & ~never
        if self.loads < count:
            missing = runs & ~routed.resident & ~kept
            # keep the best `loads` missing
            best = routed.marked(scores.masked_fill(~missing, float("-inf")).topk(max(1,self.loads)).indices) & missing
            if self.loads == 0:
                best = best & False
            runs = runs & (routed.resident | kept | best)
        return runs


def mobile_cached(keep: int = 1, reach: int = 0, strength: float = 1.0, loads: int = 1000, among="all", gamma: float = 0.7) -> Strategy:
    return replace(
        MOBILE,
        name="mobile-cached",
        summary="mobile, whose little pass prefers experts that are in slots",
        source="this project",
        gating=CachedBigLittle(gamma=gamma, little=CachedRouting(PreferResident(keep, reach, strength, loads), among=among)),
    )


MOBILE_CACHED = mobile_cached()
