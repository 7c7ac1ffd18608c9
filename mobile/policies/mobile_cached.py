"""MoBiLE with a little pass that prefers experts in slots; the confidence test guards that, too (ours).

Of the experts that the router would run at K, the little pass runs K/2: the first `keep` of them always, then those
that are in slots or on their way, then the others, each by the router's logit. With `beyond` it picks among all
experts, and a missing one is worth `strength` of the token's logit range less. An unsure output falls back to the
router's own K, as in `mobile`, and with every expert resident both give the same tokens. Lossy: more than `mobile`,
whose little pass has the router's own K/2, and what a confident token costs nobody checks. Training-free. Tokens depend
on what was asked before, on the slots, on the other rows of a batch and, over a real link, on which prefetches of a
fallback had begun.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mobile.policies.big_little import MOBILE
from mobile.policies.cached_choice import Routed
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import BigLittle, CachedBigLittle, CachedRouting, Strategy

KEEP, STRENGTH = 1, 1.0


@dataclass(frozen=True)
class PreferResident:
    """A preference for experts in slots; called, it makes the policy of an engine, which remembers nothing.

    `keep` experts of the highest logit always run; a missing one of the others counts `strength` of the token's logit
    range less, so that 1 puts it behind all that are there.
    """

    keep: int = KEEP
    strength: float = STRENGTH

    def __call__(self, context: PolicyContext) -> PreferResident:
        return self

    def choose(self, routed: Routed) -> Any:
        """Return as many experts as the router chose, of those offered."""
        scores, count = routed.scores, routed.chosen[0].shape[-1]
        never = scores.isinf()
        lowest = scores.masked_fill(never, float("inf")).amin(-1, keepdim=True)
        lowered = scores - self.strength * (scores.amax(-1, keepdim=True) - lowest) * ~routed.resident
        kept = routed.marked(scores.topk(min(self.keep, count)).indices)
        return routed.marked(lowered.masked_fill(kept, float("inf")).topk(count).indices) & ~never


def mobile_cached(
    keep: int = KEEP, strength: float = STRENGTH, *, beyond: bool = False, gamma: float = BigLittle.gamma
) -> Strategy:
    """Return the strategy, whose little pass picks among the router's top K, or `beyond` that among all experts."""
    little = CachedRouting(PreferResident(keep, strength), among="all" if beyond else "top-k")
    return replace(
        MOBILE,
        name="mobile-cached",
        summary="mobile, and of the top K the little pass runs those that are in slots",
        source="this project, after arXiv 2510.12357 and 2412.00099",
        gating=CachedBigLittle(gamma=gamma, little=little),
    )


MOBILE_CACHED = mobile_cached()
