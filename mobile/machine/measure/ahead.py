"""The host's own time on a GPU: to launch a kernel, to begin a copy that the device waits for, to read a result."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from mobile.ledger import Ledger
from mobile.links.stream import COMMITTED, Channel, StreamLink
from mobile.machine.measure.sizes import Sizes
from mobile.machine.measure.timing import idle

LAUNCHES = 300  # in a run: fewer than the device's queue holds, at which the host would wait


def launch_seconds(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    """Return the host's seconds to launch one small operator of a decode step, the least of some runs.

    A product, an activation and a multiplication take turns; the device has less to do than the host.
    """
    x, weight = torch.ones(1, 64, dtype=dtype, device=device), torch.ones(64, 64, dtype=dtype, device=device)

    def run() -> None:
        for _ in range(LAUNCHES // 3):
            nn.functional.silu(nn.functional.linear(x, weight)) * x

    return _least_seconds(device, run, sizes) / (LAUNCHES // 3 * 3)


def copy_seconds(device: torch.device, channel: Channel, row_nbytes: int, sizes: Sizes) -> float:
    """Return the host's seconds of one copy: to submit it, to begin it, and to have compute wait for it.

    As many as may be begun at once are: at one more the host would wait. `channel` has as many slots.
    """
    link = StreamLink(channel, row_nbytes, Ledger(0), lambda key, slot: None)

    def run() -> None:
        for number in range(COMMITTED):
            link.submit((0, number), number, demand=True)
        for number in range(COMMITTED):
            link.wait((0, number))
        link.used(range(COMMITTED))

    return _least_seconds(device, run, sizes) / COMMITTED


def read_seconds(device: torch.device, sizes: Sizes) -> float:
    """Return the host's seconds to read a few numbers that an idle device has, the least of some runs."""
    numbers = torch.arange(8, device=device)
    return _least_seconds(device, numbers.tolist, sizes)


def _least_seconds(device: torch.device, run: Callable[[], object], sizes: Sizes) -> float:
    """Return the host's seconds of a run on an idle device, the least of as many as are timed elsewhere and 20 more."""
    seconds = []
    for _ in range(sizes.repeats + 20):
        idle(device)
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    idle(device)
    return min(seconds)
