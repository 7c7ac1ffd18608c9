"""A faster `Residency` for replays of a trace, in which nothing is computed on the experts. No torch.

It decides the same, at the same times, as `Residency.layer`, and leaves out waves and events. Where events are kept,
everything goes through `Residency.layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from mobile.costs.layer_time import LayerTime, following_ns, loads_in_turn
from mobile.ledger import Key
from mobile.links.virtual import VirtualLink
from mobile.policies.next_logits import NextLayerLogits
from mobile.policies.protocols import LeastRecentlyUsed
from mobile.residency.residency import Predicted, Residency


class FastResidency(Residency):
    """A residency on a virtual link, for replays, which compute nothing on experts."""

    link: VirtualLink

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._expert_ns = self.cost.expert_ns(1)
        only_demands = self.lookahead is None and self._placement is None and self._idle_prefetcher is None
        self._loads_on_demand_only = only_demands and self.strategy.overlap
        self._runs_whole_passes = only_demands and not self.strategy.guess_slots
        self._by_last_use = type(self._eviction) is LeastRecentlyUsed
        self._protects_later: Sequence[Key] = ()  # what a little pass has used
        self._ready_behind = False  # whether `pool.ready` is of before some whole passes
        self._charges: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # see `_charge_of`

    def end_token(self) -> None:
        self._protects_later = ()
        super().end_token()

    def fallback(self, predicted: Predicted, tokens: int = 1) -> None:
        if self._ready_behind:
            self._catch_up()
        self.pool.protected.update(self._protects_later)
        super().fallback(predicted, tokens)

    # --- whole passes -------------------------------------------------------------------------------

    def run_pass(self, visits: Sequence[tuple[int, int, Any]], experts: Sequence[Sequence[int]]) -> bool:
        """Do what `run_layer` does for all layers of a decode pass of one token; return whether that could be done.

        `visits` are (recorded layer, layer, ...) in running order, and `experts` the active ones by recorded layer. It
        can be done where only demand loads use the link and no prediction is pending. Nothing is on its way between two
        layers then, so that all in the pool is ready, and the time of a layer depends on how many experts it misses.
        """
        pool, prefetches, widest = self.pool, self._prefetches, max(map(len, experts))
        if not (self._runs_whole_passes and self.link.idle) or self.ledger.keeps_events or widest > pool.size:
            return False
        if prefetches.predicted or prefetches.pending or pool.unused_prefetches:
            return False
        if self.strategy.retain != "some":
            missing = self._pass_kept_or_not(visits, experts)
        elif self._by_last_use and not pool.protected and (self._kind == "full" or widest * len(visits) <= pool.size):
            missing = self._pass_by_last_use(visits, experts)
        else:
            if self._ready_behind:
                self._catch_up()
            missing = self._pass_by_policy(visits, experts)
        # Charge all layers at once.
        loads, charges = sum(missing), self._charges
        self._charge_dense()
        ns = stalled = dense = following = behind = 0
        widths = [len(experts[mine]) for mine, _, _ in visits]
        for counted in zip(widths, missing, strict=True):
            if counted not in charges:
                charges[counted] = self._charge_of(*counted)
            dense += following  # of this layer, which the one before decides
            taken, stall, behind, following = charges[counted]
            ns += taken
            stalled += stall
        counters = self.ledger.counters
        counters.hits += sum(widths) - loads
        counters.demand_loads += loads
        self._dense_total_ns += dense
        self.link.charge(LayerTime(ns + dense, stalled, behind), loads)
        return True

    def _charge_dense(self) -> None:
        """Charge a layer's dense part, up to its routing."""
        self._dense_total_ns += self.link.compute(self._dense_ns, "dense", self._host.dense)
        self._dense_total_ns += self.link.read_result()

    def _pass_kept_or_not(self, visits: Sequence[tuple[int, int, Any]], experts: Sequence[Sequence[int]]) -> list[int]:
        """Return how many experts each visit misses where all are kept, or none between layers."""
        if self.strategy.retain == "everything":
            return [0] * len(visits)
        return [len(experts[mine]) for mine, _, _ in visits]

    def _pass_by_last_use(self, visits: Sequence[tuple[int, int, Any]], experts: Sequence[Sequence[int]]) -> list[int]:
        """Run each visit from the pool, evicting the least recently used; return how many experts each misses.

        Of a little pass what it has used is protected, and the most recently used: as all of that fits the pool, an
        expert that is neither comes first. It is noted as protected only if a fallback follows.
        """
        pool, all_keys, little = self.pool, self._keys, self._kind == "little"
        slots = pool.slots
        misses: list[int] = []
        kept: list[Key] = []
        for mine, layer, _ in visits:
            # 1. Take this layer's experts out of the order of use.
            key_of = all_keys[layer]
            keys = [key_of[expert] for expert in experts[mine]]
            found = [slots.pop(key, None) for key in keys]
            absent = found.count(None)
            misses.append(absent)
            # 2. Put them at its end, the missing ones into slots that are free, or of those that now come first.
            given = pool.take_free_slots(absent) if absent else []
            given += [slots.pop(victim) for victim in list(islice(slots, absent - len(given)))]
            for key, slot in zip(keys, found, strict=True):
                slots[key] = given.pop() if slot is None else slot
            if little:
                kept += keys
        self._ready_behind, self._protects_later = True, kept
        return misses

    def _catch_up(self) -> None:
        """Note as ready what whole passes left in the pool: all of it."""
        self.pool.ready = set(self.pool.slots)
        self._ready_behind = False

    def _pass_by_policy(self, visits: Sequence[tuple[int, int, Any]], experts: Sequence[Sequence[int]]) -> list[int]:
        """Run each visit from the pool, evicting whatever the policy names; return how many experts each misses."""
        pool, allocator, misses = self.pool, self._allocator, []
        slots, ready = pool.slots, pool.ready
        for mine, layer, _ in visits:
            key_of = self._keys[layer]
            keys = [key_of[expert] for expert in experts[mine]]
            missing = [key for key in keys if key not in ready]
            misses.append(len(missing))
            pool.pinned = set(keys)
            if missing:
                for key in missing[allocator.assign_batch(missing) :]:
                    slots[key] = allocator.allocate(key)
                ready.update(missing)
            self._finish_layer(layer, keys)
        return misses

    def _charge_of(self, experts: int, missing: int) -> tuple[int, int, int, int]:
        """Return the fields of what so many experts of a layer take, and the time of the next layer's dense part."""
        charged = self._loads_in_turn(experts, missing)
        return *charged, following_ns(self._dense_ns, self._host.dense, charged.behind) + self._host.read

    def _loads_in_turn(self, experts: int, missing: int) -> LayerTime:
        """Return what so many experts of a layer take after their routing was read, nothing being on its way."""
        return loads_in_turn(self.cost, experts - missing, missing, overlap=self.strategy.overlap)

    def run_layer(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: NextLayerLogits | None = None
    ) -> None:
        """Do what `layer` does, without its waves. `counts` are the tokens of each expert (empty: one each)."""
        if self._ready_behind:
            self._catch_up()
        # 1. Take the plain path where events are kept, and for the few steps that no fast path covers.
        wide = self._kind == "prefill" or len(experts) > self.pool.size
        if self.ledger.keeps_events or (wide and not self._streams_alone()) or (counts and not wide):
            for _ in self.layer(layer, experts, counts or (1,) * len(experts), ahead):
                pass
            return
        # 2. The steps of `layer`, the experts by the fastest path that gives the same times.
        link = self.link
        self._charge_dense()
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
        link, expert_ns, host_ns, ready = self.link, self._expert_ns, self._host.expert, self.pool.ready
        keys, missing = self._pin_routed(layer, experts)
        incoming, on_cpu = self._request_missing(layer, missing)
        self._prefetch_ahead(layer, experts, ahead)
        ready_count = len(keys) - len(missing)
        if self._idle_prefetcher is not None:  # the host begins copies between them, as others end
            for _ in range(ready_count):
                link.compute(expert_ns, "", host_ns)
        elif ready_count:
            link.compute(expert_ns * ready_count, "", host_ns * ready_count)
        if self.strategy.overlap:
            link.serve(incoming, ready, expert_ns, host_ns)
        else:
            for key in incoming:
                if key not in ready:
                    self._wait_until_ready(key)
                link.compute(expert_ns, key, host_ns)
        self._finish_layer(layer, self._join_cpu(keys, on_cpu))

    def _charge_demand_only(self, layer: int, experts: Sequence[int]) -> None:
        """Do the same where only demand loads use the link, which is idle: copies follow on one another.

        The link charges them all at once, so slots are assigned here and every copy counts as ended.
        """
        pool, allocator = self.pool, self._allocator
        keys, missing = self._pin_routed(layer, experts)
        if missing:
            self.ledger.counters.demand_loads += len(missing)
            for key in missing[allocator.assign_batch(missing) :]:
                pool.slots[key] = allocator.allocate(key)
            pool.ready.update(missing)
        self.link.charge(self._loads_in_turn(len(keys), len(missing)), len(missing))
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
        ns: list[int | None] = [expert_ns(count) for count in (counts or (1,) * len(keys))]
        for position in on_cpu:
            ns[position] = None
        self.link.stream(ns, self._host.expert, absent, self._prefill.max_in_flight)
        # 3. Wait for the CPU.
        if on_cpu:
            self.link.join_cpu(keys[on_cpu[-1]])
