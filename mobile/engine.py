"""The engine: puts a strategy, its slots and its link behind a live model, and takes them away again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mobile import compat, selftest
from mobile.cost import CostModel
from mobile.decoding import Decoder, top_k_of
from mobile.experts import bind, unbind
from mobile.geometry import Geometry, dress, slots_for
from mobile.hardware import HardwareProfile, parse_nbytes, profile
from mobile.kernels import group, loop
from mobile.layout import layout_of
from mobile.ledger import Key, Ledger
from mobile.link import VirtualLink
from mobile.passes import Pass
from mobile.pool import SlotPool
from mobile.refusal import Refused
from mobile.residency import STAGING, Residency
from mobile.store import HostStore
from mobile.strategy import BigLittle, FullK, Strategy, resolve
from mobile.trace import Request


class Engine:
    """Everything `attach` adds to a model, reachable as `model.mobile`."""

    def __init__(
        self, model: nn.Module, strategy: Strategy, layers: list[compat.MoeLayer], own: Geometry, worn: Geometry,
        stands_for: tuple[tuple[int, ...], ...], slots: int, hardware: HardwareProfile, poison: bool,
    ) -> None:  # fmt: skip
        self.strategy, self.layers, self.geometry, self.slots = strategy, layers, worn, slots
        self.hardware, self.stands_for = hardware, stands_for
        self.little = own.little_k
        self.ledger = Ledger()
        self.running: Pass | None = None
        self.rolls_back = False
        self.recorded: list[Request] | None = None
        self._poison = poison
        self._owner = [mine for mine, covered in enumerate(stands_for) for _ in covered]
        self._batch: list[Request] = []
        self.store = HostStore([layer.experts for layer in layers], compat.WEIGHTS)
        self.decoder = Decoder(model, self)

    @property
    def experts(self) -> int:
        return self.layers[0].count

    def stats(self) -> dict[str, Any]:
        """What happened since attach, as plain numbers (see `mobile.ledger.Counters` for their meaning)."""
        return self.ledger.stats()

    # --- coming and going ---------------------------------------------------------------------------

    def _go_live(self) -> None:
        """Take the model's experts, bind its modules, wrap its forward."""
        self.store.take()
        device = next(iter(self.layers[0].router.parameters())).device
        layout = self.store.layout
        self._slots = torch.zeros(self.slots + STAGING, layout.numel, dtype=layout.dtype, device=device)
        self._views = layout.views(self._slots)
        self.restart()
        for number, layer in enumerate(self.layers):
            bind(layer.experts, self, number)
        self.decoder.install()

    def restart(self) -> None:
        """Cold slots, an empty ledger and a clock at zero."""
        self.ledger.clear()
        cost = CostModel(self.hardware, self.geometry)
        link = VirtualLink(cost.load_ns, self.geometry.expert_nbytes, self.ledger, self._arrived)
        self.residency = Residency(self.strategy, SlotPool(self.slots), link, cost, self.ledger, self._emptied)
        if self._poison:
            self._slots.fill_(float("nan"))
        for key, slot in self.residency.preload_all():
            self._fill(key, slot)

    def _go_away(self) -> None:
        self.decoder.remove()
        for layer in self.layers:
            unbind(layer.experts)
        self.store.give_back()

    # --- bytes --------------------------------------------------------------------------------------

    def _fill(self, key: Key, slot: int) -> None:
        self._slots[slot].copy_(self.store.rows[self._owner[key[0]]][key[1]])

    def _arrived(self, key: Key, slot: int) -> None:
        self._fill(key, slot)
        self.residency.arrived(key, slot)

    def _emptied(self, slot: int) -> None:
        if self._poison:
            self._slots[slot].fill_(float("nan"))

    # --- one forward pass ---------------------------------------------------------------------------

    def little_k(self) -> Any:
        """A context in which every router chooses K/2 experts."""
        return top_k_of([layer.router for layer in self.layers], self.little)

    @contextmanager
    def passing(self, running: Pass) -> Iterator[None]:
        """One forward pass: opens and closes it on the clock, and settles both if it breaks off."""
        self.running = running
        self.residency.begin(running.kind, running.tokens)
        try:
            yield
        except BaseException:
            self.residency.abandon()
            raise
        else:
            self.residency.finish()
        finally:
            self.running = None

    def run_experts(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One layer's routed experts: hidden (tokens, H), index and weights (tokens, K) -> (tokens, H)."""
        if self.running is None:  # the base model called without its head: prefill, if anything
            if layer == 0:
                self.residency.begin("prefill", hidden.shape[0])
        else:
            index, weights = self.running.select(layer, index, weights, self.experts)
        groups = group(index, self.experts)
        *others, last = self.stands_for[layer]
        for other in others:
            for _ in self.residency.layer(other, groups.experts, groups.counts):
                pass
        slots = self.residency.layer(last, groups.experts, groups.counts)
        return loop(self.layers[layer].experts, hidden, weights, groups, slots, self._views)

    def predict(self, little: Pass) -> list[torch.Tensor]:
        """Per layer the K experts (tokens, K) that the little pass's recorded router inputs name."""
        return [layer.route(*little.router_inputs[number]) for number, layer in enumerate(self.layers)]

    def fall_back(self, predicted: list[torch.Tensor], unsure: torch.Tensor) -> None:
        """Tell the clock that rows were unsure, and what their big pass will probably need, in layer order."""
        wanted = [layer[unsure].unique().tolist() for layer in predicted]
        self.residency.fallback(
            [(layer, e) for mine, covered in enumerate(self.stands_for) for layer in covered for e in wanted[mine]]
        )

    def remember(
        self, done: Pass, live: torch.Tensor | None = None, confidence: torch.Tensor | None = None,
        predicted: list[torch.Tensor] | None = None, *, fresh: bool = False,
    ) -> None:  # fmt: skip
        """Append the pass to the trace of each live row, if a recording is on; `fresh` begins new requests."""
        if self.recorded is None:
            return
        rows = done.valid.shape[0]
        if fresh or len(self._batch) != rows:
            self._batch = [[] for _ in range(rows)]
            self.recorded.extend(self._batch)
        for row in range(rows):
            if live is None or live[row]:
                sure = None if confidence is None else float(confidence[row])
                self._batch[row].append(done.row_step(row, sure, predicted or ()))

    @contextmanager
    def recording(self) -> Iterator[list[Request]]:
        """Inside the block every sequence's routing is recorded; yields the growing list of requests."""
        self.recorded, self._batch = [], []
        try:
            yield self.recorded
        finally:
            self.recorded = None


def geometry_of(model: Any, layers: list[compat.MoeLayer]) -> Geometry:
    """The live model's own sizes, read from its parameters."""
    layout = layout_of({name: getattr(layers[0].experts, name) for name in compat.WEIGHTS})
    routed = {id(getattr(layer.experts, name)) for layer in layers for name in compat.WEIGHTS}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = {id(module.weight) for module in (embedding, head) if module is not None}
    dense = sum(p.nbytes for p in model.parameters() if id(p) not in routed | apart)
    return Geometry(
        name=type(model).__name__,
        moe_layers=len(layers),
        experts=layers[0].count,
        top_k=int(layers[0].router.top_k),
        expert_nbytes=layout.nbytes,
        dense_nbytes=dense // len(layers),
        router_nbytes=sum(p.nbytes for p in layers[0].router.parameters()),
        head_nbytes=head.weight.nbytes if head is not None else 0,
        embedding_nbytes=embedding.weight.nbytes if embedding is not None and head is not embedding else 0,
        width=layout.dtype.itemsize,
    )


def attach(
    model: Any,
    strategy: str | Strategy = "mobile",
    *,
    memory: int | str | None = None,
    slots: int | None = None,
    hardware: str | HardwareProfile = "auto",
    link: str = "auto",
    gamma: float | None = None,
    geometry: str | None = None,
    poison: bool = False,
) -> Any:
    """Offload a live Transformers MoE: its experts move to the host store, a few slots serve them.

    Returns the same object; `generate()` and everything around it work as before, and `model.mobile` has the
    stats. Give `memory` (bytes or "8GiB", dense weights and reserve included) or `slots`; with neither, the
    profile's memory. `geometry` charges time and bytes as if the model were that real one. `poison` fills empty
    slots with NaN, for tests. Raises Refused, with nothing changed, for whatever cannot work.
    """
    compat.check_version()
    if hasattr(model, "mobile"):
        raise Refused("This model is already attached; call mobile.detach(model) first.")
    chosen = resolve(strategy, gamma)
    hardware = hardware if isinstance(hardware, HardwareProfile) else profile(hardware)
    if link not in ("auto", "virtual"):
        raise Refused(f"Link {link!r} is not available; choose auto or virtual.")
    layers = compat.moe_layers(model)
    own = geometry_of(model, layers)
    worn, stands_for = dress(own, geometry)
    if slots is not None and memory is not None:
        raise Refused("Give memory or slots, not both.")
    if slots is None and chosen.retain == "everything" and memory is None:
        slots = worn.keys
    if slots is None:
        nbytes = hardware.vram_nbytes if memory is None else parse_nbytes(memory)
        slots = slots_for(worn, nbytes, hardware.reserve_nbytes, STAGING)
    if slots < worn.top_k:
        raise Refused(f"{slots} slots cannot hold one token's {worn.top_k} experts; give at least {worn.top_k} slots.")
    if chosen.retain == "everything" and slots < worn.keys:
        raise Refused(f"Strategy {chosen.name} keeps all {worn.keys} experts on the device; {slots} slots are too few.")
    if any(not p.is_floating_point() or p.device.type == "meta" for p in model.parameters()):
        raise Refused("The model's weights are quantised or not loaded; load them in a floating-point dtype first.")
    if not isinstance(chosen.gating, FullK):
        selftest.check_routers(model, layers, own.little_k)
    engine = Engine(model, chosen, layers, own, worn, stands_for, min(slots, worn.keys), hardware, poison)
    engine._go_live()
    model.mobile = engine
    if isinstance(chosen.gating, BigLittle):
        try:
            engine.rolls_back = selftest.rolls_back(model, engine)
        except BaseException:
            detach(model)
            raise
        engine.restart()
    return model


def detach(model: Any) -> Any:
    """The stock model again, bit for bit; returns it. Raises Refused if it is not attached."""
    engine = getattr(model, "mobile", None)
    if not isinstance(engine, Engine):
        raise Refused("This model is not attached, so there is nothing to detach.")
    engine._go_away()
    del model.mobile
    return model
