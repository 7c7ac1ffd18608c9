"""Residency where nobody computes on the experts: what a replay of a trace does at each layer. No torch.

What is decided, and when, is the same as in `Residency.layer`; only what nobody looks at is left out. Where events are
kept everything goes through there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mobile.links.virtual import VirtualLink
from mobile.policies.next_logits import NextLayerLogits
from mobile.residency.residency import Residency


class FastResidency(Residency):
    """A residency on a virtual link."""

    link: VirtualLink

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._each = self.cost.expert_ns(1)
        self._undisturbed = self.lookahead is None and self._placement is None and self._planner is None
        self._undisturbed = self._undisturbed and self.strategy.overlap

    def run_layer(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: NextLayerLogits | None = None
    ) -> None:
        """As `layer`, with nobody to compute on the waves. No `counts` are one token each."""
        wide = self._kind == "prefill" or len(experts) > self.pool.size
        if self.ledger.keeps_events or (wide and not self._streams_undisturbed()) or (counts and not wide):
            for _ in self.layer(layer, experts, counts or (1,) * len(experts), ahead):
                pass
            return
        link = self.link
        self._dense_spent += link.compute(self._dense_ns, "dense")
        if wide:
            self._run_wide(layer, experts, counts)
        elif self._undisturbed and link.idle:
            self._run_undisturbed(layer, experts)
        else:
            self._run(layer, experts, ahead)
        if self._foresight.wanted:
            self._foresight.pump()
        if self._planner is not None:
            self._foresight.plan()

    def _run(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> None:
        """A decode step, all residents one charge."""
        link, each, ready = self.link, self._each, self.pool.ready
        keys, missing = self._route(layer, experts)
        coming, on_cpu = self._request(layer, missing)
        self._look(layer, experts, ahead)
        resident = len(keys) - len(missing)
        if resident:
            link.compute(each * resident, "")
        if self.strategy.overlap:
            link.serve(coming, ready, each)
        else:
            for key in coming:
                if key not in ready:
                    self._bring(key)
                link.compute(each, key)
        self._settle(layer, self._off_cpu(keys, on_cpu))

    def _run_undisturbed(self, layer: int, experts: Sequence[int]) -> None:
        """A decode step during which nothing but what it misses is asked for: its copies follow on one another."""
        pool, room = self.pool, self._room
        keys, missing = self._route(layer, experts)
        if not missing:
            self.link.compute(self._each * len(keys), "")
        else:
            self.ledger.counters.demand_loads += len(missing)
            for key in missing[room.give(missing) :]:
                pool.slots[key] = room.slot_for(key)
            self.link.load_in_turn(len(missing), self._each * (len(keys) - len(missing)), self._each)
            pool.ready.update(missing)
        self._settle(layer, keys)

    def _streams_undisturbed(self) -> bool:
        return self._kind == "prefill" and self.link.idle

    def _run_wide(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Prefill: nothing else is asked for meanwhile, so the experts to load follow on one another."""
        pool, expert_ns = self.pool, self.cost.expert_ns
        keys, absent, on_cpu = self._route_wide(layer, experts, counts)
        self.ledger.counters.streamed_loads += len(absent)
        if self.strategy.retain != "nothing" and absent:
            missing = [keys[position] for position in absent]
            pool.ready.update(missing[: pool.take_free_for(missing)])
        ns = [expert_ns(count) for count in (counts or (1,) * len(keys))]
        for position in on_cpu:
            ns[position] = 0
        self.link.stream(ns, absent, self._buffers.ahead)
        if on_cpu:
            self.link.join_cpu(keys[on_cpu[-1]])
