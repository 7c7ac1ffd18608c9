"""Residency: makes each layer's experts ready in slots, in time, under a strategy. No torch.

A live run and a replayed trace drive the same object through the same calls, so they give the same ledger. Slots are
given out by `slot_allocator`, foreseen experts are fetched by `prefetch_queue`, and `prefill` streams a prompt's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import sub
from typing import cast

from mobile.costs.cost_model import CostModel
from mobile.ledger import Key, Ledger
from mobile.links.base import Link
from mobile.policies.next_logits import NextLayerLogits
from mobile.policies.protocols import IdlePrefetcher, Lookahead, PassObserver, PolicyContext, Visit
from mobile.policies.strategy import Strategy
from mobile.residency.prefetch_queue import PrefetchQueue
from mobile.residency.prefill import HOST, PREFILL_BUFFERS, PrefillStream, Wave
from mobile.residency.slot_allocator import SlotAllocator
from mobile.slots import SlotPool

__all__ = ["HOST", "PREFILL_BUFFERS", "Residency", "Wave"]


class Residency:
    """Slots `0 .. size - 1` are the decode pool; `size` and `size + 1` are the staging buffers.

    `emptied(slot)` is told of every slot whose expert was dropped, so that a test can poison it.
    """

    def __init__(
        self,
        strategy: Strategy,
        pool: SlotPool,
        link: Link,
        cost: CostModel,
        ledger: Ledger,
        emptied: Callable[[int], None] | None = None,
        future: tuple[Visit, ...] | None = None,
        layer_map: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.strategy, self.pool, self.link, self.cost, self.ledger = strategy, pool, link, cost, ledger
        layer_ns = cost.dense_ns(1) + cost.geometry.top_k * cost.expert_ns(1)
        setting = PolicyContext(cost.geometry, pool.size, future, cost.load_ns, layer_ns, layer_map)
        self._evict = strategy.evict(setting)
        self.lookahead: Lookahead | None = None
        if strategy.lookahead is strategy.evict:
            self.lookahead = cast(Lookahead, self._evict)
        elif strategy.lookahead is not None:
            self.lookahead = strategy.lookahead(setting)
        self._followers: list[PassObserver] = [self._evict] if isinstance(self._evict, PassObserver) else []
        if self.lookahead is not self._evict and isinstance(self.lookahead, PassObserver):
            self._followers.append(self.lookahead)
        self._planner = self._evict if isinstance(self._evict, IdlePrefetcher) else None
        self._placement = None if strategy.on_cpu is None else strategy.on_cpu(cost)
        self._room = SlotAllocator(strategy, pool, link, ledger, self._evict, emptied)
        self._foresight = PrefetchQueue(self._room, strategy.max_prefetch_per_layer, self._planner)
        self._buffers = PrefillStream(self._room, overlap=strategy.overlap, settles=strategy.retain != "nothing")
        self._keys = [
            [(layer, expert) for expert in range(cost.geometry.experts)] for layer in range(cost.geometry.moe_layers)
        ]
        self._kind = ""
        self._dense_ns = cost.dense_ns(1)
        self._dense_spent = 0  # nanoseconds, as far as the link tells
        self._begun = self._clock()  # when this pass began

    def preload_all(self) -> list[tuple[Key, int]]:
        """Where a strategy that keeps everything has each expert from the start, uncharged; empty for others."""
        if self.strategy.retain != "everything":
            return []
        placed = []
        for key in (key for keys in self._keys for key in keys):
            slot = self.pool.take_free(key)
            assert slot is not None, "a strategy that keeps everything has a slot for each expert"
            self.pool.arrived(key)
            placed.append((key, slot))
        return placed

    # --- one forward pass ---------------------------------------------------------------------------

    def begin(self, kind: str, tokens: int, counted: int | None = None) -> None:
        """A forward pass of `tokens` tokens begins: "prefill", "full", "little" or "big".

        Of a batch only `counted` of them are read or written, the others padding (None: all are).
        """
        if kind != "big":
            self.end_token()
        for follower in self._followers:
            follower.begin(kind)
        self._kind, self._dense_ns = kind, self.cost.dense_ns(tokens)
        self._foresight.idle = kind != "prefill"
        counters = self.ledger.counters
        self._begun = self._clock()
        self._mark(kind)
        if kind == "prefill":
            counters.prompt_tokens += tokens if counted is None else counted
        elif kind != "big":
            counters.tokens += tokens if counted is None else counted
        self._foresight.plan()

    def finish(self) -> None:
        """The pass ends with the output head (and, after a little pass, the confidence test inside it)."""
        self._dense_spent += self.link.compute(self.cost.head_ns(1), "head")
        self._account()

    def abandon(self) -> None:
        """The pass was broken off, perhaps anywhere: settle the clock. What is in the slots is not to be trusted."""
        self._account()

    def fallback(self, predicted: Sequence[Key], tokens: int = 1) -> None:
        """The little pass was unsure of `tokens` tokens: its routers, replayed at K, name what the big pass will need.

        `predicted` is in the order of its layers.
        """
        self.ledger.counters.fallbacks += tokens
        self._begun = self._clock()
        self._mark("fallback")
        self._kind = "big"
        if self.strategy.prefetch_on_fallback:
            self._dense_spent += self.link.compute(self.cost.router_replay_ns, "router replay")
            self._foresight.expect(predicted)
        self._account()

    def _mark(self, what: str) -> None:
        if self.ledger.keeps_events:
            self.ledger.mark(what, self.link.now, self.link.begun)

    def end_token(self) -> None:
        """The token is settled: nothing is protected for it any more, and prefetches not begun are taken back."""
        self._foresight.forget()
        self.pool.protected.clear()

    def _clock(self) -> tuple[int, int, int, int, int]:
        counters = self.ledger.counters
        return self.link.now, counters.bytes_loaded, self._dense_spent, counters.stall_ns, counters.cpu_stall_ns

    def _account(self) -> None:
        clock, counters = self._clock(), self.ledger.counters
        elapsed, moved, dense, stalled, for_cpu = map(sub, clock, self._begun)
        self._begun = clock
        if self._kind == "prefill":
            counters.prefill_ns += elapsed
            return
        counters.decode_ns += elapsed
        counters.decode_bytes += moved
        counters.decode_stall_ns += stalled
        if dense:
            counters.decode_dense_ns += dense
            counters.decode_expert_ns += elapsed - dense - stalled
            counters.decode_cpu_stall_ns += for_cpu

    def arrived(self, key: Key, slot: int) -> None:
        """The link's word that a copy has ended."""
        if slot >= self.pool.size:
            self._buffers.arrived(key, slot)
            return
        self.pool.ready.add(key)
        if self._planner is not None:
            self._foresight.plan()

    # --- one layer ----------------------------------------------------------------------------------

    def layer(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: NextLayerLogits | None = None
    ) -> Iterator[Wave]:
        """Run one MoE layer: yields waves of (position in `experts`, slot), ready until the next wave is asked for.

        `experts` are the active ones, ascending, `counts` the tokens routed to each; `ahead` is a lookahead's signal.
        Residents come first.
        """
        self._dense_spent += self.link.compute(self._dense_ns, "dense")
        if self._kind == "prefill" or len(experts) > self.pool.size:
            yield from self._stream(layer, experts, counts)
        else:
            yield from self._hold(layer, experts, counts, ahead)
        self._foresight.pump()
        self._foresight.plan()

    def _hold(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: NextLayerLogits | None
    ) -> Iterator[Wave]:
        """A decode step whose experts all fit: residents compute while the others come in, then each as it arrives."""
        pool, link, expert_ns = self.pool, self.link, self.cost.expert_ns
        keys, missing = self._route(layer, experts)
        absent = set(missing)
        resident = [position for position, key in enumerate(keys) if key not in absent]
        position_of = {key: position for position, key in enumerate(keys)}
        coming, on_cpu = self._request(layer, missing, [counts[position_of[key]] for key in missing])
        self._look(layer, experts, ahead)
        for position in resident:
            link.compute(expert_ns(counts[position]), keys[position])
        if resident:
            yield [(position, pool.slot(keys[position])) for position in resident]
        for key in on_cpu:
            yield [(position_of[key], HOST)]
        for key in coming:
            if key not in pool.ready:
                self._bring(key)
            link.compute(expert_ns(counts[position_of[key]]), key)
            yield [(position_of[key], pool.slot(key))]
            if not self.strategy.overlap:
                link.join()
        held = self._off_cpu(keys, on_cpu)
        link.used([pool.slot(key) for key in held])
        self._settle(layer, held)

    def _route(self, layer: int, experts: Sequence[int]) -> tuple[list[Key], list[Key]]:
        """The layer is routed: the keys of its experts, pinned until it is done, and those of them that are missing."""
        pool, key_of = self.pool, self._keys[layer]
        keys = [key_of[expert] for expert in experts]
        pool.pinned = set(keys)
        if self._foresight.guessed:
            self._foresight.refute(layer, experts)
        ready = pool.ready
        missing = [key for key in keys if key not in ready]
        self.ledger.counters.hits += len(keys) - len(missing)
        return keys, missing

    def _request(
        self, layer: int, missing: list[Key], counts: Sequence[int] = ()
    ) -> tuple[Sequence[Key], Sequence[Key]]:
        """Of what is missing, what is on its way or to be brought, in this order, and what is the CPU's to compute.

        It is asked for at once, unless loading takes turns with compute. No `counts` are one token each.
        """
        if not missing:
            return (), ()
        pool, counters = self.pool, self.ledger.counters
        late: list[Key] = []
        if len(pool.slots) > len(pool.ready):  # something is on its way
            slots = pool.slots
            late = [key for key in missing if key in slots]
        if late:
            for key in late:
                self.link.promote(key)
            counters.late_prefetches += len(late)
            if counts:
                counts = [count for key, count in zip(missing, counts, strict=True) if key not in slots]
            missing = [key for key in missing if key not in slots]
        on_cpu: Sequence[Key] = ()
        if self._placement is not None and missing:
            on_cpu = self._begin_on_cpu(layer, missing, counts or (1,) * len(missing))
            counters.cpu_experts += len(on_cpu)
            missing = [key for key in missing if key not in on_cpu]
        counters.demand_loads += len(missing)
        if self.strategy.overlap:
            self._room.demand(missing)
        return late + missing if late else missing, on_cpu

    def _look(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> None:
        if self.lookahead is not None:
            self._foresight.look(self.lookahead.routed(layer, experts, ahead))

    def _bring(self, key: Key) -> None:
        """Wait for an expert that is not there, asking for it if nobody has."""
        if key not in self.pool:
            self._room.demand([key])
        self.link.wait(key)

    def _begin_on_cpu(self, layer: int, missing: Sequence[Key], counts: Sequence[int]) -> list[Key]:
        """Give the CPU its share of what is missing; returns that, ascending."""
        assert self._placement is not None
        which = sorted(self._placement.on_cpu(layer, counts))
        for number in which:
            self.link.on_cpu(self.cost.cpu_expert_ns(counts[number]), missing[number])
        return [missing[number] for number in which]

    def _off_cpu(self, keys: list[Key], on_cpu: Sequence[Key]) -> list[Key]:
        """The device waits for what the CPU has not finished; the keys that have a slot."""
        if not on_cpu:
            return keys
        self.link.join_cpu(on_cpu[-1])
        return [key for key in keys if key not in on_cpu]

    def _settle(self, layer: int, keys: list[Key]) -> None:
        """The layer is done: what it used is the most recent, and the strategy may keep it."""
        pool = self.pool
        if pool.unproven:
            used = pool.pinned & pool.unproven
            if used:
                self.ledger.counters.prefetch_useful += len(used)
                pool.unproven -= used
        pool.pinned = frozenset()
        if self.strategy.retain == "nothing":
            for key in keys:
                self._room.drop(key)
            return
        pool.touch(keys)
        self._evict.used(layer, keys)
        if self._kind == "little":
            pool.protected.update(keys)
        elif pool.protected:
            pool.protected.difference_update([key for key in pool.protected if key[0] == layer])
        if self.strategy.guess_slots:
            self._room.clear_staging(layer)

    def _stream(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Iterator[Wave]:
        """A step wider than a decode token.

        A strategy that keeps experts lets missing ones settle in slots that are still free; none is evicted.
        """
        keys, absent, on_cpu = self._route_wide(layer, experts, counts)
        yield from self._buffers.stream(keys, absent, on_cpu, [self.cost.expert_ns(count) for count in counts])
        if on_cpu:
            self.link.join_cpu(keys[on_cpu[-1]])

    def _route_wide(
        self, layer: int, experts: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[Key], list[int], list[int]]:
        """The keys of a wide step, the positions of those to be loaded, and of those that are the CPU's to compute."""
        for follower in self._followers:
            follower.streamed(layer, experts, counts)
        key_of, slots = self._keys[layer], self.pool.slots
        keys = [key_of[expert] for expert in experts]
        absent = [position for position, key in enumerate(keys) if key not in slots]
        if self._placement is None or not absent:
            return keys, absent, []
        told = self._begin_on_cpu(layer, [keys[each] for each in absent], [counts[each] for each in absent])
        self.ledger.counters.streamed_on_cpu += len(told)
        on_cpu = [position for position in absent if keys[position] in told]
        return keys, [position for position in absent if position not in on_cpu], on_cpu
