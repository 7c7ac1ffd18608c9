"""The kernel for packed rows: products with codes in place, without decoding a matrix. CPU, bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mobile.kernels.loop import Groups, HostExperts, Views, multiplied, one_by_one
from mobile.residency.residency import Wave
from mobile.store import PackedWeights, Weights
from mobile.store.formats import Int4Cpu

IN_PLACE = ("int8", "int4-cpu")  # row formats that it computes with
INPUTS = 32  # that a row's number must be a multiple of: with 8 or 24 PyTorch's product read past rows and crashed
FEW_PAIRS = 16  # tokens of one expert; at 64 the product with int8 in place took longer than decoding


def packed(
    module: Any,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    waves: Iterable[Wave],
    views: Views,
    host: HostExperts | None = None,
) -> torch.Tensor:
    """Compute as `loop` does, with matrices multiplied in place, int8 ones for few tokens. For arguments see `Kernel`.

    Equal to it up to rounding, 1e-2 of the largest output: scales meet sums, which are of products with whole numbers,
    not weights. Matrices of transposed experts are decoded, and those whose inputs are no multiple of INPUTS.
    """
    return one_by_one(module, hidden, weights, groups, waves, (views, host), _in_place)


def _in_place(module: Any, x: torch.Tensor, weights: Weights, slot: int) -> torch.Tensor:
    """Return x (pairs, inputs) times the matrix in a slot."""
    if isinstance(weights, PackedWeights) and isinstance(weights.format, Int4Cpu):
        return weights.format.multiply(x, {name: part[slot] for name, part in weights.parts.items()})
    in_place = isinstance(weights, PackedWeights) and weights.inputs == 1 and x.shape[1] % INPUTS == 0
    if not in_place or len(x) > FEW_PAIRS:
        return multiplied(module, x, weights, slot)
    assert isinstance(weights, PackedWeights)
    codes, scales = weights.parts["codes"][slot], weights.parts["scales"][slot].flatten()
    return torch._weight_int8pack_mm(x.contiguous(), codes, scales)


def why_not(device: torch.device, dtype: torch.dtype, rows: str) -> str | None:
    """Return why there is no product in place, in words; None where there is.

    In float32 and float16 PyTorch's takes 5 to 9 times as long as decoding.
    """
    if rows not in IN_PLACE:
        return f"rows are {rows} and not {' or '.join(IN_PLACE)}"
    if device.type != "cpu":
        return f"it computes on the CPU, and the model is on {device}"
    if dtype != torch.bfloat16:
        return f"it is one in bfloat16 only, and weights are {str(dtype).removeprefix('torch.')}"
    return None
