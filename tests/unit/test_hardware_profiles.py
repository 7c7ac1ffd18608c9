"""The shipped hardware profiles: every number has a source, and none is absurd."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, asdict, fields

import pytest

from mobile.cli.terminal import options
from mobile.costs.hardware import GIB, PROFILES, HardwareProfile, profile, profile_from

# The words before its first ": " with which a source says that it is of this number.
SAID_OF = {
    "vram_nbytes": r"^vram\b",
    "memory_gb_per_s": r"\bmemory bandwidth\b",
    "tflops": r"\bbf16 rate\b",
    "link_gb_per_s": r"^link$",
    "link_latency_seconds": r"^link latency\b",
    "launch_seconds": r"\b(a launch|launches)\b",
    "host_launch_seconds": r"\b(a launch|launches)\b",
    "host_copy_seconds": r"\b(a copy|of host)\b",
    "host_read_seconds": r"\b(read|of host)\b",
    "reserve_nbytes": r"\breserve\b",
    "cpu_gb_per_s": r"^processor$",
    "cpu_tflops": r"^processor rate$",
}
# As sold: GB of memory, the bits of its bus and Gb/s of each, generation of PCIe and lanes.
SOLD = {
    "rtx4080-pcie4": (16, 256, 22.4, 4, 16),
    "rtx4080-pcie4-shared-memory": (16, 256, 22.4, 4, 16),
    "rtx3060-12gb-pcie4": (12, 192, 15, 4, 16),
    "rtx4060ti-16gb-pcie4x8": (16, 128, 18, 4, 8),
    "rtx4090-pcie4": (24, 384, 21, 4, 16),
    "rtx5090-pcie5": (32, 512, 28, 5, 16),
    "rtx4070-laptop-8gb": (8, 128, 16, 4, 8),
}
UNIFIED = "apple-m1-max-64gb-unified"
LANE_GB_PER_S = {4: 16 * 128 / 130 / 8, 5: 32 * 128 / 130 / 8}  # transfers a second, 128 of 130 bits, 8 to a byte


@pytest.mark.parametrize("card", PROFILES.values(), ids=PROFILES)
def test_each_number_of_a_shipped_profile_has_one_source_that_names_it(card):
    needed = {field.name for field in fields(HardwareProfile) if field.default is MISSING} - {"name", "sources"}
    assert set(SAID_OF) == needed | {name for name in asdict(card) if name.startswith("host_") and asdict(card)[name]}
    for field, words in SAID_OF.items():
        named = [source for source in card.sources if re.search(words, source.partition(": ")[0])]
        assert len(named) == 1, (field, named)
    for source in card.sources:
        assert re.search(
            r"assum|published|github\.com|whitepaper|press release|review|stands for|multiply-adds", source
        )


def test_every_profile_is_one_that_a_file_could_hold():
    for card in PROFILES.values():
        assert profile_from(json.loads(json.dumps(asdict(card)))) == card == profile(card.name)
    assert {*SOLD, UNIFIED} == set(PROFILES)
    assert profile("auto") is PROFILES["rtx4080-pcie4"]


@pytest.mark.parametrize("name", SOLD)
def test_a_card_has_no_more_than_it_was_sold_with(name):
    card, (gigabytes, bits, gbit_per_s, generation, lanes) = PROFILES[name], SOLD[name]
    assert 0.93 * gigabytes * GIB < card.vram_nbytes <= gigabytes * GIB
    assert card.memory_gb_per_s == pytest.approx(bits * gbit_per_s / 8)
    carried = lanes * LANE_GB_PER_S[generation]
    assert 0.75 * carried < card.link_gb_per_s < 0.95 * carried
    assert card.cpu_gb_per_s > card.link_gb_per_s or "shared-memory" in name  # the link reads the host's memory
    assert card.cpu_tflops < card.tflops / 10


def test_a_copy_within_one_memory_is_at_most_half_as_fast_as_reading_it():
    card = PROFILES[UNIFIED]
    assert card.link_gb_per_s <= card.memory_gb_per_s / 2
    assert card.vram_nbytes < 64 * GIB
    assert any(source.startswith("stands for: ") and "no copy at all" in source for source in card.sources)


def test_the_numbers_that_committed_results_rest_on_are_as_they_were():
    numbers = (16 * GIB, 716.8, 97.5, 25.0, 10e-6, 2e-6, 4e-6, 16e-6, 10e-6, GIB)
    for name, cpu in (("rtx4080-pcie4", 41.0), ("rtx4080-pcie4-shared-memory", 16.0)):
        card = PROFILES[name]
        assert tuple(getattr(card, field) for field in SAID_OF) == (*numbers, cpu, 0.5)


def test_help_lists_every_profile():
    assert all(name in options.CARDS for name in PROFILES)
