"""The host store: every expert of the model in CPU memory, one contiguous row each, so that a load is one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mobile.store.layout import ExpertLayout
from mobile.store.packed import Scratch, Weights, unpacked
from mobile.store.placeholder import Placeholder


class HostStore:
    """A model's experts in host memory: `rows` holds one tensor (experts, layout.numel) for each MoE layer.

    The system gives out memory as rows are written.
    """

    is_complete = False  # nothing is left in memory from an earlier load

    def __init__(self, layout: ExpertLayout, layers: int, experts: int) -> None:
        self.layout = layout
        self.rows = [torch.empty(experts, layout.numel, dtype=layout.dtype, device="cpu") for _ in range(layers)]
        scratch: Scratch = {}  # shared by all layers, and taken only if an expert is decoded here
        self._views = [layout.views(rows, scratch) for rows in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.nbytes for rows in self.rows)

    def weights(self, layer: int, name: str) -> Weights:
        """Return one stacked weight of a layer, (experts, ...): a view of its rows, to read or to fill."""
        return self._views[layer][name]

    def views(self, layer: int) -> dict[str, Weights]:
        """Return all stacked weights of a layer by name, (experts, ...) each, as views of its rows."""
        return self._views[layer]

    def slots(self, count: int, device: torch.device) -> torch.Tensor:
        """Return zeroed memory of slots (count, layout.numel) on a device. Raise RuntimeError if it has too little."""
        return torch.zeros(count, self.layout.numel, dtype=self.layout.dtype, device=device)

    def fill(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        """Copy an expert's row into `slot`, (layout.numel,), on any device."""
        slot.copy_(self.rows[layer][expert])

    def complete(self, layer: int) -> None:
        """Do nothing: the rows of a layer that was filled lie where they stay."""

    def finish(self) -> None:
        """Do nothing: all rows are where they stay."""

    def close(self) -> None:
        """Do nothing: it holds memory alone."""

    def reorder(self, order: Sequence[int]) -> None:
        """Put the layers in another order: layer i becomes the one that was at `order[i]`."""
        self.rows = [self.rows[number] for number in order]
        self._views = [self._views[number] for number in order]

    def take(self, modules: Sequence[nn.Module]) -> None:
        """Move every module's experts into its rows; the parameters stay as empty placeholders.

        Modules move one at a time, so the peak is the model plus one layer. Broken off anywhere, every expert is in
        its row or in its parameter, and `give_back` makes the modules whole. A parameter without elements is one that
        was moved before.
        """
        for layer, module in enumerate(modules):
            for name, view in self._views[layer].items():
                weight = getattr(module, name)
                if weight.numel():
                    view.copy_(weight.data)  # 1. the row is complete before the parameter lets go of its numbers
                    with torch.inference_mode(weight.is_inference()):  # as it was made, so that it stays what it was
                        weight.data = weight.data.new_empty(0)  # 2. from here on the row is the only copy
                weight.__class__ = Placeholder  # 3. done again if the class was not reached before

    def give_back(self, modules: Sequence[nn.Module]) -> None:
        """Put every expert back into its module's own parameters, bit for bit, on their own device.

        Packed rows are decoded: they give back what was computed with. Each layer's rows are let go of before the next:
        the peak is again the model plus one layer. Broken off anywhere, it can be called again, and goes on.
        """
        for layer, module in enumerate(modules):
            for name, view in self._views[layer].items():
                weight = getattr(module, name)
                if not weight.numel():  # else it was given back before, or never taken
                    with torch.inference_mode(weight.is_inference()):
                        weight.data = unpacked(view).to(weight.device, copy=True).contiguous()
                weight.__class__ = nn.Parameter
            # All of the layer's parameters are whole: only now are its rows let go of. Without views, the layer is
            # passed over when this is called again.
            self._views[layer] = {}
            self.rows[layer] = self.rows[layer].new_empty(0)
