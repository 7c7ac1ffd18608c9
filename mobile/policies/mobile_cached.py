"""MoBiLE with a little pass that prefers experts in slots; the confidence test guards that, too (ours).

The little pass runs the K/2 experts of the highest logits, as in `mobile`, but a missing one counts `strength` of the
token's logit range less than one that is in a slot or on its way; the first `keep` run in any case. An unsure output
falls back to the router's own K, and with every expert resident tokens are those of `mobile`. Lossy, more so than
`mobile`: a confident token may have run experts that the router ranked lower. Training-free. Tokens depend on what was
asked before, on the slots, on the other rows of a batch and, over a real link, on which of a fallback's prefetches had
begun when its token ended. The defaults were chosen on items generated for that, none of them a test item.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mobile.policies.big_little import MOBILE
from mobile.policies.cached_choice import Routed
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import BigLittle, CachedBigLittle, CachedRouting, Strategy

KEEP, STRENGTH = 1, 0.1


@dataclass(frozen=True)
class PreferResident:
    """A preference for experts in slots; called, it makes the policy of an engine, which remembers nothing.

    The `keep` experts of the highest logits always run; a missing one of the others counts `strength` of the token's
    logit range less, so that 1 puts it behind all that are there.
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
    keep: int = KEEP, strength: float = STRENGTH, *, beyond: bool = True, gamma: float = BigLittle.gamma
) -> Strategy:
    """Return the strategy, whose little pass picks among all experts, or if not `beyond` among the router's top K."""
    little = CachedRouting(PreferResident(keep, strength), among="all" if beyond else "top-k")
    return replace(
        MOBILE,
        name="mobile-cached",
        summary="mobile, whose little pass prefers experts that are in slots",
        source="this project, after arXiv 2510.12357 and 2412.00099",
        gating=CachedBigLittle(gamma=gamma, little=little),
    )


MOBILE_CACHED = mobile_cached()
