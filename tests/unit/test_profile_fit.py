"""The fit finds the constants that timings were made of, and refuses timings that hold none. Files keep profiles."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mobile
from mobile.costs.cost_model import EXPERT_LAUNCHES, CostModel
from mobile.costs.geometry import GEOMETRIES
from mobile.costs.hardware import PROFILES, HardwareProfile, profile, profile_from, write_profile
from mobile.machine.fit_profile import WORKSPACE_NBYTES, Depth, Measurements, Timing, fit, fit_line, measurements_from

MB = 10**6
SIZES = (1 * MB, 3 * MB, 6 * MB, 12 * MB, 25 * MB)
LAYER = replace(GEOMETRIES["olmoe-1b-7b"], name="a model that was timed")
LATENCIES = st.floats(0, 1e-4)
BANDWIDTHS = st.floats(0.5, 4000)


def timings(each: float, gb_per_s: float, launches: int = 1, noise: np.ndarray | float = 1.0) -> tuple[Timing, ...]:
    seconds = np.array([launches * each + size / gb_per_s / 1e9 for size in SIZES]) * noise
    return tuple(Timing(size, launches, float(t)) for size, t in zip(SIZES, seconds, strict=True))


def measured(card: mobile.costs.hardware.HardwareProfile, depths: tuple[int, ...] = (2, 4, 8)) -> Measurements:
    """The measurements of a machine that is exactly this profile."""
    cost = CostModel(card, LAYER)
    layer = cost.dense_ns(1) + LAYER.top_k * cost.expert_ns(1)
    expert = timings(card.launch_seconds, card.memory_gb_per_s, EXPERT_LAUNCHES)
    return Measurements(
        device="Card",
        about="yesterday on Card",
        copies=timings(card.link_latency_seconds, card.link_gb_per_s),
        kernels=(*timings(card.launch_seconds, card.memory_gb_per_s), *expert),
        cpu_kernels=timings(2e-6, card.cpu_gb_per_s, EXPERT_LAUNCHES),
        depths=tuple(Depth(n, (n * layer + cost.head_ns(1)) / 1e9) for n in depths),
        layer=LAYER,
        tflops=card.tflops,
        cpu_tflops=card.cpu_tflops,
        memory_nbytes=card.vram_nbytes,
        taken_nbytes=7,
    )


@given(LATENCIES, BANDWIDTHS, st.integers(1, 8))
def test_a_line_finds_the_latency_and_the_bandwidth_it_was_made_of(latency, bandwidth, launches):
    found = fit_line(timings(latency, bandwidth, launches), "copies")
    assert found.gb_per_s == pytest.approx(bandwidth, rel=1e-6)
    assert found.launch_seconds == pytest.approx(latency, rel=1e-6, abs=1e-6 * SIZES[0] / bandwidth / 1e9)
    assert found.worst < 1e-6


@given(LATENCIES, BANDWIDTHS, st.integers(0, 2**32 - 1))
def test_noise_of_two_percent_moves_what_a_row_costs_by_no_more_than_that(latency, bandwidth, seed):
    noise = np.random.default_rng(seed).uniform(0.98, 1.02, len(SIZES))
    found = fit_line(timings(latency, bandwidth, noise=noise), "copies")
    assert found.launch_seconds >= 0
    for size in SIZES:
        predicted, true = found.launch_seconds + size / found.gb_per_s / 1e9, latency + size / bandwidth / 1e9
        assert predicted == pytest.approx(true, rel=0.06)


def test_one_line_tells_launches_from_bytes_where_some_kernels_have_more_launches():
    few, many = timings(5e-6, 3000.0, 1), timings(5e-6, 3000.0, 4)
    found = fit_line((*few, *many), "kernels")
    assert (found.launch_seconds, found.gb_per_s) == pytest.approx((5e-6, 3000.0))


def test_a_latency_below_nothing_is_nothing_and_the_bandwidth_is_fitted_without_it():
    found = fit_line(timings(-3e-5, 10.0), "copies")
    assert found.launch_seconds == 0
    assert 9 < found.gb_per_s < 16
    assert found.worst > 0.05


@pytest.mark.parametrize(
    ("points", "says"),
    [
        (timings(1e-5, 25.0)[:2], "at 3 sizes at least; there are 2"),
        ((timings(1e-5, 25.0)[0],) * 5, "there are 1"),
        ((), "there are 0"),
        (tuple(Timing(size, 1, 1e4 / size) for size in SIZES), "did not take longer"),
        ((*timings(1e-5, 25.0)[:4], Timing(SIZES[4], 1, 0.0)), "not positive"),
        ((*timings(1e-5, 25.0)[:4], Timing(SIZES[4], 1, float("nan"))), "not positive"),
    ],
)
def test_timings_that_hold_no_line_are_refused_in_one_sentence(points, says):
    with pytest.raises(mobile.Refused, match=says):
        fit_line(points, "copies")


@given(
    st.floats(0, 5e-5),
    st.floats(1, 60),
    st.floats(1e-7, 2e-5),
    st.floats(10, 4000),
    st.floats(0, 1e-3),
    st.floats(0, 1e-2),
)
def test_a_fit_of_what_a_profile_predicts_is_that_profile(latency, link, launch, memory, layer, step):
    card = replace(
        PROFILES["rtx4080-pcie4"],
        link_latency_seconds=latency,
        link_gb_per_s=link,
        launch_seconds=launch,
        memory_gb_per_s=memory,
        layer_seconds=layer,
        step_seconds=step,
    )
    found = fit(measured(card))
    assert found.link_gb_per_s == pytest.approx(link, rel=1e-5)
    assert found.memory_gb_per_s == pytest.approx(memory, rel=1e-5)
    assert found.launch_seconds == pytest.approx(launch, rel=1e-4, abs=1e-9)
    assert found.layer_seconds == pytest.approx(layer, rel=1e-3, abs=2e-7)
    assert found.step_seconds == pytest.approx(step, rel=1e-3, abs=2e-6)
    assert found.reserve_nbytes == 7 + WORKSPACE_NBYTES
    for geometry in GEOMETRIES.values():
        ours, theirs = CostModel(found, geometry), CostModel(card, geometry)
        assert ours.load_ns == pytest.approx(theirs.load_ns, rel=1e-4)
        assert ours.dense_ns(1) == pytest.approx(theirs.dense_ns(1), rel=1e-3, abs=500)


@given(st.floats(1e-6, 2e-5), st.floats(0, 5e-5), st.floats(0, 5e-5), st.floats(0, 5e-4), st.floats(0, 1e-3))
def test_a_host_that_runs_ahead_is_fitted_apart_from_its_device(launch, copy, read, layer, step):
    """Its launches, copies and reads are measured; what is left of a step beyond them is its own code."""
    card = replace(
        PROFILES["rtx4080-pcie4"],
        host_launch_seconds=launch,
        host_copy_seconds=copy,
        host_read_seconds=read,
        host_layer_seconds=layer,
        host_step_seconds=step,
    )

    def depth(layers: int, of: HardwareProfile) -> Depth:
        cost = CostModel(of, replace(LAYER, moe_layers=layers))
        return Depth(layers, cost.resident_ns(LAYER.top_k) / 1e9)

    seen = replace(
        measured(card),
        depths=tuple(depth(layers, card) for layers in (2, 4, 8)),
        host_launch_seconds=launch,
        host_copy_seconds=copy,
        host_read_seconds=read,
    )
    found = fit(seen)
    assert (found.host_launch_seconds, found.host_copy_seconds, found.host_read_seconds) == (launch, copy, read)
    assert (found.layer_seconds, found.step_seconds) == (0, 0)
    assert any("host, ahead of its device" in source for source in found.sources)
    for layers in (2, 4, 8, 16):
        assert depth(layers, found).seconds == pytest.approx(depth(layers, card).seconds, rel=0.025)


def test_a_layer_faster_than_its_parts_says_costs_nothing_beyond_them():
    card = PROFILES["rtx4080-pcie4"]
    quick = replace(measured(card), depths=(Depth(2, 1e-5), Depth(4, 2e-5)))
    assert (fit(quick).layer_seconds, fit(quick).step_seconds) == (0, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depths": (Depth(2, 1e-3),)}, "two depths at least"),
        ({"depths": (Depth(2, 1e-3), Depth(4, -1e-3))}, "not positive"),
        ({"tflops": 0.0}, "rate measured of products"),
        ({"cpu_kernels": ()}, "experts on the processor"),
    ],
)
def test_measurements_that_lack_something_are_refused(change, says):
    with pytest.raises(mobile.Refused, match=says):
        fit(replace(measured(PROFILES["rtx4080-pcie4"]), **change))


def test_sources_say_when_on_what_and_how_well_it_fitted():
    sources = fit(measured(PROFILES["rtx4080-pcie4"])).sources
    assert sources[0] == "measured: yesterday on Card"
    assert any(line.startswith("link: ") and "5 sizes of 1 to 25 MB" in line and "0.0%" in line for line in sources)


def test_measurements_come_back_from_json():
    there = measured(PROFILES["rtx4080-pcie4"])
    assert measurements_from(json.loads(json.dumps(asdict(there)))) == there


@pytest.mark.parametrize("name", PROFILES)
def test_presets_take_nothing_that_only_a_measurement_can_tell(name):
    """So that virtual times of records before there was a calibration are those of today."""
    assert (PROFILES[name].layer_seconds, PROFILES[name].step_seconds) == (0, 0)


# --- files ------------------------------------------------------------------------------------------


def test_a_written_profile_is_read_back_wherever_a_name_is_taken(tmp_path):
    card = fit(measured(PROFILES["rtx4080-pcie4"]))
    write_profile(card, tmp_path / "here.json")
    assert profile(str(tmp_path / "here.json")) == card


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"launch_seconds": -1e-6}, "launch_seconds cannot be -1e-06"),
        ({"link_gb_per_s": 0}, "link_gb_per_s cannot be 0"),
        ({"tflops": "97"}, "tflops cannot be '97'"),
        ({"tflops": True}, "tflops cannot be True"),
        ({"memory_gb_per_s": float("inf")}, "memory_gb_per_s cannot be inf"),
        ({"vram_nbytes": 1.5}, "vram_nbytes cannot be 1.5"),
        ({"name": ""}, "name cannot be ''"),
        ({"sources": "me"}, "sources cannot be 'me'"),
        ({"speed": 1}, "speed missing or unknown"),
        ({"tflops": None}, "tflops cannot be None"),
    ],
)
def test_a_profile_that_is_not_one_is_refused_field_by_field(change, says):
    with pytest.raises(mobile.Refused, match=says):
        profile_from({**asdict(PROFILES["rtx4080-pcie4"]), "sources": [], **change})


def test_a_file_that_lacks_a_field_or_is_no_json_is_refused_with_its_path(tmp_path):
    data = asdict(PROFILES["rtx4080-pcie4"])
    del data["tflops"]
    for text, says in (
        (json.dumps(data), "tflops missing or unknown"),
        ("{", "doctor --calibrate"),
        ("[]", "all of it"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(mobile.Refused, match=says) as refused:
            profile(str(tmp_path / "bad.json"))
        assert "bad.json" in str(refused.value)
    with pytest.raises(mobile.Refused, match=r"absent\.json"):
        profile(str(tmp_path / "absent.json"))
