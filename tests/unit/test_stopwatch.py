"""The stopwatch of a GPU: the device's own time, launched while it sleeps, and the host's apart from it."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import Card, card  # noqa: F401

from mobile.costs.geometry import GEOMETRIES
from mobile.links.paced import paced_channel
from mobile.machine import measure
from mobile.machine.fit_profile import Measurements, Timing
from mobile.machine.measure import ahead, relinked, timing
from mobile.machine.measure.sizes import NARROW

CPU = torch.device("cpu")
COPIES = (Timing(1000, 1, 1e-6),)
MEASURED = Measurements(
    device="Card",
    about="yesterday on Card",
    copies=(),
    kernels=(),
    cpu_kernels=(),
    depths=(),
    layer=GEOMETRIES["olmoe-1b-7b"],
    tflops=1.0,
    cpu_tflops=1.0,
    memory_nbytes=1,
    taken_nbytes=0,
    host_launch_seconds=5e-6,
    host_copy_seconds=16e-6,
)


def test_a_gpu_is_timed_by_its_own_events_and_sleeps_until_all_is_launched(card, monkeypatch):  # noqa: F811
    """A kernel of 30 us that takes the host far longer to launch: only the 30 us count."""
    slept, ran = [], []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)

    def job(number: int) -> None:
        ran.append(number)
        sum(range(20_000))  # the host is slow
        card.seconds += 30e-6

    assert timing._device_seconds(CPU, job) == pytest.approx(30e-6)
    assert len(slept) == 1
    assert slept[0] > 0
    assert ran == list(range(2 * timing.QUEUED))


def test_beginning_a_copy_is_the_hosts_time_and_not_the_copys():
    """Two copies of 50 ms each: the host gives them to the link in far less."""
    rows = torch.zeros(2, 8)
    channel = paced_channel(lambda key, slot: None, 50_000_000)
    real_fence = channel.fence
    try:
        channel.fence = lambda slot: None  # on a GPU it is the device that waits
        link_seconds = ahead.copy_seconds(CPU, channel, rows[0].nbytes, NARROW)
    finally:
        channel.fence = real_fence
        channel.close()
    assert 0 < link_seconds < 0.025


def test_beginning_a_copy_is_timed_on_the_link_that_is_asked_for(monkeypatch):
    """A throttled link has more to begin, behind each copy."""
    began = []

    def time_beginning(device, dtype, sizes, *, link_gb_per_s):
        began.append(link_gb_per_s)
        return 30e-6

    monkeypatch.setattr(measure, "time_copies", lambda *_, **__: COPIES)
    monkeypatch.setattr(measure, "time_beginning", time_beginning)
    slow = relinked(MEASURED, torch.device("cuda"), torch.bfloat16, NARROW, link_gb_per_s=12.0)
    assert (slow.copies, slow.host_copy_seconds, began) == (COPIES, 30e-6, [12.0])
    paced = relinked(MEASURED, CPU, torch.bfloat16, NARROW)
    assert (paced.copies, paced.host_copy_seconds, began) == (COPIES, MEASURED.host_copy_seconds, [12.0])
