"""The stopwatch of a calibration: how long one run of some work takes on a device, its launches not counted."""

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


SLEEP_HZ = 2_500_000_000  # cycles a second of the fastest cards: on a slower one the device sleeps longer, never less
QUEUED = 8  # runs that wait behind a sleeping device; its queue holds some 1,000 launches


def seconds_of(device: torch.device, jobs: Sequence[Callable[[int], Any]], sizes: Sizes) -> list[float]:
    """Return, for each job, the seconds of one run, of `sizes.repeats` rounds the one that `of_rounds` takes.

    A job is called with a number that counts up, by which it takes turns among its data. All jobs take turns in each
    round, so that other load on the machine slows all of them; it only adds time, so the least is nearest to what the
    device can do. On a GPU it is the device's own time: launching beside it is the host's.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            rounds = [[_device_seconds(device, job) for job in jobs] for _ in range(sizes.repeats + 1)]
        return [of_rounds(seconds, sizes) for seconds in zip(*rounds[1:], strict=True)]  # the first warms up
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


def _device_seconds(device: torch.device, job: Callable[[int], Any]) -> float:
    """Return the seconds of one of QUEUED runs, all of which are launched while the device, the current one, sleeps."""
    idle(device)
    begun = time.perf_counter()
    for number in range(QUEUED):
        job(number)
    launching = time.perf_counter() - begun
    idle(device)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(round(2 * launching * SLEEP_HZ))
    before.record()
    for number in range(QUEUED):
        job(QUEUED + number)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / QUEUED


def of_rounds(seconds: Sequence[float], sizes: Sizes) -> float:
    """Return the one time that stands for those of several rounds."""
    return statistics.median(seconds) if sizes.typical else min(seconds)
