"""The layout of an expert's row: the place of each weight in it, so that an expert is copied as one block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

ALIGNMENT = 64  # elements; keeps every field on a 128-byte boundary in 16-bit types
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
class ExpertLayout:
    """All fields of one expert, and the row's length in elements, padding included."""

    fields: tuple[Field, ...]
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def page_aligned(self) -> ExpertLayout:
        """Return the layout with padding up to whole pages, so that each row can be read by itself."""
        page = PAGE // self.dtype.itemsize
        return replace(self, numel=-(-self.numel // page) * page)

    def views(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of rows (n, numel) as each field's weights, (n, *shape), without a copy."""
        return {
            field.name: rows[:, field.offset : field.offset + field.numel].view(rows.shape[0], *field.shape)
            for field in self.fields
        }


def layout_of(parameters: dict[str, torch.Tensor]) -> ExpertLayout:
    """Return the layout of experts whose stacked weights are `parameters`, each (experts, ...)."""
    fields, offset = [], 0
    for name, weight in parameters.items():
        field = Field(name, tuple(weight.shape[1:]), offset)
        fields.append(field)
        offset += -(-field.numel // ALIGNMENT) * ALIGNMENT
    return ExpertLayout(tuple(fields), offset, next(iter(parameters.values())).dtype)
