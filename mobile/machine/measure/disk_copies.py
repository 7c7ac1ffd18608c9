"""Rows read from a disk, timed on the engine's own channel, and what a busy disk and a busy processor cost each other.

A row's time is its share of an unbroken run: with several reads at once, rows end in bursts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mobile.links.disk import best_depth
from mobile.links.stream import Channel
from mobile.links.threads import ThreadChannel
from mobile.machine.disk import reads_directly, rows_on_disk
from mobile.machine.fit_profile import Timing
from mobile.machine.measure.kernels import wave_of_experts
from mobile.machine.measure.sizes import Sizes
from mobile.machine.measure.timing import of_rounds

ROUNDS = 2  # for each of a kernel's: a disk is less steady, and a median needs more than a minimum


class DiskCopies(NamedTuple):
    """The seconds of a row of each width, and how they were read, in words; what kernels and rows cost each other.

    `kernels_beside` is by what factor kernels take longer while rows are read, `rows_beside` the reverse.
    """

    timings: tuple[Timing, ...]
    about: str
    kernels_beside: float
    rows_beside: float


def time_disk_copies(folder: Path, dtype: torch.dtype, sizes: Sizes) -> DiskCopies:
    """Time rows of each width from a file in the folder, at the depth that the link would choose for them.

    Of the rounds `of_rounds` takes a time. Raise Refused if the folder cannot take the files.
    """
    with ExitStack() as opened:
        timed, depths = [], []
        for width in sizes.widths:
            nbytes = 3 * sizes.hidden * width * dtype.itemsize
            count = max(sizes.top_k, sizes.pool_nbytes // nbytes)
            ends = opened.enter_context(rows_on_disk(folder, nbytes, count))
            depths.append(best_depth(ends))
            channel = ThreadChannel(ends.fill, depths[-1])
            opened.callback(channel.close)
            timed.append((ends.row_nbytes, count, channel))
        rounds = [[_row_seconds(count, channel) for _, count, channel in timed] for _ in range(ROUNDS * sizes.repeats)]
        taken = [of_rounds(seconds, sizes) for seconds in zip(*rounds, strict=True)]
        middle = len(timed) // 2
        wave, _ = wave_of_experts(sizes.widths[middle], torch.device("cpu"), dtype, sizes)
        kernels, rows = _beside(timed[middle][1], timed[middle][2], wave, ROUNDS * sizes.repeats)
        direct = reads_directly(ends)
    past = "past the page cache" if direct else "through the page cache, since the file system takes no direct reads"
    return DiskCopies(
        tuple(Timing(nbytes, 1, seconds) for (nbytes, _, _), seconds in zip(timed, taken, strict=True)),
        f"rows of a file, read {past}, {', '.join(map(str, depths))} at once",
        kernels,
        rows,
    )


def _row_seconds(count: int, channel: Channel) -> float:
    """Return the seconds of a row in an unbroken run of `count` of them."""
    begun = time.perf_counter()
    _begin(count, channel)
    for slot in range(count):
        channel.fence(slot)
    return (time.perf_counter() - begun) / count


def _begin(count: int, channel: Channel) -> None:
    for slot in range(count):
        channel.begin((0, slot), slot)


@torch.no_grad()
def _beside(count: int, channel: Channel, wave: Callable[[int], Any], repeats: int) -> tuple[float, float]:
    """Return by what factor a wave of experts slows down beside a busy link, and a row beside waves; medians."""
    kernels, rows = [], []
    wave(0)
    for _ in range(repeats):
        # 1. Rows alone, then waves beside rows, until the last row is there.
        row = _row_seconds(count, channel)
        waves, begun = 0, time.perf_counter()
        _begin(count, channel)
        while not all(channel.ended(slot) for slot in range(count)):
            wave(waves)
            waves += 1
        both = time.perf_counter() - begun
        rows.append((max(channel.span(slot)[1] for slot in range(count)) / 1e9 - begun) / count / row)
        # 2. As many waves alone.
        waves, begun = max(1, waves), time.perf_counter()
        for number in range(waves):
            wave(number)
        kernels.append(both / (time.perf_counter() - begun))
    return statistics.median(kernels), statistics.median(rows)
