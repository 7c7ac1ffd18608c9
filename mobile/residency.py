"""Residency: makes each layer's experts ready in slots, in time, under a strategy. No torch.

A live run and a replayed trace drive the same object through the same calls, so they give the same ledger.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import numpy as np

from mobile.cost import CostModel
from mobile.ledger import Key, Ledger
from mobile.link import Link
from mobile.policy import Follower, Lookahead, Planner, Setting, Visit
from mobile.pool import SlotPool
from mobile.strategy import Strategy

Wave = list[tuple[int, int]]  # (position among the active experts, slot, or HOST: its row is computed where it lies)
HOST = -1
STAGING = 2  # buffers that prefill, and any step wider than the pool, streams through


class Residency:
    """Slots `0 .. size - 1` are the decode pool; `size` and `size + 1` are the staging buffers.

    `emptied(slot)` is told of every slot whose expert was dropped, so that a test can poison it.
    """

    def __init__(
        self, strategy: Strategy, pool: SlotPool, link: Link, cost: CostModel, ledger: Ledger,
        emptied: Callable[[int], None] | None = None, future: tuple[Visit, ...] | None = None,
        stands_for: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:  # fmt: skip
        self.strategy, self.pool, self.link, self.cost, self.ledger = strategy, pool, link, cost, ledger
        layer_ns = cost.dense_ns(1) + cost.geometry.top_k * cost.expert_ns(1)
        setting = Setting(cost.geometry, pool.size, future, cost.load_ns, layer_ns, stands_for)
        self._evict = strategy.evict(setting)
        self._planner = self._evict if isinstance(self._evict, Planner) else None
        self._lookahead: Lookahead | None = None
        if strategy.lookahead is strategy.evict:
            self._lookahead = cast(Lookahead, self._evict)
        elif strategy.lookahead is not None:
            self._lookahead = strategy.lookahead(setting)
        self._followers: list[Follower] = [self._evict] if isinstance(self._evict, Follower) else []
        if self._lookahead is not self._evict and isinstance(self._lookahead, Follower):
            self._followers.append(self._lookahead)
        self._placement = None if strategy.on_cpu is None else strategy.on_cpu(cost)
        self._for_proven = pool.size - strategy.staging  # slots that experts in use may take
        self._guessed: dict[int, set[int]] = {}  # by layer, what was foreseen of its next visit
        self._emptied = emptied
        self._keys = [[(layer, expert) for expert in range(cost.geometry.experts)]
                      for layer in range(cost.geometry.moe_layers)]  # fmt: skip
        self._kind = ""
        self._dense_ns = cost.dense_ns(1)
        self._begun = (0, 0, 0)  # clock, bytes and stall when this pass began
        self._landed: dict[int, Key] = {}  # what each staging buffer holds
        self._wanted: deque[Key] = deque()  # predicted by a fallback, not yet given a slot

    def preload_all(self) -> list[tuple[Key, int]]:
        """Where a strategy that keeps everything has each expert from the start, uncharged; empty for others."""
        if self.strategy.retain != "everything":
            return []
        geometry, placed = self.cost.geometry, []
        for key in ((layer, expert) for layer in range(geometry.moe_layers) for expert in range(geometry.experts)):
            slot = self.pool.take_free(key)
            assert slot is not None, "a strategy that keeps everything has a slot for each expert"
            self.pool.arrived(key)
            placed.append((key, slot))
        return placed

    # --- one forward pass ---------------------------------------------------------------------------

    def begin(self, kind: str, tokens: int) -> None:
        """A forward pass of `tokens` tokens begins: "prefill", "full", "little" or "big"."""
        if kind != "big":
            self.end_token()
        for follower in self._followers:
            follower.begin(kind)
        self._kind, self._dense_ns = kind, self.cost.dense_ns(tokens)
        counters = self.ledger.counters
        self._begun = self._clock()
        if kind == "prefill":
            counters.prompt_tokens += tokens
        elif kind != "big":
            counters.tokens += tokens
        self._plan()

    def finish(self) -> None:
        """The pass ends with the output head (and, after a little pass, the confidence test inside it)."""
        self.link.compute(self.cost.head_ns(1), "head")
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
        self._kind = "big"
        if self.strategy.prefetch:
            self.link.compute(self.cost.router_replay_ns, "router replay")
            self._foresee(predicted)
            self._wanted.extend(key for key in predicted if key not in self.pool)
            self.pool.protected.update(key for key in predicted if key in self.pool)
            self._pump()
        self._account()

    def end_token(self) -> None:
        """The token is settled: nothing is protected for it any more, and prefetches not begun are taken back."""
        self._wanted.clear()
        self._guessed.clear()
        self._take_back(self.pool.unproven - self.pool.ready)
        self.pool.protected.clear()

    def _take_back(self, keys: Iterable[Key]) -> None:
        """Undo these prefetches as far as their copies have not begun."""
        for key in sorted(keys):
            if self.link.cancel(key):
                self._drop(key)
                self.ledger.counters.prefetch_loads -= 1

    def _clock(self) -> tuple[int, int, int]:
        counters = self.ledger.counters
        return self.link.now, counters.bytes_loaded, counters.stall_ns

    def _account(self) -> None:
        clock, counters = self._clock(), self.ledger.counters
        elapsed, moved, stalled = (now - then for now, then in zip(clock, self._begun, strict=True))
        self._begun = clock
        if self._kind == "prefill":
            counters.prefill_ns += elapsed
        else:
            counters.decode_ns += elapsed
            counters.decode_bytes += moved
            counters.decode_stall_ns += stalled

    # --- one layer ----------------------------------------------------------------------------------

    def layer(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: np.ndarray | None = None
    ) -> Iterator[Wave]:
        """Run one MoE layer: yields waves of (position in `experts`, slot), ready until the next wave is asked for.

        `experts` are the active ones, ascending, `counts` the tokens routed to each; `ahead` is a lookahead's signal.
        Residents come first.
        """
        self.link.compute(self._dense_ns, "dense")
        if self._kind == "prefill" or len(experts) > self.pool.size:
            yield from self._stream(layer, experts, counts)
        else:
            yield from self._hold(layer, experts, counts, ahead)
        self._pump()
        self._plan()

    def run_layer(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: np.ndarray | None = None
    ) -> None:
        """As `layer`, where nobody computes on the waves: a replay. No `counts` are one token each.

        Without events to tell apart, all residents are one charge; what is decided, and when, is the same.
        """
        if self.ledger.keeps_events or self._kind == "prefill" or len(experts) > self.pool.size:
            for _ in self.layer(layer, experts, counts or (1,) * len(experts), ahead):
                pass
            return
        link, expert_ns = self.link, self.cost.expert_ns
        link.compute(self._dense_ns, "dense")
        keys, resident, coming, on_cpu = self._arrange(layer, experts, counts, ahead)
        each = expert_ns(1)
        if resident:
            link.compute(sum(expert_ns(counts[i]) for i in resident) if counts else each * len(resident), "")
        ready, bring, compute, in_turn = self.pool.ready, self._bring, link.compute, not self.strategy.overlap
        for position in coming:
            key = keys[position]
            if key not in ready:
                bring(key)
            compute(expert_ns(counts[position]) if counts else each, key)
            if in_turn:
                link.join()
        self._settle(layer, self._off_cpu(keys, on_cpu))
        if self._wanted:
            self._pump()
        self._plan()

    def _hold(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: np.ndarray | None
    ) -> Iterator[Wave]:
        """A decode step whose experts all fit: residents compute while the others come in, then each as it arrives."""
        pool, link, expert_ns = self.pool, self.link, self.cost.expert_ns
        keys, resident, coming, on_cpu = self._arrange(layer, experts, counts, ahead)
        for position in resident:
            link.compute(expert_ns(counts[position]), keys[position])
        if resident:
            yield [(position, pool.slot(keys[position])) for position in resident]
        for position in on_cpu:
            yield [(position, HOST)]
        for position in coming:
            key = keys[position]
            if key not in pool.ready:
                self._bring(key)
            link.compute(expert_ns(counts[position]), key)
            yield [(position, pool.slot(key))]
            if not self.strategy.overlap:
                link.join()
        held = self._off_cpu(keys, on_cpu)
        link.used([pool.slot(key) for key in held])
        self._settle(layer, held)

    def _off_cpu(self, keys: list[Key], on_cpu: list[int]) -> list[Key]:
        """The device waits for what the CPU has not finished; the keys that have a slot."""
        if not on_cpu:
            return keys
        self.link.join_cpu(keys[on_cpu[-1]])
        return [key for position, key in enumerate(keys) if position not in on_cpu]

    def _arrange(
        self, layer: int, experts: Sequence[int], counts: Sequence[int], ahead: np.ndarray | None
    ) -> tuple[list[Key], list[int], list[int], list[int]]:
        """The layer is routed: its keys, and by position which are resident, to be brought, or the CPU's to compute.

        What is missing is asked for at once, unless loading takes turns with compute.
        """
        pool, link, counters = self.pool, self.link, self.ledger.counters
        ready, key_of = pool.ready, self._keys[layer]
        keys = [key_of[expert] for expert in experts]
        pool.pinned = set(keys)
        if self._guessed:
            self._refute(layer, experts)
        resident = [position for position, key in enumerate(keys) if key in ready]
        coming: list[int] = []
        on_cpu: list[int] = []
        if len(resident) < len(keys):
            missing = [position for position, key in enumerate(keys) if key not in ready]
            if len(pool) > len(ready):  # something is on its way
                coming = [position for position in missing if keys[position] in pool]
                missing = [position for position in missing if keys[position] not in pool]
                for position in coming:
                    link.promote(keys[position])
                counters.late_prefetches += len(coming)
            if self._placement is not None:
                on_cpu = self._begin_on_cpu(keys, missing, counts or (1,) * len(keys))
                counters.cpu_experts += len(on_cpu)
            counters.demand_loads += len(missing)
            coming += missing
            if self.strategy.overlap:
                submit, slot_for = link.submit, self._slot_for
                for position in missing:
                    key = keys[position]
                    submit(key, slot_for(key), demand=True)
        counters.hits += len(resident)
        if self._lookahead is not None:
            self._look(self._lookahead.routed(layer, experts, ahead))
        return keys, resident, coming, on_cpu

    def _bring(self, key: Key) -> None:
        """Wait for an expert that is not there, asking for it if nobody has."""
        if key not in self.pool:
            self.link.submit(key, self._slot_for(key), demand=True)
        self.link.wait(key)

    def _settle(self, layer: int, keys: list[Key]) -> None:
        """The layer is done: what it used is the most recent, and the strategy may keep it."""
        pool = self.pool
        if pool.unproven:
            self.ledger.counters.prefetch_useful += len(pool.pinned & pool.unproven)
            pool.unproven -= pool.pinned
        pool.pinned = frozenset()
        if self.strategy.retain == "nothing":
            for key in keys:
                self._drop(key)
            return
        pool.touch(keys)
        self._evict.used(layer, keys)
        if self._kind == "little":
            pool.protected.update(keys)
        elif pool.protected:
            pool.protected.difference_update([key for key in pool.protected if key[0] == layer])
        if self.strategy.staging:
            self._clear_staging(layer)

    def _begin_on_cpu(self, keys: Sequence[Key], missing: list[int], counts: Sequence[int]) -> list[int]:
        """Give the CPU its share of the `missing` positions and take it off them; returns it, ascending."""
        if self._placement is None or not missing:
            return []
        which = self._placement.on_cpu(keys[missing[0]][0], [counts[position] for position in missing])
        on_cpu = sorted(missing[number] for number in which)
        for position in on_cpu:
            missing.remove(position)
            self.link.on_cpu(self.cost.cpu_expert_ns(counts[position]), keys[position])
        return on_cpu

    def _foresee(self, keys: Sequence[Key]) -> None:
        """Remember what was foreseen of each layer, to hold it against what its router says."""
        for layer, expert in keys:
            self._guessed.setdefault(layer, set()).add(expert)

    def _look(self, keys: Sequence[Key]) -> None:
        """A lookahead's word on what comes next, the most urgent first: it stands in place of what it said before."""
        pool = self.pool
        for layer in {key[0] for key in keys}:
            self._guessed.pop(layer, None)
        self._foresee(keys)
        self._wanted.clear()
        missing = [key for key in keys if key not in pool]
        self._wanted.extend(missing[: self.strategy.guesses or None])
        pool.protected.update(key for key in keys if key in pool)
        self._pump()

    def _refute(self, layer: int, experts: Sequence[int]) -> None:
        """The router has spoken: what was predicted for this layer and not chosen is not worth a copy any more."""
        guessed = self._guessed.pop(layer, None)
        if guessed is not None:
            self.ledger.guess(layer, len(guessed), len(guessed.intersection(experts)), len(experts))
        while self._wanted and self._wanted[0][0] <= layer:
            self._wanted.popleft()
        pool = self.pool
        self._take_back(key for key in pool.unproven - pool.ready - pool.pinned if key[0] == layer)

    def _clear_staging(self, layer: int) -> None:
        """Wrong guesses leave their slots, and experts in use take no more than their own."""
        pool = self.pool
        for key in sorted(key for key in pool.unproven & pool.ready if key[0] == layer):
            self._drop(key)
        while len(pool) - len(pool.unproven) > self._for_proven:
            victim = self._evict.victim(pool, (layer, -1), protected=False)
            if victim is None:
                return
            self._drop(victim)

    def _stream(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Iterator[Wave]:
        """A step wider than a decode token: experts pass through the staging buffers, the pool's order untouched.

        A strategy that keeps experts lets missing ones settle in slots that are still free; none is evicted.
        """
        pool, link, counters = self.pool, self.link, self.ledger.counters
        for follower in self._followers:
            follower.streamed(layer, experts, counts)
        keep = self.strategy.retain != "nothing"
        keys = [(layer, expert) for expert in experts]
        absent = [position for position, key in enumerate(keys) if key not in pool]
        on_cpu = self._begin_on_cpu(keys, absent, counts)
        counters.streamed_on_cpu += len(on_cpu)
        missing = deque(keys[position] for position in absent)
        buffers = deque(range(pool.size, pool.size + STAGING))
        placed: dict[Key, int] = {}
        ahead = STAGING if self.strategy.overlap else 1
        self._landed.clear()
        for position, (key, count) in enumerate(zip(keys, counts, strict=True)):
            while missing and len(placed) < ahead:
                coming = missing.popleft()
                free = pool.take_free(coming) if keep else None
                placed[coming] = buffers.popleft() if free is None else free
                counters.streamed_loads += 1
                link.submit(coming, placed[coming], demand=True)
            if position in on_cpu:
                yield [(position, HOST)]
                continue
            slot = placed.pop(key, None)
            settled = key in pool
            if slot is None:
                slot = pool.slot(key)
                link.promote(key)
            while key not in pool.ready and self._landed.get(slot) != key:
                link.wait(key)
            link.compute(self.cost.expert_ns(count), key)
            yield [(position, slot)]
            link.used([slot])
            if not self.strategy.overlap:
                link.join()
            if not settled:
                buffers.append(slot)
                if self._emptied is not None:
                    self._emptied(slot)
        if on_cpu:
            link.join_cpu(keys[on_cpu[-1]])

    def arrived(self, key: Key, slot: int) -> None:
        """The link's word that a copy has ended."""
        if slot < self.pool.size:
            self.pool.ready.add(key)
            if self._planner is not None:
                self._plan()
        else:
            self._landed[slot] = key

    # --- slots --------------------------------------------------------------------------------------

    def _slot_for(self, key: Key) -> int:
        """A slot for a demand load, whatever it takes: free, evicted, taken from a queued prefetch, or waited for."""
        pool, victim_of, staged = self.pool, self._evict.victim, self.strategy.staging > 0
        while True:
            reserved = staged and len(pool) - len(pool.unproven) >= self._for_proven
            slot = None if reserved else pool.take_free(key)
            if slot is not None:
                return slot
            victim = victim_of(pool, key, protected=False)
            if victim is None:
                slot = pool.take_free(key)
                if slot is not None:
                    return slot
                victim = victim_of(pool, key, protected=True)
            if victim is not None and not staged:
                slot = pool.replace(victim, key)
                if self._emptied is not None:
                    self._emptied(slot)
                return slot
            if victim is not None:
                self._drop(victim)
                continue
            queued = [other for other in pool.queued() if other not in pool.pinned]
            assert queued, "a pool of at least top-k slots always has one to give"
            last = queued[-1]
            self._take_back([last])
            if last in pool:
                self.link.wait(last)

    def _pump(self) -> None:
        """Start wanted prefetches while a slot can be had without evicting what this token still needs."""
        pool = self.pool
        while self._wanted:
            key = self._wanted[0]
            if key not in pool:
                if self.strategy.staging and len(pool.unproven) >= self.strategy.staging:
                    return
                slot = pool.take_free(key)
                if slot is None:
                    victim = self._evict.victim(pool, key, protected=False)
                    if victim is None:
                        return
                    self._drop(victim)
                    slot = pool.take_free(key)
                    assert slot is not None
                pool.unproven.add(key)
                pool.protected.add(key)
                self.ledger.counters.prefetch_loads += 1
                self.link.submit(key, slot, demand=False)
            self._wanted.popleft()

    def _plan(self) -> None:
        """Let a planner use an idle link: one copy at a time, so that each is chosen, and its slot, when it begins."""
        pool = self.pool
        if self._planner is None or self._kind == "prefill" or len(pool.ready) < len(pool):
            return
        key = self._planner.idle(pool)
        if key is None:
            return
        slot = pool.take_free(key)
        if slot is None:
            victim = self._planner.victim(pool, key, protected=False)
            assert victim is not None, "a planner names a key only where one may give way"
            self._drop(victim)
            slot = pool.take_free(key)
            assert slot is not None
        pool.unproven.add(key)
        self.ledger.counters.prefetch_loads += 1
        self.link.submit(key, slot, demand=False)

    def _drop(self, key: Key) -> None:
        slot = self.pool.release(key)
        if self._emptied is not None:
            self._emptied(slot)
