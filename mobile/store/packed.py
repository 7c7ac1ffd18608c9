"""Packed weights: one matrix of many experts in packed rows, decoded an expert at a time when it is indexed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mobile.store.formats import RowFormat

Scratch = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by weight: one expert's matrix, and bytes to work in


class PackedWeights:
    """One weight of the experts in packed rows, in place of a tensor (rows, outputs, inputs), or the same transposed.

    `parts` are views of the rows by name, (rows, *shape of the part), to read or to fill. `shape` and `dtype` are those
    of the weights that come out. `inputs` is the axis of a matrix's inputs.
    """

    def __init__(
        self,
        format: RowFormat,
        like: torch.Tensor,
        parts: Mapping[str, torch.Tensor],
        inputs: int,
        name: str,
        scratch: Scratch,
    ) -> None:
        """Stand for weights of the shape and dtype of `like`. `scratch` may be shared, and is filled when needed."""
        self.format, self.parts, self.inputs = format, parts, inputs
        self.shape, self.dtype = like.shape, like.dtype
        self._name, self._scratch = name, scratch

    def __getitem__(self, row: int) -> torch.Tensor:
        """Return one row's matrix, decoded into scratch memory: it holds until the next matrix of this name."""
        weight, work = self._scratch.get(self._name) or self._take_scratch()
        self.format.unpack({name: part[row] for name, part in self.parts.items()}, weight, self.inputs, work)
        return weight

    def _take_scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        taken = self._scratch[self._name] = scratch_for(self.format, self.shape[1:], self.dtype, self.device)
        return taken

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return next(iter(self.parts.values())).device

    def pack(self, row: int, weight: torch.Tensor) -> None:
        """Pack a matrix, of any dtype, into a row: as it is once it is cast to `dtype`."""
        self.format.pack(
            weight.to(self.device, self.dtype), {name: part[row] for name, part in self.parts.items()}, self.inputs
        )

    def copy_(self, weights: torch.Tensor) -> None:
        """Pack the matrices (rows, ...) of all rows."""
        for row, weight in enumerate(weights):
            self.pack(row, weight)

    def unpacked(self) -> torch.Tensor:
        """Return the matrices of all rows, (rows, ...), in memory of their own."""
        weights = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for row, weight in enumerate(weights):
            weight.copy_(self[row])
        return weights


Weights = torch.Tensor | PackedWeights  # one weight of many experts


def unpacked(weights: Weights) -> torch.Tensor:
    """Return weights as a tensor: themselves, or decoded."""
    return weights if isinstance(weights, torch.Tensor) else weights.unpacked()


def plain(weights: Weights) -> torch.Tensor:
    """Return weights that are not packed."""
    assert isinstance(weights, torch.Tensor), "packed weights are decoded an expert at a time"
    return weights


def scratch_for(
    format: RowFormat, shape: Any, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for one decoded matrix, and for the work of decoding it."""
    work = torch.empty(format.work_nbytes(tuple(shape)), dtype=torch.uint8, device=device)
    return torch.empty(shape, dtype=dtype, device=device), work
