"""Rows of a checkpoint in FP8: a float of 8 bits for each weight, and a grid of scales, one a block of weights.

Decoded as Transformers dequantises them (`Fp8Dequantize`): both in float32, multiplied, then rounded to the weights'
dtype. Such rows are read from a checkpoint and never made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NoReturn

import torch

from mobile.store.formats.row_format import Part, never_made


@dataclass(frozen=True)
class Fp8:
    """Floats of 8 bits (e4m3fn) with scales of `scales`; `grids` has, by a matrix's shape, that of its grid."""

    scales: torch.dtype
    grids: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    name = "fp8"

    def parts(self, shape: tuple[int, int], dtype: torch.dtype, inputs: int) -> tuple[Part, ...]:
        """Return codes of the matrix's shape, and its grid of scales."""
        return Part("codes", torch.float8_e4m3fn, shape), Part("scales", self.scales, dict(self.grids)[shape])

    def pack(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], inputs: int) -> NoReturn:
        """Raise Refused."""
        never_made(self.name)

    def work_nbytes(self, shape: tuple[int, int]) -> int:
        """Return 4 bytes a weight for it in float32, and 4 for the places of two in a table."""
        return 6 * prod(shape) + 2

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, inputs: int, work: torch.Tensor) -> None:
        """Make float32 of the codes, and multiply each block by its scale.

        On a CPU two codes at once are looked up in a table: PyTorch's own conversion of a matrix of 1,536 by 2,048 took
        8.1 ms, and all of this takes 2.4.
        """
        codes, scales = parts["codes"], parts["scales"].float()
        count = codes.numel()
        exact = work[: 4 * count].view(torch.float32)
        if codes.device.type == "cpu" and count % 2 == 0:
            places = work[4 * count : 6 * count].view(torch.int32)
            places.copy_(codes.view(-1).view(torch.uint8).view(torch.uint16))
            torch.index_select(_pairs(), 0, places, out=exact.view(torch.int64))
        else:
            exact.view(codes.shape).copy_(codes)
        high, wide = scales.shape
        blocks = high, codes.shape[0] // high, wide, codes.shape[1] // wide
        torch.mul(exact.view(blocks), scales[:, None, :, None], out=weight.view(blocks))


@cache
def _pairs() -> torch.Tensor:
    """Return, for each two bytes, the two float32 numbers that they stand for, as one int64."""
    codes = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.uint8)
    return codes.view(torch.float8_e4m3fn).to(torch.float32).view(torch.int64)
