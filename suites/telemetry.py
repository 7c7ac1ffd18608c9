"""Power, clocks, heat and link of a GPU while a cell is timed, asked of NVML ten times a second.

Unknown is None, never 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from threading import Event, Thread
from typing import Any

from mobile.machine.gpu import ask, nvml

SAMPLES_PER_SECOND = 10
QUESTIONS: dict[str, tuple[Any, ...]] = {
    "power_milliwatts": ("DeviceGetPowerUsage",),
    "temperature_celsius": ("DeviceGetTemperature", 0),  # of the GPU's die
    "sm_clock_mhz": ("DeviceGetClockInfo", 1),
    "memory_clock_mhz": ("DeviceGetClockInfo", 2),
    "link_generation": ("DeviceGetCurrPcieLinkGeneration",),
    "link_width": ("DeviceGetCurrPcieLinkWidth",),
    # over the last 20 ms; what the card receives is what the ledger calls loads
    "link_sent_kb_per_s": ("DeviceGetPcieThroughput", 0),
    "link_received_kb_per_s": ("DeviceGetPcieThroughput", 1),
}
Summary = dict[str, Any]


@contextmanager
def watched(uuid: str | None) -> Iterator[Callable[[], Summary | None]]:
    """Watch the GPU of that UUID until the block ends, and yield a function that returns the summary afterwards.

    Summary: `seconds` watched, `samples` taken, `energy_joules` used, for each of `QUESTIONS` {"min", "mean", "max"}
    of the answers, and `clock_limits`, the fraction of samples in which each named cause held the clocks down. None in
    place of what this card, driver or library does not tell, and of it all where there is no UUID or no NVML.
    """
    with nvml() if uuid is not None else _nothing() as lib:
        handle = ask(lib, "DeviceGetHandleByUUID", uuid)
        if handle is None:
            yield lambda: None
            return
        samples: list[dict[str, Any]] = []
        ended = Event()
        sampler = Thread(target=_sample, args=(lib, handle, samples, ended), daemon=True)
        energy, begun = ask(lib, "DeviceGetTotalEnergyConsumption", handle), time.monotonic()
        sampler.start()
        try:
            yield lambda: summary
        finally:
            ended.set()
            sampler.join()
        used, seconds = ask(lib, "DeviceGetTotalEnergyConsumption", handle), time.monotonic() - begun
        summary = {
            "seconds": seconds,
            "samples": len(samples),
            "energy_joules": None if None in (energy, used) else (used - energy) / 1000,
            **{name: _spread([sample[name] for sample in samples]) for name in QUESTIONS},
            "clock_limits": _limits(lib, [sample["clock_limits"] for sample in samples]),
        }


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _sample(lib: Any, handle: Any, samples: list[dict[str, Any]], ended: Event) -> None:
    while True:
        sample = {name: ask(lib, question, handle, *about) for name, (question, *about) in QUESTIONS.items()}
        sample["clock_limits"] = ask(lib, "DeviceGetCurrentClocksEventReasons", handle)
        samples.append(sample)
        if ended.wait(1 / SAMPLES_PER_SECOND):
            return


def _spread(answers: list[float | None]) -> dict[str, float] | None:
    known = [answer for answer in answers if answer is not None]
    return {"min": min(known), "mean": fmean(known), "max": max(known)} if known else None


def _limits(lib: Any, answers: list[int | None]) -> dict[str, float] | None:
    """Return, by name, the share of samples in which a cause held the clocks down; those that never did are left out.

    Causes are one bit each; pynvml's aliases and its union of all repeat the bits of others.
    """
    known = [answer for answer in answers if answer is not None]
    if not known:
        return None
    prefix = "nvmlClocksThrottleReason"  # a newer spelling exists that lacks some of the bits
    spelt = [name for name in reversed(dir(lib)) if name.startswith(prefix)]  # of two for one bit, the first is newer
    names = {getattr(lib, name): name.removeprefix(prefix) for name in spelt}
    shares = {bit: sum(bool(answer & bit) for answer in known) / len(known) for bit in names if bit.bit_count() == 1}
    return {names[bit]: share for bit, share in sorted(shares.items()) if share}
