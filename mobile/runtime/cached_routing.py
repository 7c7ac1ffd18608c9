"""Choices that know the cache, made live: what a policy is shown of a layer's routing, and the weights of its choice.

No configuration is read. The router itself, told to choose more experts, weighs them all up to a factor of the token;
a probe at attach finds out whether that factor is one number (the router's weights are what they are) or whatever makes
the weights of a choice sum to one (the router normalises).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mobile.errors import Refused
from mobile.live_model.compat import MoeLayer
from mobile.policies.cached_choice import Routed
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import BigLittle, CachedRouting, Strategy
from mobile.replay.trace import Kind
from mobile.runtime.forward_pass import ForwardPass, RouterInput, Selection
from mobile.transfer import send

STEPS = 16  # of the weights' dtype: how far a router's weights may be from those it gives when it chooses more


@dataclass(frozen=True)
class RouterFacts:
    """The findings about one layer's router: where ids, weights and scores are among what it gives (`parts`).

    `factor` takes a weight of the wider choice to a weight of its own choice; None where that depends on the token,
    because the weights of a choice always have the same sum.
    """

    parts: tuple[int, int, int]
    factor: float | None


class CachedChoices:
    """The choices of one engine: a policy's, for each decode step of a layer, with the weights that go with them."""

    def __init__(
        self, strategy: Strategy, context: PolicyContext, layers: Sequence[MoeLayer], facts: Sequence[RouterFacts]
    ) -> None:
        """Start a policy that has seen nothing; `facts` are those of `learn`. `kind` is the kind of pass it is for."""
        gating = strategy.cached_routing
        assert gating is not None, "only a strategy that knows the cache has such choices"
        self.kind: Kind = kind_of(strategy)
        self._gating, self._chooser = gating, gating.chooser(context)
        self._layers, self._facts, self._top_k = layers, facts, context.geometry.top_k

    def select(self, layer: int, asked: RouterInput | None, own: Selection, in_slots: Sequence[bool]) -> Selection:
        """Return what runs in place of the router's `own` choice, ids and weights (tokens, k); id `experts`: none.

        `asked` is what the router was given, None only where `learn` did not need it; `in_slots` says of each expert
        whether it is in a slot.
        """
        resident = send(np.array(in_slots), own[0].device)
        if self._gating.among == "chosen":
            routed = Routed(layer, own, None, resident)
            return self._without(own, self._chooser.choose(routed), resident.shape[0])
        assert asked is not None, "the self-test at attach has seen that this router is called"
        return self._among_more(layer, asked, own, resident)

    def _without(self, own: Selection, runs: torch.Tensor, experts: int) -> Selection:
        """Return the router's choice without the experts that do not run."""
        index, weights = own
        kept = runs.gather(1, index)
        left = weights * kept
        if self._gating.keeps_sum:
            left = (left.float() * (weights.float().sum(-1, True) / left.float().sum(-1, True))).to(weights.dtype)
        return index.masked_fill(~kept, experts), torch.where(kept.all(-1, keepdim=True), weights, left)

    def _among_more(self, layer: int, asked: RouterInput, own: Selection, resident: torch.Tensor) -> Selection:
        """Return the policy's choice among the experts that the router offers when it is to choose more."""
        index, weights = own
        experts, facts = resident.shape[0], self._facts[layer]
        # 1. Ask the router for more experts than it chose: their weights, 0 where one is not offered.
        count = experts if self._gating.among == "all" else self._top_k
        offered, wider, scores = self._layers[layer].choice_among(count, facts.parts, *asked)
        every = torch.zeros_like(scores, dtype=torch.float32).scatter_(1, offered, wider.float())
        chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(1, index, True)
        # 2. Let the policy choose. Of equal scores the router's own come first, so that a policy that changes no score
        #    chooses as it did.
        scores = scores.float().masked_fill((every == 0) & ~chosen, -torch.inf)
        highest = scores.masked_fill(chosen, -torch.inf).amax(-1, keepdim=True)
        first = highest.nextafter(torch.full_like(highest, torch.inf))
        scores = torch.where(chosen, scores.maximum(first), scores)
        runs = self._chooser.choose(Routed(layer, own, scores, resident))
        # 3. Weigh its choice, the heaviest first. Where it is the router's own, so are the weights and their order.
        heaviest, ids = every.masked_fill(~runs, 0).topk(index.shape[1], dim=-1)
        total = heaviest.sum(-1, keepdim=True)
        if facts.factor is None or self._gating.keeps_sum:
            total = total.where(total > 0, 1)  # nothing runs: nothing is scaled
            heaviest = heaviest * (weights.float().sum(-1, keepdim=True) / total)
        else:
            heaviest = heaviest * facts.factor
        same = (runs == chosen).all(-1, keepdim=True)
        ids = torch.where(same, index, ids.masked_fill(heaviest == 0, experts))
        return ids, torch.where(same, weights, heaviest.to(weights.dtype))


def kind_of(strategy: Strategy) -> Kind:
    """Return the kind of the passes in which a strategy that knows the cache chooses."""
    return "little" if isinstance(strategy.gating, BigLittle) else "full"


def learn(gating: CachedRouting, layers: Sequence[MoeLayer], running: ForwardPass, top_k: int) -> list[RouterFacts]:
    """Find out, on one pass of tokens under the routers' own choices, how each router weighs a choice that is not its.

    Raise Refused for a router that cannot be asked for more experts than it chooses.
    """
    if gating.among == "chosen":
        return []
    return [
        _learn(gating, layer, running.router_inputs.get(number), running.selections[number], top_k)
        for number, layer in enumerate(layers)
    ]


def _learn(
    gating: CachedRouting, layer: MoeLayer, asked: RouterInput | None, own: Selection, top_k: int
) -> RouterFacts:
    kind, (index, weights) = type(layer.router).__name__, own
    count = layer.count if gating.among == "all" else top_k
    if asked is None or index.shape[-1] >= layer.count:
        raise Refused(
            f"{kind} leaves no expert to choose in place of its own; use a strategy that leaves it the choice."
        )
    parts = layer.parts_of_output(*asked)
    offered, wider, scores = layer.choice_among(count, parts, *asked)
    if offered.shape != (len(index), count):
        raise Refused(f"{kind} does not choose {count} experts when it is told to; use another strategy.")
    # 1. Its own weights are those of the wider choice, times one factor for each token.
    every = torch.zeros_like(scores, dtype=torch.float32).scatter_(1, offered, wider.float())
    same, mine = every.gather(1, index), weights.float()
    sums, totals = mine.sum(-1), same.sum(-1)
    factors = sums / totals
    step = STEPS * torch.finfo(weights.dtype).eps
    if not bool(((same * factors[:, None] - mine).abs() <= step * mine.abs().amax(-1, keepdim=True)).all()):
        raise Refused(f"{kind} weighs the experts it chooses by how many they are, so no other can take their place.")
    # 2. Its choice has the highest scores, where more than its own choice at K is offered.
    chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(1, index, True)
    lowest = scores.masked_fill(~chosen, torch.inf).amin(-1)
    if gating.among == "all" and bool((scores.masked_fill(chosen | (every == 0), -torch.inf).amax(-1) > lowest).any()):
        raise Refused(
            f"{kind} chooses by other scores than it shows (a correction, or groups of experts), so none can be "
            "ranked past its own choice; use another strategy."
        )
    # 3. Either the factor is one number for all tokens, or the sum of the weights is.
    constant = _spread(factors) <= _spread(sums)
    if min(_spread(factors), _spread(sums)) > step:
        raise Refused(f"{kind} weighs its choice in a way this version does not know, so no other can take its place.")
    return RouterFacts(parts, float(factors.mean()) if constant else None)


def _spread(values: torch.Tensor) -> float:
    """Return how far values lie apart, relative to their mean."""
    return float((values.amax() - values.amin()) / values.mean())
