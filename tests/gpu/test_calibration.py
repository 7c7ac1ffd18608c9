"""A GPU is calibrated, and the profile's link and virtual clock agree with what the engine then does there."""

from __future__ import annotations

import pytest
import torch

from mobile.machine.fit_profile import fit
from mobile.machine.measure import measure, relinked

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def measured():
    return measure(CUDA, torch.bfloat16)


def test_a_gpu_is_faster_than_its_link_and_reads_its_memory_faster_than_the_processor(measured):
    card = fit(measured)
    assert torch.cuda.get_device_name(0) in card.name
    assert card.vram_nbytes == torch.cuda.mem_get_info(0)[1]
    assert 1 < card.link_gb_per_s < card.memory_gb_per_s
    assert card.cpu_gb_per_s < card.memory_gb_per_s
    assert card.link_latency_seconds < 1e-3
    assert 1 < card.tflops < 10_000


def test_copies_lie_on_their_line(measured):
    """A link is a latency and a bandwidth, or the profile says nothing."""
    card = fit(measured)
    for timing in measured.copies:
        predicted = card.link_latency_seconds + timing.nbytes / card.link_gb_per_s / 1e9
        assert predicted == pytest.approx(timing.seconds, rel=0.1)


def test_a_throttled_link_is_fitted_as_throttled(measured):
    rate = fit(measured).link_gb_per_s / 2
    slow = fit(relinked(measured, CUDA, torch.bfloat16, link_gb_per_s=rate))
    assert slow.link_gb_per_s == pytest.approx(rate, rel=0.15)
