"""Row formats by name, and the bytes that an expert's weights take in each. Arithmetic only, no torch.

`as-is` keeps weights as the model has them. `int8` has a code a weight and a scale an output row, `int4` half a byte a
weight and a scale for each group of GROUP inputs; `int4-cpu` is the same in the order that a processor multiplies in
place. Biases and the like stay as they are. Rows as they are may be packed in a checkpoint's own way, `fp8` or `mxfp4`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from mobile.errors import Refused
from mobile.suggest import offer

AS_IS = "as-is"
GROUP = 32  # inputs that share a scale in int4


@dataclass(frozen=True)
class RowCost:
    """A format's share of a step's cost: decoding an expert into scratch memory.

    `scratch_passes` is how often the decoded weights go through memory, the product's own read included, and
    `launches` the kernels of decoding both of an expert's matrices.
    """

    scratch_passes: int
    launches: int


# Both write the codes as numbers, read and write them to scale them in place, and read them for the product. int4 first
# writes and reads its codes as bytes of their own, which is as much as another pass of 16-bit weights.
ROW_COSTS: dict[str, RowCost] = {
    AS_IS: RowCost(scratch_passes=0, launches=0),
    "int8": RowCost(scratch_passes=4, launches=4),
    "int4": RowCost(scratch_passes=5, launches=8),
    "int4-cpu": RowCost(scratch_passes=0, launches=0),
}
# A checkpoint's own packing, which nobody chooses by name. Codes become float32 numbers, which take two passes of
# bfloat16 ones, in FP8; pairs of numbers that are looked up, scaled and turned in MXFP4.
OWN_ROW_COSTS: dict[str, RowCost] = {
    "fp8": RowCost(scratch_passes=6, launches=4),
    "mxfp4": RowCost(scratch_passes=8, launches=12),
}


def check_rows(rows: str) -> str:
    """Return the name of a row format. Raise Refused for an unknown one."""
    if not isinstance(rows, str) or rows not in ROW_COSTS:
        raise Refused(
            f"Unknown row format {rows!r}; {offer(rows, list(ROW_COSTS), 'choose as-is, int8, int4 or int4-cpu')}."
        )
    return rows


def group_of(inputs: int) -> int:
    """Return the inputs that share a scale in int4: GROUP, or the largest power of two below it that divides them.

    Widths of published models are multiples of GROUP.
    """
    return gcd(inputs, GROUP)


def packed_nbytes(rows: str, weights: int, outputs: int, weight_nbytes: int) -> int:
    """Return the bytes of an expert of so many `weights`, in matrices that have `outputs` rows together.

    Scales take `weight_nbytes` each in int8, 2 in int4 and 4 in int4-cpu, where inputs are multiples of GROUP. Raise
    Refused for an unknown format.
    """
    if check_rows(rows) == "int8":
        return weights + outputs * weight_nbytes
    if rows == "int4":
        return weights // 2 + weights // GROUP * 2
    if rows == "int4-cpu":
        return weights // 2 + weights // GROUP * 4
    return weights * weight_nbytes
