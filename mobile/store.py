"""The host store: every expert of the model in CPU memory, one contiguous row each."""

from __future__ import annotations

import torch
from torch import nn

from mobile.layout import ExpertLayout, layout_of


class HostStore:
    """Rows per MoE layer, (experts, layout.numel). Moving a layer in empties its module's parameters.

    Layers move one at a time, so the peak is the model plus one layer.
    """

    def __init__(self, modules: list[nn.Module], names: tuple[str, ...]) -> None:
        self.modules, self.names = modules, names
        self.layout: ExpertLayout = layout_of({name: getattr(modules[0], name).data for name in names})
        self.rows: list[torch.Tensor] = []

    def take(self) -> None:
        """Move every module's experts into rows; the parameters stay as empty placeholders."""
        for module in self.modules:
            weights = {name: getattr(module, name) for name in self.names}
            experts = next(iter(weights.values())).shape[0]
            rows = torch.zeros(experts, self.layout.numel, dtype=self.layout.dtype)
            for name, view in self.layout.views(rows).items():
                view.copy_(weights[name].data)
                weights[name].data = weights[name].data.new_empty(0)
            self.rows.append(rows)

    def give_back(self) -> None:
        """Put every expert back into its module's own parameters, bit for bit, on their own device."""
        for module, rows in zip(self.modules, self.rows, strict=True):
            for name, view in self.layout.views(rows).items():
                weight = getattr(module, name)
                weight.data = view.clone(memory_format=torch.contiguous_format).to(weight.device)
        self.rows.clear()
