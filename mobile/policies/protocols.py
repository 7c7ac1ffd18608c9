"""Protocols of a strategy's policies: what is evicted, what will be needed, and what the CPU computes.

None needs torch: a live run and a replayed trace ask the same object the same questions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.ledger import Key
from mobile.policies.next_logits import NextLayerLogits
from mobile.slots import SlotPool

Visit = tuple[int, tuple[int, ...]]  # one decode step of one MoE layer: the layer and its active experts, ascending
LayerMap = tuple[tuple[int, ...], ...]  # for each layer of the recorded model, the layers charged with its routing


@dataclass(frozen=True)
class PolicyContext:
    """The facts that a policy is given before it starts: the geometry that is charged and the number of slots.

    `future` is every decode visit to come, in order; only a replay knows it. `load_ns` is the time of one copy,
    `layer_ns` that of one token's compute of one layer, all its experts resident. `layer_map` gives, for each layer of
    the recorded model, the layers of `geometry` that are charged with its routing (empty: each its own).
    """

    geometry: Geometry
    slots: int
    future: tuple[Visit, ...] | None = None
    load_ns: int = 0
    layer_ns: int = 0
    layer_map: LayerMap = ()

    def __post_init__(self) -> None:
        if not self.layer_map:
            each_its_own = tuple((layer,) for layer in range(self.geometry.moe_layers))
            object.__setattr__(self, "layer_map", each_its_own)

    @classmethod
    def of(
        cls, cost: CostModel, slots: int, future: tuple[Visit, ...] | None = None, layer_map: LayerMap = ()
    ) -> PolicyContext:
        """Return the context of a run that is charged by `cost`."""
        top_k, host = cost.geometry.top_k, cost.host
        device_ns = cost.dense_ns(1) + top_k * cost.expert_ns(1)
        layer_ns = max(device_ns, host.dense + top_k * host.expert) + host.read
        return cls(cost.geometry, slots, future, cost.load_ns, layer_ns, layer_map)


class Eviction(Protocol):
    """A policy that decides which expert is evicted. There is one object an engine: it may remember what it saw."""

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Note that a decode step ran these experts of `layer`; called once for every visit."""

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        """Return the expert to evict for `incoming`: ready, unpinned, and in `pool.protected` or not as asked.

        None where there is no such expert.
        """
        ...


@runtime_checkable
class BatchEviction(Eviction, Protocol):
    """An Eviction that can name many experts at once, where that is less work than one by one."""

    def victims(self, pool: SlotPool, incoming: Sequence[Key]) -> list[Key]:
        """Return the experts that `victim(protected=False)` would name for one of `incoming` after another.

        Each is evicted before the next is asked for. Fewer than `incoming` where there are no more.
        """
        ...


class Lookahead(Protocol):
    """A policy that predicts which experts of later layers will be needed. There is one object an engine."""

    def routed(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> Sequence[Key]:
        """Return the keys to prefetch, the most urgent first, now that `layer` was routed to `experts`.

        Called at every decode visit, but for those of a big pass whose experts a fallback has predicted. `ahead` are
        the next layer's router logits on this layer's router input (under `Strategy.quasi`, on the quasi-hidden
        state). It is None where there is no next layer, and at the first of several layers that are charged with one
        recorded layer's routing.
        """
        ...


@runtime_checkable
class IdlePrefetcher(Eviction, Protocol):
    """An Eviction that also decides what an idle link should prefetch.

    Only a policy that knows the future has an answer that is better than what a lookahead asked for before.
    """

    def idle(self, pool: SlotPool) -> Key | None:
        """Return the key to load now that no copy is on its way, or None. If no slot is free, `victim` is asked.

        Called in decode whenever the link becomes idle, a layer has run, or a step begins.
        """
        ...


class Placement(Protocol):
    """A policy that decides where missing experts are computed. There is one object an engine."""

    def on_cpu(self, layer: int, counts: Sequence[int]) -> Sequence[int]:
        """Return the positions in `counts` of the missing experts that the CPU computes; the others are loaded.

        `counts` are the tokens routed to each expert that a step of `layer` misses.
        """
        ...


@runtime_checkable
class PassObserver(Protocol):
    """An Eviction or a Lookahead that also observes every forward pass, and layers that are streamed."""

    def begin(self, kind: str) -> None:
        """Note that a forward pass begins: "prefill" (and with it a new sequence), "full", "little" or "big"."""

    def streamed(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Note that prefill, or a step wider than the pool, runs these experts of `layer` for `counts` tokens each."""


@dataclass(frozen=True)
class Training:
    """A report of how a lookahead was fitted. It is not part of a ledger, which holds virtual time only.

    The last of `fits` used `tokens`; together they took `seconds` of processor time. The predictor in use has
    `parameters`, of `nbytes`, and was fitted `online`, during the run, or before it.
    """

    tokens: int
    fits: int
    seconds: float
    parameters: int
    nbytes: int
    online: bool


@runtime_checkable
class Trainable(Protocol):
    """A Lookahead that is fitted on data."""

    @property
    def training(self) -> Training | None:
        """Return how it was fitted; None as long as it is not."""
        ...


class LeastRecentlyUsed:
    """An Eviction of the least recently used expert; the pool keeps that order itself."""

    def __init__(self, context: PolicyContext) -> None:
        """Take the context that every policy is given; it is not needed."""

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """Do nothing: the pool has noted it."""

    def victim(self, pool: SlotPool, incoming: Key, *, protected: bool) -> Key | None:
        """Return the least recently used expert that may be evicted."""
        return next(pool.evictable(protected=protected), None)

    def victims(self, pool: SlotPool, incoming: Sequence[Key]) -> list[Key]:
        """Return the least recently used experts, as many as `incoming`."""
        return list(islice(pool.evictable(protected=False), len(incoming)))
