"""What a card's link costs: page-locking, copies, launches, and reading a result while the link is busy or idle.

`python -m suites.first_contact.link_probe --findings FILE` adds one finding after another to the file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mobile.links import page_lock
from mobile.machine.measure.ahead import launch_seconds
from mobile.machine.measure.sizes import sizes_for
from suites.first_contact.findings import Finding, append

KIB, MIB, GB = 2**10, 2**20, 1e9
ROW_NBYTES = 12 * MIB  # an expert of OLMoE-1B-7B in bfloat16
QUEUED = 32  # copies, beside which a result is read
Say = Callable[[Finding], None]


@dataclass(frozen=True)
class ProbeSizes:
    """Bytes that are page-locked and copied from, of each copy and of a row, and how often each thing is timed."""

    block_nbytes: int = 2**31
    copies_nbytes: tuple[int, ...] = (4 * KIB, MIB, 6 * MIB, ROW_NBYTES, 32 * MIB, 256 * MIB)
    row_nbytes: int = ROW_NBYTES
    repeats: int = 200
    warm_up_seconds: float = 0.5  # an idle link sleeps


class Probe:
    """Memory on both sides of a device's link, and a stream for its copies."""

    def __init__(self, device: torch.device, sizes: ProbeSizes, part: str, say: Say) -> None:
        """Touch the host's memory, and make the device's context, which is not to be timed."""
        self.device, self.sizes, self.part, self.say = device, sizes, part, say
        self.block = torch.ones(sizes.block_nbytes, dtype=torch.uint8)
        self.target = torch.zeros(max(sizes.copies_nbytes), dtype=torch.uint8, device=device)
        self.small = torch.arange(64, device=device)
        self.stream = torch.cuda.Stream(device)

    def measured(self, name: str, value: float, unit: str, detail: str = "", *, first: bool = False) -> None:
        self.say(Finding(self.part, "measured", name, value, unit, detail, first))

    def all(self) -> None:
        """Time all of it, and say each thing as soon as it is known."""
        gigabytes = self.block.nbytes / GB
        torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        refused = page_lock.register(self.block, self.device)
        taken = time.perf_counter() - begun
        if refused is None:
            about = f"{gigabytes:.2f} GB in one block, its pages touched before"
            self.measured("cudaHostRegister, a GB", taken / gigabytes, "s", about, first=True)
        else:
            about = f"{refused}; copies below read ordinary memory"
            self.say(Finding(self.part, "failed", "cudaHostRegister", detail=about))
        try:
            self.link()
            self.launches()
            self.reading()
        finally:
            if refused is None:
                begun = time.perf_counter()
                page_lock.unregister(self.block.data_ptr(), self.device)
                self.measured("cudaHostUnregister, a GB", (time.perf_counter() - begun) / gigabytes, "s")

    def link(self) -> None:
        """Time copies one after another, by the card's clock and by the host's."""
        begun = time.perf_counter()
        while time.perf_counter() - begun < self.sizes.warm_up_seconds:
            self._copies(self.sizes.row_nbytes, 8)
        for nbytes in self.sizes.copies_nbytes:
            on_link, on_host = self._copies(nbytes, self.sizes.repeats)
            name, smallest = _size(nbytes), nbytes == min(self.sizes.copies_nbytes)
            rate, is_row = nbytes / on_link / GB, nbytes == self.sizes.row_nbytes
            self.measured(f"copies of {name}, one after another", rate, "GB/s", first=is_row)
            self.measured(f"a copy of {name}, on the link", on_link * 1e6, "us", first=smallest)
            self.measured(f"a copy of {name}, on the host", on_host * 1e6, "us", "to ask for it")

    def _copies(self, nbytes: int, repeats: int) -> tuple[float, float]:
        """Return the seconds of a copy of so many bytes on the link, and those that the host takes to ask for it.

        Rows lie behind one another, so that no cache holds them, and queue up behind a long copy, so that the link
        never waits for the host.
        """
        rows = max(1, self.block.nbytes // nbytes)
        count = max(4, min(repeats, 4 * rows))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            self._copy(self.target.nbytes, 0)
            start.record(self.stream)
            begun = time.perf_counter()
            for number in range(count):
                self._copy(nbytes, number % rows)
            host = time.perf_counter() - begun
            end.record(self.stream)
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3 / count, host / count

    def _copy(self, nbytes: int, row: int) -> None:
        self.target[:nbytes].copy_(self.block[row * nbytes : (row + 1) * nbytes], non_blocking=True)

    def launches(self) -> None:
        """Time the rest of what a layer asks of the card: the host's time, as it waits for none of it."""
        launch = launch_seconds(self.device, torch.bfloat16, sizes_for(self.device))  # as a calibration has it
        self.measured("a kernel launch, on the host", launch * 1e6, "us")
        torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        for _ in range(self.sizes.repeats):
            self.stream.wait_event(self._recorded())
        taken = (time.perf_counter() - begun) / self.sizes.repeats
        self.measured("an event made, recorded and waited for by a stream, on the host", taken * 1e6, "us")

    def _recorded(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def reading(self) -> None:
        """Time how long a result takes to the host, as a router's choice does before its experts can be asked for."""
        kept = self.block[: self.small.nbytes].view(self.small.dtype)

        def by_page_locked_memory() -> None:
            kept.copy_(self.small + 1, non_blocking=True)
            self._recorded().synchronize()
            kept.tolist()

        ways: dict[str, Callable[[], object]] = {
            ".tolist() of 64 numbers": lambda: (self.small + 1).tolist(),
            "64 numbers by way of page-locked memory": by_page_locked_memory,
        }
        for name, read in ways.items():
            idle = [_seconds(read) for _ in range(self.sizes.repeats)]
            for state, seconds in (("idle", idle), ("beside copies", self._beside_copies(read))):
                if not seconds:
                    self.say(Finding(self.part, "note", f"{name}, {state}: not timed", detail="copies were over first"))
                    continue
                spread = f"median of {len(seconds)}, {min(seconds) * 1e6:.1f} to {max(seconds) * 1e6:.1f}"
                self.measured(f"{name}, {state}", statistics.median(seconds) * 1e6, "us", spread, first=True)

    def _beside_copies(self, read: Callable[[], object]) -> list[float]:
        """Return the seconds of each reading during all of which copies of rows were on their way."""
        found: list[float] = []
        rows = max(1, self.block.nbytes // self.sizes.row_nbytes)
        for _ in range(self.sizes.repeats):
            with torch.cuda.stream(self.stream):
                for number in range(QUEUED):
                    self._copy(self.sizes.row_nbytes, number % rows)
                over = torch.cuda.Event()
                over.record(self.stream)
            while not over.query() and len(found) < self.sizes.repeats:
                seconds = _seconds(read)
                if not over.query():
                    found.append(seconds)
            over.synchronize()
            if len(found) >= self.sizes.repeats:
                break
        return found


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--findings", type=Path, required=True, metavar="FILE")
    parser.add_argument("--part", default="link")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    Probe(device, ProbeSizes(), options.part, partial(append, options.findings)).all()


if __name__ == "__main__":
    main()
