"""The interface of a row format: how one matrix of an expert is packed into a few tensors, and decoded again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NoReturn, Protocol

import torch

from mobile.errors import Refused


@dataclass(frozen=True)
class Part:
    """A tensor that a matrix is packed into: its name in the format, dtype and shape, and its first byte in a row."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class RowFormat(Protocol):
    """A way to hold matrices in fewer bytes. An object of it has no state, and equals others of its class.

    A matrix lies as the model has it: (outputs, inputs), or (inputs, outputs) where its experts are transposed; the
    argument `inputs` is the axis of the inputs, 1 or 0. Row bytes that are all 0xFF decode to NaN, which tests fill
    empty slots with.
    """

    @property
    def name(self) -> str:
        """Name of the format, as `rows` has it."""
        ...

    def parts(self, shape: tuple[int, int], dtype: torch.dtype, inputs: int) -> tuple[Part, ...]:
        """Return the tensors that a matrix of this shape and dtype is packed into; their offsets do not count."""
        ...

    def pack(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], inputs: int) -> None:
        """Pack a matrix into its parts, by name. The same matrix gives the same bytes on any machine."""
        ...

    def work_nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes that `unpack` works in beside the matrix."""
        ...

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, inputs: int, work: torch.Tensor) -> None:
        """Decode the parts into `weight`, a contiguous matrix, within `work`, (work_nbytes,) uint8 on its device."""
        ...


def never_made(name: str) -> NoReturn:
    """Raise Refused: rows of a checkpoint's own packing are read from its files."""
    raise Refused(f"Rows of {name} are a checkpoint's own, and are not made of other weights; choose int8 or int4.")
