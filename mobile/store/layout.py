"""The layout of an expert's row: the place of each weight in it, so that an expert is copied as one block.

A row holds weights as the model has them, or, with a `Packing`, their matrices in a row format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from mobile.costs.rows import AS_IS
from mobile.store.formats import Part, RowFormat
from mobile.store.packed import PackedWeights, Scratch, Weights, scratch_for

ALIGNMENT = 64  # elements; keeps every field on a 128-byte boundary in 16-bit types
ALIGNMENT_NBYTES = 128  # of every part of a packed row
PAGE = 4096  # bytes; direct reads begin and end at multiples of it, in the file and in memory


@dataclass(frozen=True)
class Field:
    """A weight of an expert: the parameter's name, its shape without the expert axis, its offset in the row."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Packing:
    """A row format of an expert's matrices. `parts` are those of each field, none of one that is kept as it is.

    `dtype` is that of the weights, and `inputs` the axis of a matrix's inputs: 1, or 0 where experts are transposed.
    """

    format: RowFormat
    dtype: torch.dtype
    inputs: int
    parts: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class ExpertLayout:
    """All fields of one expert, and the row's length in elements, padding included.

    Elements are of the weights' dtype, or bytes where there is a `packing`.
    """

    fields: tuple[Field, ...]
    numel: int
    dtype: torch.dtype
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights that an expert is computed with."""
        return self.dtype if self.packing is None else self.packing.dtype

    @property
    def weights_nbytes(self) -> int:
        """Bytes of an expert's weights as they are computed with, without padding."""
        return sum(field.numel for field in self.fields) * self.weight_dtype.itemsize

    @property
    def rows(self) -> str:
        """Name of the row format."""
        return AS_IS if self.packing is None else self.packing.format.name

    def page_aligned(self) -> ExpertLayout:
        """Return the layout with padding up to whole pages, so that each row can be read by itself."""
        page = PAGE // self.dtype.itemsize
        return replace(self, numel=-(-self.numel // page) * page)

    def packed(self, format: RowFormat | None, *, transposed: bool) -> ExpertLayout:
        """Return the layout with the matrices in a row format, itself for None, and all other fields as they are.

        `transposed` says that matrices are (inputs, outputs).
        """
        if format is None:
            return self
        fields, parts_of, offset, inputs = [], [], 0, 0 if transposed else 1
        for field in self.fields:
            first, parts = offset, []
            if len(field.shape) == 2:
                for part in format.parts((field.shape[0], field.shape[1]), self.dtype, inputs):
                    parts.append(replace(part, offset=offset))
                    offset = _aligned(offset + part.nbytes)
            else:
                offset = _aligned(offset + field.numel * self.dtype.itemsize)
            fields.append(replace(field, offset=first))
            parts_of.append(tuple(parts))
        return ExpertLayout(tuple(fields), offset, torch.uint8, Packing(format, self.dtype, inputs, tuple(parts_of)))

    def views(self, rows: torch.Tensor, scratch: Scratch | None = None) -> dict[str, Weights]:
        """Return views of rows (n, numel) as each field's weights, (n, *shape), without a copy.

        Matrices of packed rows are `PackedWeights`, which are decoded into `scratch`, or into memory of their own.
        """
        if self.packing is None:
            return {
                field.name: rows[:, field.offset : field.offset + field.numel].view(rows.shape[0], *field.shape)
                for field in self.fields
            }
        scratch = {} if scratch is None else scratch
        return {
            field.name: self._packed_view(rows, field, parts, scratch)
            for field, parts in zip(self.fields, self.packing.parts, strict=True)
        }

    def _packed_view(self, rows: torch.Tensor, field: Field, parts: tuple[Part, ...], scratch: Scratch) -> Weights:
        """Return one field of packed rows."""
        assert self.packing is not None

        def view(part: Part) -> torch.Tensor:
            return rows[:, part.offset : part.offset + part.nbytes].view(part.dtype).view(rows.shape[0], *part.shape)

        if not parts:
            return view(Part(field.name, self.packing.dtype, field.shape, field.offset))
        like = torch.empty(rows.shape[0], *field.shape, dtype=self.packing.dtype, device="meta")
        named = {part.name: view(part) for part in parts}
        return PackedWeights(self.packing.format, like, named, self.packing.inputs, field.name, scratch)

    def scratch(self, device: torch.device) -> Scratch:
        """Return memory to decode an expert's matrices into, for `views`."""
        if self.packing is None:
            return {}
        return {
            field.name: scratch_for(self.packing.format, field.shape, self.packing.dtype, device)
            for field, parts in zip(self.fields, self.packing.parts, strict=True)
            if parts
        }


def _aligned(nbytes: int) -> int:
    """Return the next place in a packed row where a part may begin."""
    return -(-nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES


def poison(rows: torch.Tensor) -> None:
    """Fill rows with bytes of 0xFF: NaN in every float dtype, and in every row format once it is decoded."""
    rows.view(torch.uint8).fill_(0xFF)


def layout_of(parameters: dict[str, torch.Tensor]) -> ExpertLayout:
    """Return the layout of experts whose stacked weights are `parameters`, each (experts, ...)."""
    fields, offset = [], 0
    for name, weight in parameters.items():
        field = Field(name, tuple(weight.shape[1:]), offset)
        fields.append(field)
        offset += -(-field.numel // ALIGNMENT) * ALIGNMENT
    return ExpertLayout(tuple(fields), offset, next(iter(parameters.values())).dtype)
