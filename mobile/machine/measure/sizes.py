"""The sizes that a calibration times: large ones on a GPU or a disk, smaller ones on a CPU, tiny ones in tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """The matrices, experts and models to time, and how often.

    Experts are `hidden` by each of `widths`; a model has `experts` a layer, of which `top_k` run. Rows are read in turn
    from `pool_nbytes`, so that no cache holds them. A timing is the least of `repeats` rounds, or if
    `typical` their median, each of as many runs as take `at_least_seconds`. `matmul` is the side of the square product,
    `tokens` the decode steps of a round.
    """

    hidden: int
    widths: tuple[int, ...]
    reads_nbytes: tuple[int, ...]
    pool_nbytes: int
    matmul: int
    depths: tuple[int, ...]
    experts: int = 16
    top_k: int = 8
    tokens: int = 24
    repeats: int = 5
    at_least_seconds: float = 0.05
    typical: bool = False


# A GPU is read in pieces large enough to outlast their launch. Widths give rows like the real families'.
ON_GPU = Sizes(
    hidden=2048,
    widths=(512, 768, 1024, 1408, 2048, 4096),
    reads_nbytes=(64 * MIB, 128 * MIB, 256 * MIB),
    pool_nbytes=512 * MIB,
    matmul=8192,
    depths=(2, 4, 8),
)
ON_CPU = Sizes(
    hidden=512,
    widths=(128, 256, 512, 1024),
    reads_nbytes=(4 * MIB, 8 * MIB, 16 * MIB),
    pool_nbytes=64 * MIB,
    matmul=512,
    depths=(1, 3),
    tokens=8,
    repeats=9,
    at_least_seconds=0.004,
)
# A disk is read in rows of the real families, and experts as large: a cache would hold smaller ones. A CPU computes
# them beside all else that the machine does, so the usual time counts and not the least.
ON_DISK = Sizes(
    hidden=2048,
    widths=(512, 768, 1024, 1408, 4096),
    reads_nbytes=(64 * MIB, 128 * MIB, 256 * MIB),
    pool_nbytes=256 * MIB,
    matmul=1024,
    depths=(1, 3),
    tokens=8,
    repeats=5,
    at_least_seconds=0.03,
    typical=True,
)

# For tests: the same code in seconds. The profile is too rough for anything else.
NARROW = Sizes(
    hidden=256,
    widths=(32, 128, 512),
    reads_nbytes=(MIB // 4, MIB, 4 * MIB),
    pool_nbytes=16 * MIB,
    matmul=64,
    depths=(1, 2),
    experts=4,
    top_k=2,
    tokens=4,
    repeats=15,
    at_least_seconds=0.001,
)


def sizes_for(device: torch.device, *, on_disk: bool = False) -> Sizes:
    """Return the sizes to time on this device, with rows in memory or on a disk."""
    if on_disk:
        return ON_DISK
    return ON_GPU if device.type == "cuda" else ON_CPU
