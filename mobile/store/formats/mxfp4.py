"""Rows of a checkpoint in MXFP4: a float of 4 bits for each weight, and a power of two for each 32 inputs.

Decoded as Transformers dequantises them (`Mxfp4Dequantize`), which is exact in bfloat16 and float32. Such rows are read
from a checkpoint and never made here. The format is that of the OCP Microscaling specification 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NoReturn

import torch

from mobile.store.formats.row_format import Part, never_made

GROUP = 32  # inputs that share a scale, in 16 bytes
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127  # a scale's byte is the exponent plus this


@dataclass(frozen=True)
class Mxfp4:
    """Floats of 4 bits (e2m1), two to a byte, the first in its lower half; scales of 8 bits (e8m0)."""

    name = "mxfp4"

    def parts(self, shape: tuple[int, int], dtype: torch.dtype, inputs: int) -> tuple[Part, ...]:
        """Return the bytes (outputs, groups of inputs, 16), and their scales (outputs, groups)."""
        groups = shape[1 - inputs], shape[inputs] // GROUP
        return Part("codes", torch.uint8, (*groups, GROUP // 2)), Part("scales", torch.uint8, groups)

    def pack(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], inputs: int) -> NoReturn:
        """Raise Refused."""
        never_made(self.name)

    def work_nbytes(self, shape: tuple[int, int]) -> int:
        """Return 4 bytes for each place in a table, and 4 for each number that is found there."""
        codes, scales = prod(shape) // 2, prod(shape) // GROUP
        return 12 * codes + 8 * scales

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, inputs: int, work: torch.Tensor) -> None:
        """Look up the two numbers of each byte and each scale, multiply, and turn the matrix if that is needed."""
        dtype = weight.dtype if weight.dtype == torch.bfloat16 else torch.float32
        codes, scales = parts["codes"], parts["scales"]
        grouped = *scales.shape, GROUP
        numbers, rest = _looked_up(codes, _pairs(dtype, weight.device), work)
        powers, _ = _looked_up(scales, _powers(dtype, weight.device), rest)
        numbers = numbers.view(dtype).view(grouped)
        numbers.mul_(powers.view(*scales.shape, 1))
        matrix = numbers.view(scales.shape[0], -1)
        weight.copy_(matrix if inputs else matrix.T)


def _looked_up(places: torch.Tensor, table: torch.Tensor, work: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a table's entries at these bytes, and what is left of the memory to work in."""
    count, width = places.numel(), table.element_size()
    index = work[: 4 * count].view(torch.int32)
    found = work[4 * count : (4 + width) * count].view(table.dtype)
    torch.index_select(table, 0, index.copy_(places.view(-1)), out=found)
    return found, work[(4 + width) * count :]


# Numbers are kept doubled and powers halved, which is exact: 2 to the 128th, of the largest byte, is infinite.


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return, for each byte, its two numbers times 2, as one integer."""
    doubled = 2 * torch.tensor([*POSITIVE, *(-value for value in POSITIVE)], dtype=dtype, device=device)
    pairs = torch.stack([doubled.repeat(16), doubled.repeat_interleave(16)], 1)
    return pairs.view(torch.int32 if dtype.itemsize == 2 else torch.int64).view(-1)


@cache
def _powers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return, for each byte, its scale over 2."""
    exponents = torch.arange(256, device=device) - BIAS - 1
    return torch.ldexp(torch.ones(256, device=device), exponents).to(dtype)
