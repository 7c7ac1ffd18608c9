"""Rows of int8: a code for each weight, and a scale for each output, w = code x scale. Needs no calibration data.

Scales are of the weights' dtype, not float32: a bfloat16 matrix times float32 scales took 14 ms where this takes 0.9,
and what comes out is rounded to bfloat16 in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mobile.store.formats.row_format import Part

LARGEST = 127  # code; -128 is left out, so that codes are symmetric


@dataclass(frozen=True)
class Int8:
    """Symmetric codes of 8 bits, one scale an output."""

    name = "int8"

    def parts(self, shape: tuple[int, int], dtype: torch.dtype, inputs: int) -> tuple[Part, ...]:
        """Return codes of the matrix's shape, and its scales, (outputs, 1) or (1, outputs)."""
        outputs = (shape[0], 1) if inputs else (1, shape[1])
        return Part("codes", torch.int8, shape), Part("scales", dtype, outputs)

    def pack(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], inputs: int) -> None:
        """Scale each output's largest weight to 127, and round."""
        exact = weight.float()
        scales = (exact.abs().amax(inputs, keepdim=True) / LARGEST).to(parts["scales"].dtype)
        parts["scales"].copy_(scales)
        used = scales.float()
        codes = exact / used.where(used != 0, 1)
        parts["codes"].copy_(codes.round_().clamp_(-LARGEST, LARGEST))

    def work_nbytes(self, shape: tuple[int, int]) -> int:
        """Return 0: codes become numbers where they are to be."""
        return 0

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, inputs: int, work: torch.Tensor) -> None:
        """Multiply codes and scales. Two passes are faster than one that casts meanwhile."""
        weight.copy_(parts["codes"])
        weight.mul_(parts["scales"])
