"""Row formats against their formulas, written out here, and the bytes and times that follow from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mobile.cli.replay import open_trace
from mobile.costs.cost_model import EXPERT_LAUNCHES, CostModel
from mobile.costs.geometry import GEOMETRIES, Geometry, project, slots_for
from mobile.costs.hardware import GIB, profile
from mobile.errors import Refused
from mobile.live_model import compat
from mobile.policies.strategy import resolve
from mobile.replay import trace
from mobile.replay.trace import Step
from mobile.store import format_named, layout_of, poison, unpacked
from suites.budget import replay_setup
from suites.synthetic.models import _empty, config_of

PACKED = ["int8", "int4"]  # of any matrix; int4-cpu takes few, see tests/test_rows_in_place.py
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(weights: torch.Tensor, name: str, *, transposed: bool = False) -> torch.Tensor:
    """Weights (experts, ...) packed and decoded."""
    layout = layout_of({"w": weights}).packed(format_named(name), transposed=transposed)
    views = layout.views(torch.zeros(len(weights), layout.numel, dtype=torch.uint8))
    views["w"].copy_(weights)
    return unpacked(views["w"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_is_a_rounded_share_of_each_outputs_largest_weight(dtype, transposed):
    weights = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    weights[0, 3], weights[1, :, 5] = 0, 0
    axis = 1 if transposed else 2
    scales = (weights.float().abs().amax(axis, keepdim=True) / 127).to(dtype)
    codes = (weights.float() / scales.float()).nan_to_num(0).round().clamp(-127, 127)
    assert torch.equal(packed(weights, "int8", transposed=transposed), codes.to(dtype) * scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_int4_has_sixteen_levels_in_a_group_of_32_inputs_and_beats_plain_rounding(dtype, transposed):
    weights = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    weights[0, 0], weights[0, :, 0] = 0, 0
    axis = 1 if transposed else 2
    grouped, decoded = (
        each.unflatten(axis, (-1, 32)).float() for each in (weights, packed(weights, "int4", transposed=transposed))
    )
    # Every decoded weight is a whole multiple, from -8 to 7, of one number for its group.
    levels = decoded.movedim(axis + 1, -1).reshape(-1, 32)
    assert max(len(level.unique()) for level in levels) <= 16
    step = grouped.abs().amax(axis + 1, keepdim=True) / 7
    plain = (grouped / step).nan_to_num(0).round() * step
    errors = [(each - grouped).square().sum(axis + 1) for each in (decoded, plain)]
    assert errors[0].sum() < 0.9 * errors[1].sum()
    assert not decoded.isnan().any()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (3, 33), (8, 24), (2, 64)])
def test_matrices_of_any_shape_are_packed(name, shape):
    """Also those of an odd number of weights, and of inputs that no group of 32 divides."""
    weights = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for transposed in (False, True):
        error = (packed(weights, name, transposed=transposed) - weights).norm() / weights.norm()
        assert error < (0.01 if name == "int8" else 0.15)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_rows_decode_to_nan_and_biases_are_kept_as_they_are(name, dtype):
    weights = {"down_proj": torch.randn(2, 32, 64, dtype=dtype), "down_proj_bias": torch.randn(2, 32, dtype=dtype)}
    layout = layout_of(weights).packed(format_named(name), transposed=False).page_aligned()
    rows = torch.zeros(2, layout.numel, dtype=torch.uint8)
    views = layout.views(rows)
    for field, weight in weights.items():
        views[field].copy_(weight)
    assert torch.equal(unpacked(views["down_proj_bias"]), weights["down_proj_bias"])
    poison(rows[1])
    assert views["down_proj"][1].isnan().all()
    assert views["down_proj_bias"][1].isnan().all()
    assert not views["down_proj"][0].isnan().any()


@pytest.mark.parametrize("name", PACKED)
def test_what_the_next_expert_decodes_into_is_one_memory_shared_by_all(name):
    weights = torch.randn(2, 32, 64)
    layout = layout_of({"w": weights}).packed(format_named(name), transposed=False)
    rows = torch.zeros(2, layout.numel, dtype=torch.uint8)
    views = layout.views(rows, layout.scratch(rows.device))
    views["w"].copy_(weights)
    first = views["w"][0].clone()
    second = views["w"][1]
    assert views["w"][0].data_ptr() == second.data_ptr()
    assert torch.equal(views["w"][0], first)


# --- bytes and times ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PACKED, "int4-cpu"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_presets_packed_bytes_are_those_of_a_row_in_memory(geometry, name):
    """From the published configuration by arithmetic, and from Transformers' own model of it."""
    _, layers, layout = _empty(config_of(geometry, 1), torch.bfloat16, name)
    sizes = GEOMETRIES[geometry].with_rows(name)
    assert sizes.expert_nbytes == layout.nbytes
    assert sizes.expert_weights == sum(field.numel for field in layout.fields)
    assert sizes.rows == layout.rows == name
    assert layers[0].count == sizes.experts


def test_packed_bytes_by_hand():
    olmoe = GEOMETRIES["olmoe-1b-7b"]
    weights = 3 * 2048 * 1024
    assert olmoe.with_rows("int8").expert_nbytes == weights + 2 * (2 * 1024 + 2048)
    assert olmoe.with_rows("int4").expert_nbytes == weights // 2 + 2 * weights // 32
    assert olmoe.with_rows("as-is") is olmoe
    assert olmoe.with_rows("int8").with_rows("int8") == olmoe.with_rows("int8")
    assert olmoe.with_rows("int8").decoded_expert_nbytes == olmoe.expert_nbytes
    with pytest.raises(Refused, match="lie in int8 already"):
        olmoe.with_rows("int8").with_rows("int4")
    with pytest.raises(Refused, match="Unknown row format"):
        olmoe.with_rows("int2")
    with pytest.raises(Refused, match="Unknown row format"):
        olmoe.with_rows(["int8"])
    with pytest.raises(Refused, match="Nothing says what shapes"):
        replace(olmoe, expert_outputs=None).with_rows("int8")


def test_a_record_of_sizes_is_read_again_and_an_earlier_one_too():
    olmoe = GEOMETRIES["olmoe-1b-7b"]
    assert "rows" not in olmoe.as_record()
    for sizes in (olmoe, olmoe.with_rows("int4")):
        assert Geometry.from_record(sizes.as_record()) == sizes
    earlier = {name: value for name, value in olmoe.as_record().items() if name != "expert_outputs"}
    assert Geometry.from_record(earlier) == replace(olmoe, expert_outputs=None)


def test_fewer_bytes_are_copied_and_decoding_is_charged():
    """Flops stay those of the weights; the decoded weights go through the memory four times, or five."""
    card, olmoe = profile("rtx4080-pcie4"), GEOMETRIES["olmoe-1b-7b"]
    for name in PACKED:
        sizes = olmoe.with_rows(name)
        plain, cost = CostModel(card, olmoe), CostModel(card, sizes)
        latency = card.link_latency_seconds * 1e9
        ratio = sizes.expert_nbytes / olmoe.expert_nbytes
        assert cost.load_ns - latency == pytest.approx((plain.load_ns - latency) * ratio, rel=1e-4)
        launches = EXPERT_LAUNCHES + {"int8": 4, "int4": 8}[name]
        passes = {"int8": 4, "int4": 5}[name]
        moved = (sizes.expert_nbytes + passes * olmoe.expert_nbytes) / (card.memory_gb_per_s * 1e9)
        assert cost.expert_ns(1) == pytest.approx((moved + launches * card.launch_seconds) * 1e9, abs=1)
        many = 10**6  # tokens: bound by flops
        beside = (launches - EXPERT_LAUNCHES) * card.launch_seconds * 1e9
        assert cost.expert_ns(many) == pytest.approx(plain.expert_ns(many) + beside, abs=1)
        assert cost.dense_ns(1) == plain.dense_ns(1)
        assert cost.cpu_expert_ns(1) > plain.cpu_expert_ns(1)


def test_a_budget_holds_more_packed_experts_and_a_small_model_is_dressed_in_them():
    olmoe = GEOMETRIES["olmoe-1b-7b"]
    slots = [slots_for(olmoe.with_rows(name), 4 * GIB, GIB, 2) for name in ("as-is", "int8", "int4")]
    assert slots[0] < slots[1] < slots[2]
    small = replace(olmoe, name="small", moe_layers=4, expert_nbytes=10_000, expert_outputs=None)
    charged, layer_map = project(small, "olmoe-1b-7b", "int4")
    assert charged == olmoe.with_rows("int4")
    assert sum(map(len, layer_map)) == 16
    setup = replay_setup(resolve("lru"), small, "olmoe-1b-7b", profile("rtx4080-pcie4"), "4GiB", rows="int4")
    assert (setup.geometry, setup.slots) == (
        charged,
        slots_for(charged, 4 * GIB, profile("rtx4080-pcie4").reserve_nbytes, 2),
    )


def test_layers_that_differ_in_orientation_are_refused():
    _, layers, _ = _empty(config_of("olmoe-1b-7b", 2, 16), torch.float32)
    layout = compat.common_layout(layers)
    layers[1].experts.is_transposed = True
    with pytest.raises(Refused, match="transposed and some"):
        compat.packed_layout(layout, layers, "int8")
    assert compat.packed_layout(layout, layers, "as-is") == layout


@pytest.mark.parametrize("wrong", [{"rows": "int9"}, {"rows": ["int8"]}, {"rows": "int8"}, {"expert_weights": 7}])
def test_a_trace_of_rows_that_there_are_not_is_refused(wrong, tmp_path):
    geometry = GEOMETRIES["olmoe-1b-7b"].as_record() | wrong
    step = Step("full", 1, tuple((0,) for _ in range(16)), tuple((1,) for _ in range(16)))
    trace.save(tmp_path / "t.npz", [[step]], 16, {"geometry": geometry, "strategy": "lru"})
    with pytest.raises(Refused, match="does not say which model"):
        open_trace(tmp_path / "t.npz")
