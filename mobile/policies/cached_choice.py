"""Choices that know the cache: the protocol of a policy that chooses experts by what is in slots, and what it is given.

No torch: tensors are used through their own methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

Chosen = tuple[Any, Any]  # expert ids and weights, (tokens, K) each


@dataclass(frozen=True)
class Routed:
    """One layer's routing of a decode step, before any of its loads is submitted.

    - `chosen`: the router's own choice in this pass, (expert ids, weights), (tokens, k) each; k is K, or K/2 in a
      little pass.
    - `scores` (tokens, experts), float32: the router's logits; -inf where an expert must not be chosen. The router's
      own choice always has the k highest.
    - `resident` (experts,), bool: which experts are in slots, or on their way into one.
    """

    layer: int
    chosen: Chosen
    scores: Any
    resident: Any

    def marked(self, ids: Any, where: Any = None) -> Any:
        """Return which experts of each token are among `ids` (tokens, n), where `where` (tokens, n) holds if given.

        (tokens, experts), bool.
        """
        count = ids.new_ones(ids.shape) if where is None else where.to(ids.dtype)
        return ids.new_zeros(ids.shape[0], self.resident.shape[0]).scatter_add(1, ids, count) > 0


class Chooser(Protocol):
    """A policy that chooses the experts of decode tokens. There is one object an engine: it may remember what it saw.

    `Routed.scores` is None where the gating offers the router's own choice alone.
    """

    def choose(self, routed: Routed) -> Any:
        """Return which experts each token runs: at most k of those offered, (tokens, experts), bool."""
        ...
