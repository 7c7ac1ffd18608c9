"""A faster `Residency` for replays of a trace, in which nothing is computed on the experts. No torch.

It decides the same, at the same times, as `Residency.layer`, and leaves out waves and events. Where events are kept,
everything goes through `Residency.layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mobile.links.virtual import VirtualLink
from mobile.policies.next_logits import NextLayerLogits
from mobile.residency.residency import Residency


class FastResidency(Residency):
    """A residency on a virtual link, for replays, which compute nothing on experts."""

    link: VirtualLink

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._expert_ns = self.cost.expert_ns(1)
        self._loads_on_demand_only = (
            self.lookahead is None
            and self._placement is None
            and self._idle_prefetcher is None
            and self.strategy.overlap
        )

    def run_layer(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: NextLayerLogits | None = None
    ) -> None:
        """Do what `layer` does, without its waves. `counts` are the tokens of each expert (empty: one each)."""
        # 1. Take the plain path where events are kept, and for the few steps that no fast path covers.
        wide = self._kind == "prefill" or len(experts) > self.pool.size
        if self.ledger.keeps_events or (wide and not self._streams_alone()) or (counts and not wide):
            for _ in self.layer(layer, experts, counts or (1,) * len(experts), ahead):
                pass
            return
        # 2. The steps of `layer`, the experts by the fastest path that gives the same times.
        link = self.link
        self._dense_total_ns += link.compute(self._dense_ns, "dense")
        if wide:
            self._charge_stream(layer, experts, counts)
        elif self._loads_on_demand_only and link.idle:
            self._charge_demand_only(layer, experts)
        else:
            self._charge_from_pool(layer, experts, ahead)
        if self._prefetches.pending:
            self._prefetches.submit_pending()
        if self._idle_prefetcher is not None:
            self._prefetches.prefetch_if_idle()

    def _charge_from_pool(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> None:
        """Do what `_run_from_pool` does for one token, the ready experts' compute in one piece."""
        link, expert_ns, ready = self.link, self._expert_ns, self.pool.ready
        keys, missing = self._pin_routed(layer, experts)
        incoming, on_cpu = self._request_missing(layer, missing)
        self._prefetch_ahead(layer, experts, ahead)
        ready_count = len(keys) - len(missing)
        if ready_count:
            link.compute(expert_ns * ready_count, "")
        if self.strategy.overlap:
            link.serve(incoming, ready, expert_ns)
        else:
            for key in incoming:
                if key not in ready:
                    self._wait_until_ready(key)
                link.compute(expert_ns, key)
        self._finish_layer(layer, self._join_cpu(keys, on_cpu))

    def _charge_demand_only(self, layer: int, experts: Sequence[int]) -> None:
        """Do the same where only demand loads use the link, which is idle: copies follow on one another.

        The link charges them all at once, so slots are assigned here and every copy counts as ended.
        """
        pool, allocator = self.pool, self._allocator
        keys, missing = self._pin_routed(layer, experts)
        if not missing:
            self.link.compute(self._expert_ns * len(keys), "")
        else:
            self.ledger.counters.demand_loads += len(missing)
            for key in missing[allocator.assign_batch(missing) :]:
                pool.slots[key] = allocator.allocate(key)
            self.link.load_in_turn(len(missing), self._expert_ns * (len(keys) - len(missing)), self._expert_ns)
            pool.ready.update(missing)
        self._finish_layer(layer, keys)

    def _streams_alone(self) -> bool:
        """Return whether this is a prefill and nothing but it uses the link."""
        return self._kind == "prefill" and self.link.idle

    def _charge_stream(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Do what `_stream_layer` does where nothing else uses the link: copies follow on one another."""
        pool, expert_ns = self.pool, self.cost.expert_ns
        # 1. Find what is copied and what the CPU computes; missing experts fill the free slots, and stay.
        keys, absent, on_cpu = self._plan_stream(layer, experts, counts)
        self.ledger.counters.streamed_loads += len(absent)
        if self.strategy.retain != "nothing" and absent:
            missing = [keys[position] for position in absent]
            pool.ready.update(missing[: pool.take_free_for(missing)])
        # 2. Charge the device's compute, expert by expert, and the copies beside it.
        ns = [expert_ns(count) for count in (counts or (1,) * len(keys))]
        for position in on_cpu:
            ns[position] = 0
        self.link.stream(ns, absent, self._prefill.max_in_flight)
        # 3. Wait for the CPU.
        if on_cpu:
            self.link.join_cpu(keys[on_cpu[-1]])
