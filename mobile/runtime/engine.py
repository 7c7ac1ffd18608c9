"""The engine behind one attached model: its slots, its link, and the forward passes that run on them one at a time."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from mobile.costs.cost_model import CostModel
from mobile.errors import Refused
from mobile.kernels import packed
from mobile.kernels.host_experts import CpuExperts, LayerOnHost
from mobile.kernels.loop import begin_grouping
from mobile.ledger import Key, Ledger
from mobile.links.base import Link, LinkEnds
from mobile.live_model import compat
from mobile.live_model.guards import COPYING
from mobile.live_model.overrides import Overrides
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import BigLittle, CustomRouting, Strategy
from mobile.replay.trace import Request
from mobile.residency.residency import PREFILL_BUFFERS, Residency
from mobile.runtime.attach_plan import AttachPlan
from mobile.runtime.cached_routing import CachedChoices, RouterFacts
from mobile.runtime.device_memory import is_out_of_memory, lift_cap
from mobile.runtime.forward_pass import ForwardPass, Selection
from mobile.runtime.next_layer import NextLayerLookup
from mobile.runtime.quasi_hidden_state import QuasiHiddenState
from mobile.runtime.recording import Recorder
from mobile.runtime.steps import Steps
from mobile.store import HostStore, Store, poison
from mobile.transfer import Reading, read

Scope = AbstractContextManager[Any]
OUT_OF_MEMORY = (
    "{} has no memory left for this step. The model can go on with the next one; for one like this, attach or load it "
    "with a larger context_tokens or fewer slots, or give it fewer tokens at once."
)
Compare = Callable[[ForwardPass, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Findings:
    """Facts that the self-test at attach found out about the model.

    `undoable` are the types of caches, and of their layers, in which a step was undone without a trace. `quasi` is set
    for a strategy that asks the next layer's router about the quasi-hidden state, `routers`, by layer, for one that
    chooses by what is in slots.
    """

    undoable: frozenset[type] = frozenset()
    quasi: QuasiHiddenState | None = None
    routers: Sequence[RouterFacts] | None = None


class Engine:
    """The runtime of an attached model, reachable as `model.mobile`.

    Forward passes of several threads take turns, so each thread's tokens are what it would get alone. `recording`
    follows one caller only.
    """

    def __init__(
        self,
        plan: AttachPlan,
        layers: Sequence[compat.MoeLayer],
        store: Store,
        *,
        originals: Store | None = None,
        poison: bool = False,
    ) -> None:
        """Stand behind `layers`, whose experts `store` keeps. `poison` fills empty slots with NaN.

        `originals` keeps the experts as they were, where `store` has lost some of their bits.
        """
        self.plan, self.layers, self.store = plan, layers, store
        self.originals = store if originals is None else originals  # the store that gives experts back
        self.strategy, self.geometry, self.slots, self.hardware = plan.strategy, plan.charged, plan.slots, plan.hardware
        self.layer_map = plan.layer_map
        self.overrides = Overrides()  # all that attach puts on the model
        self.ledger = Ledger()
        self.running: ForwardPass | None = None
        self.findings = Findings()
        self.recorder, self.next_layer = Recorder(), NextLayerLookup(layers, plan.strategy)
        self._steps = Steps(self)
        self.lock = self._steps.lock  # whoever holds it is alone with the engine
        self._kernel, self._poison = plan.kernel, poison
        self._pass_scope: Callable[[ForwardPass], Scope] = nullcontext
        self.compare: Compare | None = None
        self._top_k = [layer.top_k for layer in layers]
        # By charged layer, the live layer that holds its experts' rows.
        self._owner = [mine for mine, covered in enumerate(plan.layer_map) for _ in covered]
        self.leaving = False  # whether a detach has begun, and experts may be anywhere
        self.device = compat.device_of(layers)
        self.slot_rows = torch.empty(0, store.layout.numel, dtype=store.layout.dtype, device=self.device)
        self._views = store.layout.views(self.slot_rows)
        self._warned_alone = False
        self._cached: CachedChoices | None = None
        self._cpu: CpuExperts | None = None  # computes experts, where the strategy has it do so

    @property
    def experts(self) -> int:
        """Number of experts in a layer."""
        return self.layers[0].count

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Raise Refused: a copy of any part of an attached model would be without its experts."""
        raise Refused(COPYING)

    def stats(self) -> dict[str, Any]:
        """Return what happened since attach, as plain numbers (see `mobile.ledger.Counters` for their meaning).

        Seconds include the device's last work, for which it waits, unless another thread is in a step.
        """
        if hasattr(self, "residency") and self.lock.acquire(blocking=False):
            try:
                self.residency.settle()
            finally:
                self.lock.release()
        return self.ledger.stats()

    # --- coming and going ---------------------------------------------------------------------------

    def allocate(self) -> None:
        """Cap what this process allocates on the device, if the budget says so, and take the slots' memory.

        Raise Refused, with nothing taken, if the device has too little.
        """
        rows, layout = self.slots + PREFILL_BUFFERS, self.store.layout
        if self.plan.cap is not None:
            weakref.finalize(self, lift_cap, self.device)  # should the model be deleted without detach
            torch.cuda.set_per_process_memory_fraction(self.plan.cap, self.device)
        try:
            taken = self.store.slots(rows, self.device)
            views = layout.views(taken, layout.scratch(self.device))
        except (RuntimeError, MemoryError) as error:  # out of memory, on any device
            raise Refused(
                f"{rows * layout.nbytes / 2**30:.1f} GiB for {self.slots} slots could not be taken on {self.device}; "
                "give fewer slots or less memory."
            ) from error
        self.slot_rows, self._views = taken, views

    def connect(self, make: Callable[[LinkEnds], Link]) -> None:
        """Make the link and start with cold slots."""
        self._cost = CostModel(self.hardware, self.geometry, in_place=self.plan.kernel is packed)
        if self.strategy.on_cpu is not None and self._cpu is None:
            self._cpu = CpuExperts(self.device)
        self.link = make(
            LinkEnds(
                store=self.store,
                rows=(self.geometry.moe_layers, self.geometry.experts),
                slots=self.slot_rows,
                row_of=self.row,
                fill=self.fill,
                arrived=self.arrived,
                ledger=self.ledger,
                row_nbytes=self.store.layout.nbytes,
                charged_nbytes=self.geometry.expert_nbytes,
                load_ns=self._cost.load_ns,
                begin_ns=self._cost.host.copy,
                read_ns=self._cost.host.read,
                link_gb_per_s=self.plan.link_gb_per_s,
                processor=self._cpu,
            )
        )
        measured = self.link.gb_per_s
        if measured is not None:  # policies weigh copies as this link makes them, not as the profile's would
            hardware = replace(self.hardware, link_gb_per_s=measured)
            self._cost = CostModel(hardware, self.geometry, in_place=self.plan.kernel is packed)
        self.restart()

    def start(self, findings: Findings) -> None:
        """Keep what the self-test found, and start anew."""
        self.findings = findings
        self.restart()

    def restart(self) -> None:
        """Start with cold slots, an empty ledger and a clock at zero."""
        self.ledger.clear()
        self.begin_cold()
        self.link.rewind()

    def uninstall(self, *, give_back: bool) -> None:
        """Make the model the stock one again. Broken off anywhere, it can be called again, and goes on.

        With `give_back` the experts go back into their modules and the store is closed; otherwise they stay in it.
        `model.mobile` is the last to go.
        """
        self.leaving = True
        self.close()
        if give_back:
            self.originals.give_back([layer.experts for layer in self.layers])
        self.overrides.undo()
        if give_back:
            self.store.close()
            self.originals.close()

    def close(self) -> None:
        """Let go of the link, if it was made, of the routers, the slots and the memory cap; may be called again."""
        self._all_k()
        if self._cpu is not None:
            self._cpu.close()  # before the rows that it reads are let go of
        if hasattr(self, "link"):
            self.link.close()
        self.slot_rows, self._views = self.slot_rows.new_empty(0), {}
        lift_cap(self.device)  # the experts may not fit below it

    def begin_cold(self) -> None:
        """Empty all slots and stop copies and products under way; the clock and the counters go on."""
        if self._cpu is not None:
            self._cpu.reset()
        self.link.reset()
        self._all_k()
        self.running = None
        context = PolicyContext.of(self._cost, self.slots, layer_map=self.layer_map)
        self.residency = Residency(self.strategy, context, self.link, self._cost, self.ledger, self._emptied)
        if self.findings.routers is not None:  # until then, the self-test, routers are left alone
            self._cached = CachedChoices(self.strategy, context, self.layers, self.findings.routers)
        if self._poison:
            poison(self.slot_rows)
        for key, slot in self.residency.preload_all():
            self.fill(key, slot)
        self.link.join()  # no copy overtakes what has just been written

    # --- bytes --------------------------------------------------------------------------------------

    def row(self, key: Key) -> torch.Tensor:
        """Return the expert's row in host memory, (row elements,)."""
        assert isinstance(self.store, HostStore), "a link that wants rows in memory is given a store in memory"
        return self.store.rows[self._owner[key[0]]][key[1]]

    def fill(self, key: Key, slot: int) -> None:
        """Put the expert's bytes into the slot, now."""
        self.store.fill(self._owner[key[0]], key[1], self.slot_rows[slot])

    def arrived(self, key: Key, slot: int) -> None:
        """Note that the expert's bytes are in the slot; the link calls it."""
        self.residency.arrived(key, slot)

    def _emptied(self, slot: int) -> None:
        """Poison a slot whose expert was dropped, in tests."""
        if self._poison:
            poison(self.slot_rows[slot])
            self.link.used([slot])  # the next copy into it comes after

    # --- one forward pass ---------------------------------------------------------------------------

    @contextmanager
    def little_k(self) -> Iterator[None]:
        """Have every router choose K/2 experts inside the block."""
        for layer in self.layers:
            setattr(*layer.top_k_attribute, self.plan.native.little_k)
        yield
        self._all_k()

    def _all_k(self) -> None:
        """Have every router choose as many experts as before attach."""
        for layer, top_k in zip(self.layers, self._top_k, strict=True):
            setattr(*layer.top_k_attribute, top_k)

    def step(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """Run all that one call of the model does, alone on the engine; a call inside it is part of it."""
        return self._steps.run(run, *arguments)

    def end_step(self) -> None:
        self.residency.end_step()

    def break_off(self, error: BaseException) -> None:
        """Close the pass or the smaller top-k that a step had open when this error ended it."""
        passing, self.running = self.running, None
        self._all_k()
        if passing is not None:
            self.residency.abandon()
        if is_out_of_memory(error):
            error.add_note(OUT_OF_MEMORY.format(self.device))

    @contextmanager
    def observed(self, kernel_scope: Callable[[], Scope], pass_scope: Callable[[ForwardPass], Scope]) -> Iterator[None]:
        """Inside the block, run each kernel call and each forward pass within a scope, so that a profiler names it."""
        before = self._kernel, self._pass_scope

        def kernel(*arguments: Any) -> torch.Tensor:
            with kernel_scope():
                return before[0](*arguments)

        self._kernel, self._pass_scope = kernel, pass_scope
        try:
            yield
        finally:
            self._kernel, self._pass_scope = before

    @contextmanager
    def gated(self, gating: BigLittle) -> Iterator[None]:
        """Inside the block, judge little passes by another gamma or signal than the strategy's own.

        The engine starts cold, with an empty ledger, at both ends. Raise Refused for a strategy without little passes.
        """
        before = self.strategy
        if not isinstance(before.gating, BigLittle):
            raise Refused(f"Strategy {before.name} has no gamma; use the strategy mobile.")
        self._switch(replace(before, gating=gating))
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, strategy: Strategy) -> None:
        with self.lock:
            self.strategy = strategy
            self.restart()

    @contextmanager
    def comparing(self, compare: Compare) -> Iterator[None]:
        """Inside the block, call `compare` after every big pass: with the little pass, its logits and the big one's.

        Logits are (rows, V). Rows that were sure or have ended are among them.
        """
        self.compare = compare
        try:
            yield
        finally:
            self.compare = None

    @contextmanager
    def passing(self, running: ForwardPass) -> Iterator[None]:
        """Open one forward pass on the clock, and close it at the end of the block."""
        with self._pass_scope(running):
            self.running = running
            self.residency.begin(running.kind, running.tokens, running.counted)
            yield
            self.residency.finish()
            self.running = None

    def run_experts(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute a layer's routed experts: hidden (tokens, H), index and weights (tokens, K) -> (tokens, H)."""
        return self.step(self._run_routed, layer, hidden, index, weights)

    def _run_routed(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.running is None:
            return self._run_alone(layer, hidden, index, weights)
        chosen = self._reroute(layer, self.running, index, weights)
        return self._compute(layer, hidden, *self.running.select(layer, *chosen, self.experts))

    def _reroute(self, layer: int, running: ForwardPass, index: torch.Tensor, weights: torch.Tensor) -> Selection:
        """Return the gating's choice in place of the router's; an expert of weight 0 is left out."""
        gating = self.strategy.gating
        if self._cached is not None and running.kind == self._cached.kind:
            in_slots = self.residency.in_slots(self.layer_map[layer])
            return self._cached.select(layer, running.router_inputs.get(layer), (index, weights), in_slots)
        if not isinstance(gating, CustomRouting) or running.kind != "full":
            return index, weights
        index, weights = gating.choose(layer, (index, weights), self.next_layer.take_selection(layer))
        return index.masked_fill(weights == 0, self.experts), weights

    def _run_alone(self, layer: int, hidden: torch.Tensor, *selection: torch.Tensor) -> torch.Tensor:
        """Run a layer that was called by itself, outside of any model's forward, as prefill."""
        if self.strategy.acts_on_decode and not self._warned_alone:
            self._warned_alone = True
            warnings.warn(
                "Layers of the attached model are called without its forward, so every call runs as a prompt does, "
                f"with all experts and no cache of them: the strategy {self.strategy.name} does not act.",
                stacklevel=2,
            )
        if layer == 0:
            self.residency.begin("prefill", hidden.shape[0])
        return self._compute(layer, hidden, *selection)

    def _compute(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Make the experts ready in slots, wave by wave, and compute them."""
        running, lookup = self.running, self.next_layer
        # 1. Ask the next layer's router, and read all that the host needs of the device at once.
        wanted, finish = begin_grouping(index, self.experts)
        asked, logits = [wanted], None
        keep_logits = self.recorder.keeps_next_layer_logits
        asks_ahead = keep_logits or lookup.needs_selections or self.residency.asks_lookahead
        if asks_ahead and running is not None and running.kind != "prefill":
            logits = lookup.ask(layer, running, (index, weights), self.findings.quasi, keep_logits=keep_logits)
            asked += [] if logits is None else [logits]
        few = wanted is index
        sends_hidden = self._cpu is not None and few
        told = read(*asked, *([hidden] if sends_hidden else []))
        groups = finish(told[0])
        if running is not None:
            if logits is not None:
                running.ahead[layer] = told[1].numpy()
            if few:
                running.chosen.append(told[0])
        # 2. Of the charged layers that this one stands for, all but the last cost time and bytes and compute nothing.
        *others, last = self.layer_map[layer]
        for other in others:
            ahead = lookup.logits_for(layer, running, last=False)
            for _ in self.residency.layer(other, groups.experts, groups.counts, ahead):
                pass
        ahead = lookup.logits_for(layer, running, last=True)
        waves = self.residency.layer(last, groups.experts, groups.counts, ahead)
        host = None
        if self._cpu is not None:
            reading = Reading([told[-1] if sends_hidden else hidden, groups.tokens])
            host = LayerOnHost(self._cpu, self.store.views(layer), reading)
        return self._kernel(self.layers[layer].experts, hidden, weights, groups, waves, self._views, host)

    @property
    def asks_ahead(self) -> bool:
        """Whether the next layer's router is asked at every layer: to load or route ahead, or for a trace."""
        lookup = self.next_layer
        return lookup.needs_logits or lookup.needs_selections or self.recorder.keeps_next_layer_logits

    def fall_back(self, predict: Callable[[], list[torch.Tensor]], falls: torch.Tensor) -> list[torch.Tensor]:
        """Count the rows that fall (rows,), in host memory, and load the experts that they will probably need.

        `predict` gives the ids (rows, K) by layer on the device. They are read at once, as part of the fallback, and
        returned in host memory.
        """
        predicted: list[torch.Tensor] = []

        def keys() -> list[Key]:
            ids = predict()
            (together,) = read(torch.cat([layer.reshape(-1) for layer in ids]))
            parts = together.split([layer.numel() for layer in ids])
            predicted.extend(part.view(layer.shape) for part, layer in zip(parts, ids, strict=True))
            rows = falls.nonzero()[:, 0].tolist()
            wanted = [sorted({expert for row in rows for expert in layer[row].tolist()}) for layer in predicted]
            return [(one, e) for mine, covered in enumerate(self.layer_map) for one in covered for e in wanted[mine]]

        self.residency.fallback(keys, int(falls.sum()))
        return predicted

    def recording(self, *, ahead: bool = False) -> AbstractContextManager[list[Request]]:
        """Return a context in which every sequence's routing is recorded, as a growing list of requests.

        With `ahead`, and what next-layer predictors need, see `trace.Step`.
        """
        return self.recorder.recording(ahead=ahead)
