"""The stopwatch of a calibration: how long one run of some work takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mobile.machine.measure.sizes import Sizes


def idle(device: torch.device) -> None:
    """Wait until the device has done all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, jobs: Sequence[Callable[[int], Any]], sizes: Sizes) -> list[float]:
    """Return, for each job, the seconds of one run, of `sizes.repeats` rounds the one that `of_rounds` takes.

    A job is called with a number that counts up, by which it takes turns among its data. All jobs take turns in each
    round, so that other load on the machine slows all of them; it only adds time, so the least is nearest to what the
    device can do.
    """
    batches, numbers = [1] * len(jobs), [0] * len(jobs)

    def run_batch(job: int) -> float:
        idle(device)
        begun = time.perf_counter()
        for _ in range(batches[job]):
            jobs[job](numbers[job])
            numbers[job] += 1
        idle(device)
        return time.perf_counter() - begun

    for job in range(len(jobs)):
        # 1. Warm up: memory is allocated and kernels are compiled in the first run.
        run_batch(job)
        # 2. Grow the batch until it takes long enough for the clock; never more than fourfold at once, since the first
        #    batches may be slow.
        while (seconds := run_batch(job)) < sizes.at_least_seconds:
            wanted = round(1.2 * batches[job] * sizes.at_least_seconds / max(seconds, 1e-6))
            batches[job] = min(4 * batches[job], max(batches[job] + 1, wanted))
    # 3. Time all jobs in turn, some rounds over.
    rounds = [[run_batch(job) / batches[job] for job in range(len(jobs))] for _ in range(sizes.repeats)]
    return [of_rounds(seconds, sizes) for seconds in zip(*rounds, strict=True)]


def of_rounds(seconds: Sequence[float], sizes: Sizes) -> float:
    """Return the one time that stands for those of several rounds."""
    return statistics.median(seconds) if sizes.typical else min(seconds)
