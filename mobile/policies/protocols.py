"""The two questions a strategy answers in its own words: which expert gives way, and which will be needed soon.

Neither needs torch: a live run and a replayed trace ask the same object the same questions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from mobile.costs.geometry import Geometry
from mobile.ledger import Key
from mobile.policies.next_logits import NextLayerLogits
from mobile.slots import SlotPool

Visit = tuple[int, tuple[int, ...]]  # one decode step of one MoE layer: the layer and its active experts, ascending


@dataclass(frozen=True)
class PolicyContext:
    """What a policy knows before it starts: the geometry charged for and the slots there are.

    `future` is every decode visit to come, in order; only a replay can know it. `load_ns` is what one copy takes,
    `layer_ns` what one token's compute of one layer does, all its experts resident.
    `layer_map` names, for each layer of the recorded model, the layers of `geometry` charged with its routing (left
    out: each its own).
    """

    geometry: Geometry
    slots: int
    future: tuple[Visit, ...] | None = None
    load_ns: int = 0
    layer_ns: int = 0
    layer_map: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.layer_map:
            each_its_own = tuple((layer,) for layer in range(self.geometry.moe_layers))
            object.__setattr__(self, "layer_map", each_its_own)


class Eviction(Protocol):
    """Which expert gives way. One object an engine: it may remember what it saw."""

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """A decode step ran these experts of `layer`; called once for every visit."""

    def victim(self, pool: SlotPool, coming: Key, *, protected: bool) -> Key | None:
        """The expert to drop so that `coming` has a slot: ready, unpinned, and in `pool.protected` or not."""
        ...


@runtime_checkable
class BatchEviction(Eviction, Protocol):
    """What an Eviction may be besides: able to name many at once, where that is less work than one by one."""

    def victims(self, pool: SlotPool, coming: Sequence[Key]) -> list[Key]:
        """What `victim(protected=False)` would name for one of `coming` after another, each of them let go at once.

        Fewer than `coming` where there are no more.
        """
        ...


class Lookahead(Protocol):
    """Which experts of later layers will be needed. One object an engine."""

    def routed(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> Sequence[Key]:
        """`layer` was routed to `experts`: the keys to bring in next, the most urgent first; called at every visit.

        `ahead` is what the next layer's router says of this layer's router input (under `Strategy.quasi`, of what
        stands in for it); None where there is no next layer, or the first layers of a dressed model stand for one
        small layer.
        """
        ...


@runtime_checkable
class IdlePrefetcher(Eviction, Protocol):
    """An eviction that also says what an idle link should bring in. Only a policy that knows the future has an answer
    that is better than what a lookahead put in the link's queue before."""

    def idle(self, pool: SlotPool) -> Key | None:
        """The key to load now that no copy is on its way; None: none. If no slot is free, `victim` is asked for one.

        Asked in decode whenever the link falls idle, a layer has run, or a step begins.
        """
        ...


class Placement(Protocol):
    """Where missing experts are computed. One object an engine."""

    def on_cpu(self, layer: int, counts: Sequence[int]) -> Sequence[int]:
        """A step of `layer` misses one expert for each of `counts`, the tokens routed to it: which the CPU computes.

        The answer are positions in `counts`; the device loads and computes the others.
        """
        ...


@runtime_checkable
class PassObserver(Protocol):
    """What an Eviction or a Lookahead may be besides: told of every pass, and of the steps that keep no order."""

    def begin(self, kind: str) -> None:
        """A forward pass begins: "prefill" (with it, a new sequence), "full", "little" or "big"."""

    def streamed(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Prefill, or a step wider than the pool, runs these experts of `layer` for so many tokens each."""


@dataclass(frozen=True)
class Training:
    """What a lookahead took to be fitted: not part of a ledger, which holds no clock but its own.

    `tokens` learnt from last, `fits` made, `seconds` of processor time that they took together, `parameters` of the
    predictor in use (`nbytes` of them), and whether it learnt `online`, during the run, or before it.
    """

    tokens: int
    fits: int
    seconds: float
    parameters: int
    nbytes: int
    online: bool


@runtime_checkable
class Trainable(Protocol):
    """What a Lookahead may be besides: fitted on data. None as long as it is not."""

    @property
    def training(self) -> Training | None: ...


class LeastRecentlyUsed:
    """Evict the least recently used; the pool keeps that order itself."""

    def __init__(self, setting: PolicyContext) -> None:
        """It needs to know nothing."""

    def used(self, layer: int, keys: Sequence[Key]) -> None:
        """The pool has noted it."""

    def victim(self, pool: SlotPool, coming: Key, *, protected: bool) -> Key | None:
        return next(pool.evictable(protected=protected), None)

    def victims(self, pool: SlotPool, coming: Sequence[Key]) -> list[Key]:
        return list(islice(pool.evictable(protected=False), len(coming)))
