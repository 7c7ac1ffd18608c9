"""What a card's link costs: page-locking, copies, launches, and reading a result while the link is busy or idle.

`python -m suites.first_contact.link_probe --findings FILE` adds one finding after another to the file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mobile.links import page_lock
from suites.first_contact.findings import Finding, append

KIB, MIB, GB = 2**10, 2**20, 1e9
ROW_NBYTES = 12 * MIB  # an expert of OLMoE-1B-7B in bfloat16
Say = Callable[[Finding], None]


@dataclass(frozen=True)
class ProbeSizes:
    """Bytes that are page-locked and copied from, of each copy, and how often each thing is timed."""

    block_nbytes: int = 2**31
    copies_nbytes: tuple[int, ...] = (4 * KIB, MIB, 6 * MIB, ROW_NBYTES, 32 * MIB, 256 * MIB)
    row_nbytes: int = ROW_NBYTES
    repeats: int = 200
    warm_up_seconds: float = 0.5  # an idle link sleeps


def probe(device: torch.device, sizes: ProbeSizes, part: str, say: Say) -> None:
    """Time all of it on one device, and say each thing as soon as it is known."""

    def measured(name: str, value: float, unit: str, detail: str = "", *, first: bool = False) -> None:
        say(Finding(part, "measured", name, value, unit, detail, first))

    # 1. Page-lock memory whose pages are there already, as the host store does.
    block = torch.ones(sizes.block_nbytes, dtype=torch.uint8)
    torch.zeros(1, device=device)  # makes the context, which is not to be timed
    begun = time.perf_counter()
    refused = page_lock.register(block, device)
    taken = time.perf_counter() - begun
    if refused is None:
        about = f"{block.nbytes / GB:.2f} GB in one block, touched before"
        measured("cudaHostRegister, a GB", taken / (block.nbytes / GB), "s", about, first=True)
    else:
        say(Finding(part, "failed", "cudaHostRegister", detail=f"{refused}; copies below read ordinary memory"))
    try:
        # 2. Copies of rows one after another, by the card's clock and by the host's.
        target = torch.empty(max(sizes.copies_nbytes), dtype=torch.uint8, device=device)
        stream = torch.cuda.Stream(device)
        _warm_up(block, target, stream, device, sizes)
        for nbytes in sizes.copies_nbytes:
            seconds, host = _copies(block, target[:nbytes], stream, device, sizes.repeats)
            name, row = _size(nbytes), nbytes == sizes.row_nbytes
            measured(f"copies of {name}, one after another", nbytes / seconds / GB, "GB/s", first=row)
            measured(f"a copy of {name}, on the link", seconds * 1e6, "us", first=nbytes == min(sizes.copies_nbytes))
            measured(f"a copy of {name}, on the host", host * 1e6, "us", "asking for it")
        # 3. Everything else that a layer asks the card for.
        small = torch.arange(64, device=device)
        for name, action in {
            "a kernel launch": lambda: small.add_(0),
            "an event recorded and waited for": lambda: stream.wait_event(
                torch.cuda.current_stream(device).record_event()
            ),
        }.items():
            measured(f"{name}, on the host", _host_seconds(action, device, sizes.repeats) * 1e6, "us")
        # 4. Reading a result: what a router's choice costs before its experts can be asked for.
        idle = [_seconds(lambda: (small + 1).tolist()) for _ in range(sizes.repeats)]
        busy = _while_copying(block, target, stream, sizes, lambda: (small + 1).tolist())
        for name, seconds_of, row in (("idle", idle, True), ("beside copies", busy, True)):
            if seconds_of:
                low, middle, high = (
                    statistics.quantiles(seconds_of, n=20)[0],
                    statistics.median(seconds_of),
                    max(seconds_of),
                )
                spread = f"median of {len(seconds_of)}; a twentieth below {low * 1e6:.1f}, at most {high * 1e6:.1f}"
                measured(f".tolist() of 64 numbers, {name}", middle * 1e6, "us", spread, first=row)
            else:
                say(Finding(part, "note", f".tolist(), {name}: not timed", detail="copies were over too soon"))
    finally:
        if refused is None:
            begun = time.perf_counter()
            page_lock.unregister(block.data_ptr(), device)
            measured("cudaHostUnregister, a GB", (time.perf_counter() - begun) / (block.nbytes / GB), "s")


def _warm_up(
    block: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream, device: torch.device, sizes: ProbeSizes
) -> None:
    begun = time.perf_counter()
    while time.perf_counter() - begun < sizes.warm_up_seconds:
        _copies(block, target[: sizes.row_nbytes], stream, device, 8)


def _copies(
    block: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream, device: torch.device, repeats: int
) -> tuple[float, float]:
    """Return the seconds of a copy on the link, and of asking for one, over copies of as many bytes as `target` has.

    Rows lie behind one another, so that no cache holds them.
    """
    rows = max(1, block.nbytes // target.nbytes)
    count = max(4, min(repeats, 4 * rows))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        start.record(stream)
        begun = time.perf_counter()
        for number in range(count):
            first = number % rows * target.nbytes
            target.copy_(block[first : first + target.nbytes], non_blocking=True)
        host = time.perf_counter() - begun
        end.record(stream)
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / count, host / count


def _while_copying(
    block: torch.Tensor,
    target: torch.Tensor,
    stream: torch.cuda.Stream,
    sizes: ProbeSizes,
    action: Callable[[], object],
) -> list[float]:
    """Return the seconds of each call of an action during which copies of rows were on their way."""
    found: list[float] = []
    rows = max(1, block.nbytes // sizes.row_nbytes)
    for _ in range(sizes.repeats):
        with torch.cuda.stream(stream):
            for number in range(32):
                first = number % rows * sizes.row_nbytes
                row = block[first : first + sizes.row_nbytes]
                target[: row.nbytes].copy_(row, non_blocking=True)
            over = torch.cuda.Event()
            over.record(stream)
        while not over.query() and len(found) < sizes.repeats:
            seconds = _seconds(action)
            if not over.query():
                found.append(seconds)
        if len(found) >= sizes.repeats:
            break
    over.synchronize()
    return found


def _host_seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds that the host takes to ask the card for something, which it does not wait for."""
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        action()
    taken = (time.perf_counter() - begun) / repeats
    torch.cuda.synchronize(device)
    return taken


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
    probe(
        torch.device("cuda", torch.cuda.current_device()),
        ProbeSizes(),
        options.part,
        lambda f: append(options.findings, f),
    )


if __name__ == "__main__":
    main()
