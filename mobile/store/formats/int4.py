"""Rows of int4: a code of 4 bits for each weight, and a scale for each group of 32 inputs, w = code x scale.

Codes are -8 to 7, two to a byte. Needs no calibration data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from mobile.costs.rows import group_of
from mobile.store.formats.row_format import Part

LOWEST, HIGHEST = -8, 7
UPPER = -16  # the upper four bits of a byte
STEPS = (1.0, 0.92)  # tried, as shares; of random weights these two lost 0.0935 of the norm, one 0.0956, six 0.0925


@dataclass(frozen=True)
class Int4:
    """Codes of 4 bits in groups of inputs. Scales are kept by a sixteenth: codes are decoded in a byte's upper half."""

    name = "int4"

    def parts(self, shape: tuple[int, int], dtype: torch.dtype, inputs: int) -> tuple[Part, ...]:
        """Return the bytes (weights / 2,) and the scales, the matrix's shape with groups in place of inputs.

        The lower halves of the bytes are the codes of the first half of the matrix, the upper ones those of the second.
        """
        groups = list(shape)
        groups[inputs] //= group_of(shape[inputs])
        scales = torch.float16 if dtype == torch.float16 else torch.bfloat16
        return Part("codes", torch.uint8, (-(-prod(shape) // 2),)), Part("scales", scales, (groups[0], groups[1]))

    def pack(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], inputs: int) -> None:
        """Round to the codes, and take the scale, of least squared error among a few."""
        scales, codes = least_error(grouped(weight.float(), inputs), inputs + 1)
        parts["scales"].copy_((scales / -UPPER).squeeze(inputs + 1))
        flat, half = codes.reshape(-1).to(torch.int8), len(parts["codes"])
        packed = parts["codes"].view(torch.int8)
        packed.copy_(flat[:half] & 15)
        packed[: len(flat) - half].bitwise_or_(flat[half:] << 4)

    def work_nbytes(self, shape: tuple[int, int]) -> int:
        """Return a byte a weight."""
        return prod(shape)

    def unpack(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, inputs: int, work: torch.Tensor) -> None:
        """Move each code into the upper half of a byte, make numbers of those, and scale them.

        A table of pairs of numbers for each byte took a fifth longer, and codes of neighbours in one byte twice as
        long.
        """
        packed, codes = parts["codes"].view(torch.int8), work.view(torch.int8)
        half = len(packed)
        torch.bitwise_left_shift(packed, 4, out=codes[:half])
        torch.bitwise_and(packed[: len(codes) - half], UPPER, out=codes[half:])
        weight.view(-1).copy_(codes)
        grouped(weight, inputs).mul_(parts["scales"].to(weight.dtype).unsqueeze(inputs + 1))


def grouped(weight: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return the matrix with its axis of inputs cut into (groups, inputs of each)."""
    group = group_of(weight.shape[inputs])
    return weight.unflatten(inputs, (-1, group))


def least_error(grouped: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales, of size 1 on the `axis` of each group's weights, and codes.

    1. A try rounds to multiples of a step: the weight of largest size gets the code -8, so that the step has its sign;
       or, with a smaller step, it is cut off for the others' sake.
    2. With codes c the best scale for weights w is <c, w> / <c, c>, and its squared error <w, w> - <c, w>^2 / <c, c>.
    3. The try of least error is taken, for each group.
    """
    largest = grouped.gather(axis, grouped.abs().argmax(axis, keepdim=True)) / LOWEST
    per_step = 1 / largest.where(largest != 0, 1)
    best: tuple[torch.Tensor, ...] | None = None
    for step in STEPS:
        codes = (grouped * (per_step / step)).round_().clamp_(LOWEST, HIGHEST)
        fits = (codes * grouped).sum(axis, keepdim=True)
        squares = (codes * codes).sum(axis, keepdim=True).clamp_min_(1)
        tried = (fits * fits / squares, fits / squares, codes)
        if best is None:
            best = tried
        else:
            better = tried[0] > best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
    assert best is not None
    return best[1], best[2]
