"""The engine: the slots, the clock and the trace behind one attached model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mobile import compat
from mobile.cost import CostModel
from mobile.geometry import Geometry
from mobile.hardware import HardwareProfile
from mobile.kernels import group, loop
from mobile.ledger import Key, Ledger
from mobile.link import VirtualLink
from mobile.passes import Pass
from mobile.pool import SlotPool
from mobile.residency import STAGING, Residency
from mobile.store import HostStore
from mobile.strategy import Strategy
from mobile.trace import Request


class Engine:
    """Everything `attach` adds to a model, reachable as `model.mobile`."""

    def __init__(
        self, strategy: Strategy, layers: list[compat.MoeLayer], little_k: int, worn: Geometry,
        stands_for: tuple[tuple[int, ...], ...], slots: int, hardware: HardwareProfile, poison: bool,
    ) -> None:  # fmt: skip
        self.strategy, self.layers, self.geometry, self.slots = strategy, layers, worn, slots
        self.hardware, self.stands_for = hardware, stands_for
        self.little = little_k
        self.ledger = Ledger()
        self.running: Pass | None = None
        self.rolls_back = False
        self.recorded: list[Request] | None = None
        self._poison = poison
        self._owner = [mine for mine, covered in enumerate(stands_for) for _ in covered]
        self._batch: list[Request] = []
        self.store = HostStore([layer.experts for layer in layers], compat.WEIGHTS)
        self.leave: Callable[[], None] = lambda: None  # set by attach: how to undo it

    @property
    def experts(self) -> int:
        return self.layers[0].count

    def stats(self) -> dict[str, Any]:
        """What happened since attach, as plain numbers (see `mobile.ledger.Counters` for their meaning)."""
        return self.ledger.stats()

    # --- coming and going ---------------------------------------------------------------------------

    def take_experts(self) -> None:
        """Move the model's experts to the host store and make the slots; the modules keep empty placeholders."""
        self.store.take()
        device = next(iter(self.layers[0].router.parameters())).device
        layout = self.store.layout
        self._slots = torch.zeros(self.slots + STAGING, layout.numel, dtype=layout.dtype, device=device)
        self._views = layout.views(self._slots)
        self.restart()

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
        return compat.top_k_of([layer.router for layer in self.layers], self.little)

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
        keys = [(layer, e) for mine, covered in enumerate(self.stands_for) for layer in covered for e in wanted[mine]]
        self.residency.fallback(keys, int(unsure.sum()))

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
