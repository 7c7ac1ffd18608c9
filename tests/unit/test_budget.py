"""Sizes, budgets and ceilings: arithmetic a reader can redo."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import GEOMETRIES, project, slots_for
from mobile.costs.hardware import GIB, PROFILES, parse_nbytes, profile
from mobile.errors import Refused


@pytest.mark.parametrize(
    ("name", "tokens_per_s", "experts_gb"),
    [
        ("olmoe-1b-7b", 15.5, 12.9),
        ("qwen1.5-moe-a2.7b", 15.1, 24.9),
        ("deepseek-v2-lite", 9.3, 28.8),
        ("qwen3-30b-a3b", 6.9, 58.0),
    ],
)
def test_the_ceilings_are_bandwidth_over_bytes(name, tokens_per_s, experts_gb):
    geometry = GEOMETRIES[name]
    assert round(geometry.on_demand_ceiling(25.0), 1) == tokens_per_s
    assert round(geometry.total_experts * geometry.expert_nbytes / 1e9, 1) == experts_gb


def test_preset_sizes_add_up_to_the_published_parameter_counts():
    def billions(name: str) -> float:
        g = GEOMETRIES[name]
        return (g.total_experts * g.expert_nbytes + g.resident_nbytes) / g.weight_nbytes / 1e9

    assert billions("olmoe-1b-7b") == pytest.approx(6.92, rel=0.01)
    assert billions("qwen1.5-moe-a2.7b") == pytest.approx(14.3, rel=0.01)
    assert billions("deepseek-v2-lite") == pytest.approx(15.7, rel=0.01)
    assert billions("qwen3-30b-a3b") == pytest.approx(30.5, rel=0.01)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("8GiB", 8 * GIB), ("8 gb", 8 * 10**9), ("512MiB", 2**29), ("1.5GiB", 3 * GIB // 2), (77, 77)]
)
def test_memory_sizes_are_read(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8", 8 * GIB),
        ("8.5", 17 * GIB // 2),
        (".5", GIB // 2),
        ("1024", 1024 * GIB),
        ("8g", 8 * GIB),
        ("8G", 8 * GIB),
        ("8 GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        ("8GB", 8 * 10**9),
        ("512M", 2**29),
        ("512mb", 512 * 10**6),
        ("2048K", 2**21),
        ("1T", 2**40),
        ("1TB", 10**12),
        ("8589934592", 8 * GIB),
        ("8589934592 B", 8 * GIB),
        ("1048576", 2**20),
        (" 8 ", 8 * GIB),
        ("0.1GiB", 107374182),
    ],
)
def test_a_number_without_a_unit_is_gib_while_it_is_small_and_bytes_when_it_is_large(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("number", [8, 8.0, 2**33, np.int64(2**33), 1e9])
def test_a_number_given_in_python_is_bytes(number):
    assert parse_nbytes(number) == number


@pytest.mark.parametrize("text", ["8000", "1025", "65536"])
def test_a_number_that_could_be_either_is_refused_with_both_ways_to_say_it(text):
    with pytest.raises(Refused, match=f"lacks its unit; write it like {text}MiB or {text}GiB"):
        parse_nbytes(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lots",
        "8 GiB of it",
        "-1GiB",
        "GiB",
        True,
        False,
        "nan",
        "inf",
        "-8",
        "1e9",
        "0x10",
        "8,5",
        "8.",
        "8 G B",
        "٨",
        "9" * 400,
        "9" * 25 + "T",
        None,
        float("nan"),
        float("inf"),
        -float("inf"),
        0,
        -5,
        "0",
        "0.0",
        "0GiB",
        [],
        2**63,
        10**400,
    ],
)
def test_other_memory_sizes_are_refused(text):
    with pytest.raises(Refused, match="8GiB"):
        parse_nbytes(text)


def test_a_budget_holds_the_dense_weights_the_reserve_and_the_slots():
    geometry, reserve = GEOMETRIES["olmoe-1b-7b"], GIB
    slots = slots_for(geometry, 8 * GIB, reserve, 2)
    used = geometry.resident_nbytes + reserve + (slots + 2) * geometry.expert_nbytes
    assert used <= 8 * GIB < used + geometry.expert_nbytes
    assert slots_for(geometry, 64 * GIB, reserve, 2) == geometry.total_experts


def test_a_budget_below_one_layer_is_refused_with_what_it_needs():
    with pytest.raises(Refused, match=r"cannot hold olmoe-1b-7b.*need 2,053 MiB"):
        slots_for(GEOMETRIES["olmoe-1b-7b"], GIB, GIB, 2)


def test_dressing_deals_the_real_layers_out_in_order():
    small = replace(GEOMETRIES["olmoe-1b-7b"], moe_layers=4)
    charged, layer_map = project(small, "olmoe-1b-7b")
    assert charged.moe_layers == 16
    assert layer_map == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))
    uneven = project(replace(GEOMETRIES["deepseek-v2-lite"], moe_layers=4), "deepseek-v2-lite")[1]
    assert sorted(layer for covered in uneven for layer in covered) == list(range(26))
    assert {len(covered) for covered in uneven} == {6, 7}


def test_dressing_as_another_shape_is_refused():
    with pytest.raises(Refused, match="cannot stand for it"):
        project(GEOMETRIES["olmoe-1b-7b"], "qwen3-30b-a3b")
    with pytest.raises(Refused, match="Unknown geometry"):
        project(GEOMETRIES["olmoe-1b-7b"], "gpt-9")


def test_unknown_hardware_is_refused():
    with pytest.raises(Refused, match="rtx4080-pcie4"):
        profile("abacus")


def test_every_profile_number_has_a_source_and_loading_dominates():
    for card in PROFILES.values():
        assert card.sources
    geometry = GEOMETRIES["olmoe-1b-7b"]
    cost = CostModel(profile("auto"), geometry)
    assert cost.load_ns == pytest.approx(10_000 + geometry.expert_nbytes / 25, rel=1e-6)
    assert cost.expert_ns(1) == cost.expert_ns(4), "a few tokens read the same weights"
    assert cost.expert_ns(4096) > 2 * cost.expert_ns(1), "many tokens are bound by arithmetic"
    loading = geometry.top_k * cost.load_ns
    assert loading / (loading + cost.dense_ns(1) + geometry.top_k * cost.expert_ns(1)) > 0.8
