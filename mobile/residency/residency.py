"""Residency: makes each layer's experts ready in slots, in time, under a strategy. No torch.

A live run and a replayed trace make the same calls, so they give the same ledger. `slot_allocator` assigns slots and
evicts, `prefetch_queue` holds what is predicted, `prefill` streams a prompt's experts; the link copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import sub
from typing import cast

from mobile.costs.cost_model import CostModel
from mobile.ledger import Key, Ledger
from mobile.links.base import Link
from mobile.policies.next_logits import NextLayerLogits
from mobile.policies.protocols import IdlePrefetcher, Lookahead, PassObserver, PolicyContext
from mobile.policies.strategy import BigLittle, Strategy
from mobile.residency.prefetch_queue import PrefetchQueue
from mobile.residency.prefill import HOST, PREFILL_BUFFERS, PrefillStream, Wave
from mobile.residency.slot_allocator import SlotAllocator
from mobile.slots import SlotPool

__all__ = ["HOST", "PREFILL_BUFFERS", "Residency", "Wave"]

Predicted = Sequence[Key] | Callable[[], Sequence[Key]]  # what a fallback will need, or what names it once it has begun


class Residency:
    """The experts of one engine: which are in slots, which are on their way, and what the running pass still needs.

    Slots `0 .. size - 1` are the decode pool; `size` and `size + 1` are the prefill buffers. `on_emptied(slot)` is
    called for every slot whose expert was dropped, so that a test can poison it.
    """

    def __init__(
        self,
        strategy: Strategy,
        context: PolicyContext,
        link: Link,
        cost: CostModel,
        ledger: Ledger,
        on_emptied: Callable[[int], None] | None = None,
    ) -> None:
        self.strategy, self.link, self.cost, self.ledger = strategy, link, cost, ledger
        self.pool = SlotPool(context.slots)
        # The policies. One object answers for both where eviction and lookahead are one callable.
        self._eviction = strategy.evict(context)
        self.lookahead: Lookahead | None = None
        if strategy.lookahead is strategy.evict:
            self.lookahead = cast(Lookahead, self._eviction)
        elif strategy.lookahead is not None:
            self.lookahead = strategy.lookahead(context)
        self._observers: list[PassObserver] = [self._eviction] if isinstance(self._eviction, PassObserver) else []
        if self.lookahead is not self._eviction and isinstance(self.lookahead, PassObserver):
            self._observers.append(self.lookahead)
        self._idle_prefetcher = self._eviction if isinstance(self._eviction, IdlePrefetcher) else None
        self._placement = None if strategy.on_cpu is None else strategy.on_cpu(cost)
        gating = strategy.gating
        self._replays_routers = isinstance(gating, BigLittle) and gating.replays_routers
        # The parts that act on them.
        self._allocator = SlotAllocator(strategy, self.pool, link, ledger, self._eviction, on_emptied)
        self._prefetches = PrefetchQueue(self._allocator, strategy.max_prefetch_per_layer, self._idle_prefetcher)
        self._prefill = PrefillStream(
            self._allocator, overlap=strategy.overlap, fill_free_slots=strategy.retain != "nothing"
        )
        self._keys = [
            [(layer, expert) for expert in range(cost.geometry.experts)] for layer in range(cost.geometry.moe_layers)
        ]
        # The running pass.
        self._kind = ""
        self._dense_ns, self._host = cost.dense_ns(1), cost.host
        self._dense_total_ns = 0  # as far as the link tells
        self._pass_start = self._read_clock()
        # A device that computes behind the host ends a step later than the host does. The time between is counted when
        # it is known, see `settle`.
        self._finished = self._unsettled = False

    def preload_all(self) -> list[tuple[Key, int]]:
        """Assign every expert a slot at no cost and return (key, slot) of each; empty unless the strategy keeps all."""
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
        """Begin a forward pass of `tokens` tokens: "prefill", "full", "little" or "big".

        Of a batch, only `counted` of them are read or written; the others are padding (None: none is).
        """
        if kind != "big":
            self.end_token()
        for observer in self._observers:
            observer.begin(kind)
        self._begin_clock(same_step=kind == "big")
        self._kind, self._dense_ns = kind, self.cost.dense_ns(tokens)
        self._prefetches.allow_idle = kind != "prefill"
        counters = self.ledger.counters
        self._mark(kind)
        if kind == "prefill":
            counters.prompt_tokens += tokens if counted is None else counted
        elif kind != "big":
            counters.tokens += tokens if counted is None else counted
        self._prefetches.prefetch_if_idle()

    def finish(self) -> None:
        """End the pass with the output head (and, after a little pass, the confidence test inside it).

        A signal that asks the routers again does so here.
        """
        cost, host = self.cost, self._host
        self._dense_total_ns += self.link.compute(cost.head_ns(1), "head", host.head)
        if self._replays_routers and self._kind == "little":
            self._dense_total_ns += self.link.compute(cost.router_replay_ns, "router replay", host.router_replay)
        self._dense_total_ns += self.link.read_result()  # the token, or how sure it is
        self._add_elapsed()
        self._finished = True

    def end_step(self) -> None:
        """Note that all of a step was launched: its passes, the confidence test, and what chooses between them."""
        if self.link.runs_behind and self._finished:
            self.link.launched()
            self._unsettled = True
        self._finished = False

    def settle(self, begun: int | None = None) -> None:
        """Count the time from where the host was done with the last step to where the device was.

        Pauses are not counted: on a device the end is that of the last work launched, an event that is read when the
        next pass begins (`begun`), without waiting, or when statistics are asked for.
        """
        if not self._unsettled:
            return
        self._unsettled = False
        done = self.link.done_at(wait=begun is None)
        ended = [at for at in (done, begun) if at is not None]
        if min(ended) > self._pass_start[0]:
            self._add_elapsed(min(ended))

    def _begin_clock(self, *, same_step: bool) -> None:
        """Begin to count the time of a pass; on a device behind the host a step's passes leave none between them."""
        if not self.link.runs_behind:
            self._pass_start = self._read_clock()
        elif not same_step:
            self.settle(self.link.now)
            self._pass_start = self._read_clock()

    def abandon(self) -> None:
        """End a pass that was interrupted, perhaps anywhere: count its time. The slots are not valid any more."""
        self._add_elapsed()

    def fallback(self, predicted: Predicted, tokens: int = 1) -> None:
        """Prepare the big pass of `tokens` tokens that the little pass was unsure of, prefetching what it will need.

        `predicted` are the keys that the little pass's routers name at K, in the order of their layers; a function that
        asks them is called within the fallback, which its time belongs to.
        """
        self.ledger.counters.fallbacks += tokens
        self._begin_clock(same_step=True)
        self._mark("fallback")
        self._kind = "big"
        if callable(predicted):
            predicted = predicted()
        if self.strategy.prefetch_on_fallback:
            if not self._replays_routers:  # else the signal has asked them
                cost, host = self.cost, self._host
                self._dense_total_ns += self.link.compute(cost.router_replay_ns, "router replay", host.router_replay)
            self._dense_total_ns += self.link.read_result()  # what they named
            self._prefetches.extend(predicted)
        self._add_elapsed()

    def _mark(self, what: str) -> None:
        """Append a mark to the ledger, if it keeps events."""
        if self.ledger.keeps_events:
            self.ledger.mark(what, self.link.now, self.link.begun)

    def end_token(self) -> None:
        """End the token: unprotect what it needed, and cancel prefetches whose copies have not begun."""
        self._prefetches.clear()
        self.pool.protected.clear()

    def _read_clock(self) -> tuple[int, int, int, int, int]:
        """Return the time, bytes loaded, and nanoseconds of dense compute, of stall, and of stall for the CPU."""
        counters = self.ledger.counters
        return self.link.now, counters.bytes_loaded, self._dense_total_ns, counters.stall_ns, counters.cpu_stall_ns

    def _add_elapsed(self, until: int | None = None) -> None:
        """Add what the pass took since `_pass_start`, up to now or the time `until`, to the counters of its kind."""
        clock, counters = self._read_clock(), self.ledger.counters
        if until is not None:
            clock = (until, *clock[1:])
        elapsed, moved, dense, stalled, for_cpu = map(sub, clock, self._pass_start)
        self._pass_start = clock
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
        """Mark an expert as ready: the link calls this when its copy has ended."""
        if slot >= self.pool.size:
            self._prefill.arrived(key, slot)
            return
        self.pool.ready.add(key)
        if self._idle_prefetcher is not None:
            self._prefetches.prefetch_if_idle()

    @property
    def asks_lookahead(self) -> bool:
        """Whether the running pass asks the lookahead at every layer that runs from the pool."""
        return self.lookahead is not None and not self._prefetches.holds_fallback

    def in_slots(self, layers: Sequence[int]) -> list[bool]:
        """Return for each expert number whether all of `layers` have it in the decode pool, or on its way there.

        An expert on its way counts: its bytes are paid for, and no choice then depends on when one copy ends.
        """
        slots = self.pool.slots
        return [all(key in slots for key in keys) for keys in zip(*(self._keys[each] for each in layers), strict=True)]

    # --- one layer ----------------------------------------------------------------------------------

    def layer(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: NextLayerLogits | None = None
    ) -> Iterator[Wave]:
        """Run one MoE layer: yield waves of (position in `experts`, slot), ready until the next wave is asked for.

        `experts` are the active ones, ascending, `counts` the tokens routed to each; `ahead` is a lookahead's signal.
        Experts that are ready come first.
        """
        # 1. Attention, norms, router and shared experts, which are always on the device.
        self._dense_total_ns += self.link.compute(self._dense_ns, "dense", self._host.dense)
        self._dense_total_ns += self.link.read_result()  # the routing
        # 2. The routed experts: through the prefill buffers, or from the decode pool where all fit into it.
        if self._kind == "prefill" or len(experts) > self.pool.size:
            yield from self._stream_layer(layer, experts, counts)
        else:
            yield from self._run_from_pool(layer, experts, counts, ahead)
        # 3. Slots may have become evictable: submit prefetches that waited for one.
        self._prefetches.submit_pending()
        self._prefetches.prefetch_if_idle()

    def _run_from_pool(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: NextLayerLogits | None
    ) -> Iterator[Wave]:
        """Run a decode step whose experts all fit: the ready ones while the others are copied, then each of those."""
        pool, link, expert_ns, host_ns = self.pool, self.link, self.cost.expert_ns, self._host.expert
        # 1. Pin this layer's experts and submit copies of the missing ones, then predict the next layers'.
        keys, missing = self._pin_routed(layer, experts)
        absent = set(missing)
        ready = [position for position, key in enumerate(keys) if key not in absent]
        position_of = {key: position for position, key in enumerate(keys)}
        incoming, on_cpu = self._request_missing(layer, missing, [counts[position_of[key]] for key in missing])
        self._prefetch_ahead(layer, experts, ahead)
        # 2. Compute on the ready experts in one wave.
        for position in ready:
            link.compute(expert_ns(counts[position]), keys[position], host_ns)
        if ready:
            yield [(position, pool.slot(keys[position])) for position in ready]
        # 3. Compute on the others one by one: on the CPU, or on the device as soon as their copies have ended.
        for key in on_cpu:
            yield [(position_of[key], HOST)]
        for key in incoming:
            if key not in pool.ready:
                self._wait_until_ready(key)
            link.compute(expert_ns(counts[position_of[key]]), key, host_ns)
            yield [(position_of[key], pool.slot(key))]
            if not self.strategy.overlap:
                link.join()
        # 4. Unpin them all, and keep or drop them.
        in_slots = self._join_cpu(keys, on_cpu)
        link.used([pool.slot(key) for key in in_slots])
        self._finish_layer(layer, in_slots)

    def _pin_routed(self, layer: int, experts: Sequence[int]) -> tuple[list[Key], list[Key]]:
        """Pin the experts of a layer until it is done; return their keys, and those of them that are not ready."""
        pool, key_of = self.pool, self._keys[layer]
        keys = [key_of[expert] for expert in experts]
        pool.pinned = set(keys)
        if self._prefetches.predicted:
            self._prefetches.resolve(layer, experts)
        ready = pool.ready
        missing = [key for key in keys if key not in ready]
        self.ledger.counters.hits += len(keys) - len(missing)
        return keys, missing

    def _request_missing(
        self, layer: int, missing: list[Key], counts: Sequence[int] = ()
    ) -> tuple[Sequence[Key], Sequence[Key]]:
        """Have missing experts copied, or computed on the CPU; return the keys of the one kind and of the other.

        Copies are submitted at once, unless the strategy loads without overlap. Those that are on their way come
        first. `counts` are the tokens of each missing expert (empty: one each).
        """
        if not missing:
            return (), ()
        pool, counters = self.pool, self.ledger.counters
        # 1. Late prefetches: on their way already, they now go with the demand loads.
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
        # 2. Those that the placement computes on the CPU.
        on_cpu: Sequence[Key] = ()
        if self._placement is not None and missing:
            on_cpu = self._submit_to_cpu(layer, missing, counts or (1,) * len(missing))
            counters.cpu_experts += len(on_cpu)
            missing = [key for key in missing if key not in on_cpu]
        # 3. The rest are demand loads.
        counters.demand_loads += len(missing)
        if self.strategy.overlap:
            self._allocator.demand_load(missing)
        return late + missing if late else missing, on_cpu

    def _prefetch_ahead(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> None:
        """Ask the lookahead, if there is one, what comes next, and prefetch that.

        It is not asked in a big pass whose experts the little pass's routers have named, which it could only push out.
        """
        if self.lookahead is not None and not self._prefetches.holds_fallback:
            self._prefetches.replace(self.lookahead.routed(layer, experts, ahead))

    def _wait_until_ready(self, key: Key) -> None:
        """Wait for an expert that is not ready, loading it unless its copy is on its way."""
        if key not in self.pool:
            self._allocator.demand_load([key])
        self.link.wait(key)

    def _submit_to_cpu(self, layer: int, missing: Sequence[Key], counts: Sequence[int]) -> list[Key]:
        """Have the CPU compute those of `missing` that the placement names; return their keys, ascending."""
        assert self._placement is not None
        chosen = sorted(self._placement.on_cpu(layer, counts))
        for number in chosen:
            self.link.on_cpu(self.cost.cpu_expert_ns(counts[number]), missing[number])
        return [missing[number] for number in chosen]

    def _join_cpu(self, keys: list[Key], on_cpu: Sequence[Key]) -> list[Key]:
        """Wait until the CPU has computed its experts; return the keys of the others, which have a slot."""
        if not on_cpu:
            return keys
        self.link.join_cpu(on_cpu[-1])
        return [key for key in keys if key not in on_cpu]

    def _finish_layer(self, layer: int, keys: list[Key]) -> None:
        """Unpin the experts of a layer that is done; make them the most recently used, or drop them."""
        pool = self.pool
        if pool.unused_prefetches:
            used = pool.pinned & pool.unused_prefetches
            if used:
                self.ledger.counters.prefetch_useful += len(used)
                pool.unused_prefetches -= used
        pool.pinned = frozenset()
        if self.strategy.retain == "nothing":
            for key in keys:
                self._allocator.release(key)
            return
        pool.touch(keys)
        self._eviction.used(layer, keys)
        if self._kind == "little":  # the big pass may need them again
            pool.protected.update(keys)
        elif pool.protected:
            pool.protected.difference_update([key for key in pool.protected if key[0] == layer])
        if self.strategy.guess_slots:
            self._allocator.clear_guess_slots(layer)

    def _stream_layer(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Iterator[Wave]:
        """Run a prompt's layer, or a step wider than the pool, through the prefill buffers; evict nothing."""
        keys, absent, on_cpu = self._plan_stream(layer, experts, counts)
        ns = [self.cost.expert_ns(count) for count in counts]
        if all(key in self.pool.ready for key in keys):
            yield from self._run_ready(keys, ns)
            return
        yield from self._prefill.stream(keys, absent, on_cpu, ns, self._host.expert)
        if on_cpu:
            self.link.join_cpu(keys[on_cpu[-1]])

    def _run_ready(self, keys: Sequence[Key], ns: Sequence[int]) -> Iterator[Wave]:
        """Run a streamed layer whose experts are all in the pool in one wave, at the times that `stream` has."""
        slots = [self.pool.slot(key) for key in keys]
        for key, each_ns in zip(keys, ns, strict=True):
            self.link.compute(each_ns, key, self._host.expert)
        yield list(enumerate(slots))
        self.link.used(slots)
        if not self.strategy.overlap:
            self.link.join()

    def _plan_stream(
        self, layer: int, experts: Sequence[int], counts: Sequence[int]
    ) -> tuple[list[Key], list[int], list[int]]:
        """Return the keys of a step to be streamed, and the positions of those to be copied and of the CPU's."""
        for observer in self._observers:
            observer.streamed(layer, experts, counts)
        key_of, slots = self._keys[layer], self.pool.slots
        keys = [key_of[expert] for expert in experts]
        absent = [position for position, key in enumerate(keys) if key not in slots]
        if self._placement is None or not absent:
            return keys, absent, []
        submitted = self._submit_to_cpu(layer, [keys[each] for each in absent], [counts[each] for each in absent])
        self.ledger.counters.streamed_on_cpu += len(submitted)
        on_cpu = [position for position in absent if keys[position] in submitted]
        return keys, [position for position in absent if position not in on_cpu], on_cpu
