"""A checkpoint's own packing of its experts, FP8 or MXFP4: its row format, and which tensor goes where in a row.

Everything is found in the headers, so it is known before a weight is fetched. The tensors are those that Transformers
dequantises, by its own renaming of keys. Whatever is packed in another way is left to its conversions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn

from mobile.checkpoints.direct import Reading, Renaming, in_natural_order, store_places
from mobile.checkpoints.headers import DTYPES, Stored
from mobile.errors import shortened
from mobile.live_model import compat
from mobile.store.formats.fp8 import Fp8
from mobile.store.formats.mxfp4 import GROUP, Mxfp4

PLAIN = ("F64", "F32", "F16", "BF16")
FP8_CODES = "F8_E4M3"
FP8_SCALES = ("F32", "BF16", "F16", "F8_E8M0")  # dtypes that are numbers; bytes that stand for exponents are not

BySource = Mapping[str, Sequence[Stored]]  # tensors of one experts weight, by the pattern of a converter, in order


@dataclass(frozen=True)
class OwnPacking:
    """The row format of a checkpoint's experts, and how each of their tensors is read."""

    format: Fp8 | Mxfp4
    readings: tuple[Reading, ...]


class Unkept(Exception):
    """The experts are packed in a way that rows do not keep; the message is the reason, a clause."""


def own_packing(
    empty: nn.Module, layers: Sequence[compat.MoeLayer], stored: Mapping[str, Stored], quantiser: Any
) -> OwnPacking | None:
    """Return how the experts are packed in the tensors `stored`, by key, or None if all of them are plain numbers.

    `quantiser` is Transformers' own. Raise Unkept where rows cannot keep that: Transformers then dequantises them, or
    refuses.
    """
    renaming, places = Renaming(empty, quantiser), store_places(layers)
    sources: dict[str, dict[str, list[Stored]]] = defaultdict(lambda: defaultdict(list))
    for key in in_natural_order(stored):
        target, pattern = renaming.target(key)
        if target in places:
            sources[target][pattern or ""].append(stored[key])
    if all(tensor.dtype in PLAIN for of in sources.values() for tensors in of.values() for tensor in tensors):
        return None
    formats: list[Fp8 | Mxfp4] = []
    readings: list[Reading] = []
    for target, (layer, weight) in places.items():
        of, shape = sources[target], tuple(renaming.state[target].shape)
        pattern = next(iter(of), None)
        if pattern is None:
            raise Unkept(f"there is no {target}")
        if pattern == "":  # only renamed
            readings.append(_as_it_is(of, layer, weight, shape))
            continue
        converter = renaming.converter_of[pattern]
        operations = [type(operation).__name__ for operation in converter.operations]
        if operations == ["Mxfp4Dequantize"]:
            formats.append(Mxfp4())
            readings += _mxfp4(of, layer, weight, shape)
        elif operations[:2] == ["Fp8Dequantize", "MergeModulelist"] and operations[2:] in ([], ["Concatenate"]):
            names = [name for name in converter.source_patterns if name.removesuffix("$").endswith(".weight")]
            found = _fp8(of, names, layer, weight, shape)
            formats.append(found.format)
            readings += found.readings
        else:
            raise Unkept(f"{target} is made by {', '.join(operations)}")
    return OwnPacking(_joined(formats), tuple(readings))


def _joined(formats: Sequence[Fp8 | Mxfp4]) -> Fp8 | Mxfp4:
    """Return the one format of all matrices. Raise Unkept if they differ: one slot holds any expert of any layer."""
    fp8 = [format for format in formats if isinstance(format, Fp8)]
    if not fp8:
        return formats[0]
    grids = {grid for format in fp8 for grid in format.grids}
    if len(fp8) < len(formats) or len({format.scales for format in fp8}) > 1 or len(dict(grids)) < len(grids):
        raise Unkept("its layers are not packed alike")
    return Fp8(fp8[0].scales, tuple(sorted(grids)))


def _as_it_is(of: BySource, layer: int, weight: str, shape: tuple[int, ...]) -> Reading:
    """Return the reading of a weight that is not packed: a bias, stacked."""
    tensor = of[""][0]
    if len(shape) > 2:
        raise Unkept(f"{shortened(tensor.key)} is {tensor.dtype}, which is not packed")
    if tensor.shape != shape or len(of) > 1 or len(of[""]) > 1:
        raise Unkept(f"{shortened(tensor.key)} has the shape {tensor.shape}")
    return Reading(tensor, layer, weight)


def _fp8(of: BySource, names: Sequence[str], layer: int, weight: str, shape: tuple[int, ...]) -> OwnPacking:
    """Return the readings of one matrix an expert, or of several (gate, up) that are joined along the rows.

    `names` are the patterns of the matrices. Each matrix has a grid of scales, of which one is for a block of
    (rows / grid rows) by (columns / grid columns) weights.
    """
    experts, rows, columns = shape
    rows, rest = divmod(rows, len(names))  # of one matrix
    readings, scales_of, grids = [], set(), set()
    for number, name in enumerate(names):
        matrices = of.get(name, ())
        scales = of.get(name.removesuffix("$") + "_scale_inv" + "$" * name.endswith("$"), ())
        if not len(matrices) == len(scales) == experts or rest:
            raise Unkept(
                f"{weight} has {len(matrices)} matrices and {len(scales)} grids of scales, for {experts} experts"
            )
        for expert, (matrix, scale) in enumerate(zip(matrices, scales, strict=True)):
            # A single scale is a grid of one, however its shape is written.
            high, wide = grid = scale.shape if len(scale.shape) == 2 else (1, 1)
            if matrix.dtype != FP8_CODES or scale.dtype not in FP8_SCALES:
                raise Unkept(f"{shortened(matrix.key)} is {matrix.dtype} with scales of {scale.dtype}")
            if matrix.shape != (rows, columns) or prod(scale.shape) != high * wide:
                raise Unkept(f"{shortened(matrix.key)} has the shape {matrix.shape} with scales of {scale.shape}")
            if not high or not wide or rows % high or columns % wide:
                raise Unkept(f"the shape of {shortened(matrix.key)} is no multiple of its blocks")
            scales_of.add(DTYPES[scale.dtype])
            grids.add((len(names) * high, wide))
            readings.append(Reading(matrix, layer, weight, expert, number * rows, part="codes"))
            readings.append(Reading(replace(scale, shape=grid), layer, weight, expert, number * high, part="scales"))
    if len(scales_of) > 1 or len(grids) > 1:
        raise Unkept(f"the scales of {weight} differ in shape or dtype")
    [dtype], [grid] = scales_of, grids
    return OwnPacking(Fp8(dtype, (((shape[1], columns), grid),)), tuple(readings))


def _mxfp4(of: BySource, layer: int, weight: str, shape: tuple[int, ...]) -> list[Reading]:
    """Return the readings of a weight (experts, inputs, outputs), whose blocks of 4-bit floats lie along the inputs.

    Blocks are (experts, outputs, inputs / 32, 16) bytes, and there is one scale a block. Each expert is read by itself.
    """
    experts, inputs, outputs = shape
    grid = experts, outputs, inputs // GROUP
    wanted = {"codes": (f"{weight}_blocks", (*grid, GROUP // 2)), "scales": (f"{weight}_scales", grid)}
    readings = []
    for part, (pattern, right) in wanted.items():
        tensors = of.get(pattern, ())
        if len(tensors) != 1 or inputs % GROUP:
            raise Unkept(f"{weight} has {len(tensors)} tensors of {part}, for {inputs} inputs")
        [tensor] = tensors
        if tensor.dtype != "U8" or tensor.shape != right:
            raise Unkept(f"{shortened(tensor.key)} is {tensor.dtype} of the shape {tensor.shape}")
        nbytes = tensor.nbytes // experts
        for expert in range(experts):
            one = replace(tensor, shape=right[1:], start=tensor.start + expert * nbytes, nbytes=nbytes)
            readings.append(Reading(one, layer, weight, expert, 0, part=part))
    return readings
