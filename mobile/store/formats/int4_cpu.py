"""Rows of int4 in the order in which this processor multiplies them: the numbers of `int4`, computed with in place.

PyTorch's product for the CPU wants codes and scales in an order of its own, which depends on the processor's vector
instructions: 0.11 ms for a matrix of 2048 x 2048 and one token, where a bfloat16 product takes 0.5 and decoding int4
1.2. Nothing else reads that order, so decoding multiplies the identity, which is slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mobile.costs.rows import GROUP
from mobile.errors import Refused
from mobile.store.formats.int4 import LOWEST, grouped, least_error
from mobile.store.formats.row_format import Part

SIXTEEN = 16  # outputs that the product computes together at least


@dataclass(frozen=True)
class Int4Cpu:
    """Codes of 4 bits in groups of inputs, as `torch._weight_int4pack_mm_for_cpu` reads them; bfloat16 only."""

    name = "int4-cpu"

    def parts(self, shape: tuple[int, int], dtype: torch.dtype, inputs: int) -> tuple[Part, ...]:
        """Return the codes, two to a byte, and (groups, outputs, 2) of a scale and a zero that is 0.

        The first is named after the processor's instructions, so that a file of rows for others is not taken for it.
        Raise Refused for weights that the product does not take.
        """
        outputs, width = shape
        if dtype != torch.bfloat16 or inputs != 1 or width % GROUP or outputs % SIXTEEN:
            raise Refused(
                f"Rows of int4-cpu hold bfloat16 matrices (outputs, inputs) in multiples of {SIXTEEN} and {GROUP}, and "
                f"the model's are {shape[0]} x {shape[1]} of {str(dtype).removeprefix('torch.')}"
                f"{'' if inputs else ', transposed'}; use int4."
            )
        order = torch.backends.cpu.get_cpu_capability()
        scales = (width // GROUP, outputs, 2)
        return Part(f"codes for {order}", torch.uint8, (outputs, width // 2)), Part("scales", torch.bfloat16, scales)

    def pack(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], inputs: int) -> None:
        """Quantise as `int4` does, then have PyTorch put the codes in order."""
        scales, codes = least_error(grouped(weight.float(), inputs), inputs + 1)
        held, zeroed = _codes_and_scales(parts)
        zeroed[..., 0] = scales.squeeze(inputs + 1).t()
        zeroed[..., 1] = 0
        counted = (codes - LOWEST).to(torch.int32).view(weight.shape)
        held.copy_(torch._convert_weight_to_int4pack_for_cpu(counted, 1))

    def work_nbytes(self, shape: tuple[int, int]) -> int:
        """Return 0: the product allocates."""
        return 0

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, inputs: int, work: torch.Tensor) -> None:
        """Multiply the identity: each sum has one term that is not 0, so the weights come out exactly."""
        identity = torch.eye(weight.shape[1], dtype=weight.dtype)
        weight.copy_(self.multiply(identity, parts).t())

    def multiply(self, x: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return x (tokens, inputs) times the matrix, (tokens, outputs)."""
        held, zeroed = _codes_and_scales(parts)
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), held, GROUP, zeroed)


def _codes_and_scales(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    held, scales = parts.values()
    return held, scales
