"""On a GPU: cells are predicted from a calibration, fallbacks keep the link busy, and a profile tells copies apart."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reports.sections import clock
from suites.measure import profile
from suites.plan.preset import read_preset
from suites.record import RunFolder
from suites.synthetic import calibrate, reference, timing
from suites.synthetic.models import make
from suites.synthetic.reference_cells import DEVICE_MAP, ENGINE_COST, RESIDENT, ReferenceCell


@pytest.fixture(scope="module")
def shapes():
    """Two real layers of OLMoE-1B-7B: copies of 12.6 MB, so that time is loading."""
    return [replace(shape, layers=2, repeats=1) for shape in read_preset("shapes").only("olmoe-1b-7b native").synthetic]


def test_time_per_token_is_predicted_from_what_was_calibrated(shapes, tmp_path):
    loaded = timing.load(shapes[:1], RunFolder(tmp_path))
    for shape in shapes:
        if shape.strategy in ("on-demand", "on-demand-overlap", "mobile") and shape.budget == "smallest":
            here = calibrate.calibrated(shape, torch.bfloat16, RunFolder(tmp_path))
            record = timing.record(shape, loaded, here)
            assert abs(clock.relative_error(record)) < 0.25, (
                shape.label
            )  # the aim is 5 %; this says that nothing is broken
            if shape.strategy == "mobile" and sum(item.fallbacks for item in record.items):
                use = record.config["fallback_use"]
                assert use["nbytes"] / use["ns"] > 0.5 * clock.row_copy_gb_per_s(record)


@pytest.mark.parametrize("what", [ENGINE_COST, RESIDENT, DEVICE_MAP])
def test_plain_transformers_is_timed_beside(shapes, what):
    beside = ReferenceCell(shapes[0].model, what, "cuda", "2GiB", 8, 3, 1, 0, layers=2)
    record = reference.record(beside)
    if record.config["refused"] is not None:
        assert "accelerate" in record.config["refused"]
        return
    assert record.scope == "gpu+pcie"
    assert record.config["engine"] or record.items[0].decode_ns > 0


def test_the_engine_costs_less_a_layer_than_a_copy():
    eager, _ = (
        reference.engine_cost(make("olmoe-1b-7b", layers=2, device="cuda"), each, blocks=8)
        for each in reference.IMPLEMENTATIONS
    )
    assert eager.layer_seconds < 500e-6


def test_a_profile_tells_copies_from_kernels(tmp_path: Path):
    options = argparse.Namespace(
        geometry="olmoe-1b-7b",
        strategy="on-demand-overlap",
        out=tmp_path,
        tokens=4,
        routing="uniform",
        rate=0.2,
        memory=None,
        link="cuda",
        link_gb_per_s=None,
        layers=2,
        shrink=1,
    )
    found, trace = profile.profile(options)
    assert trace.is_file()
    assert all(ms > 0 for ms in found.kinds_ms.values())
    assert found.kinds_ms["copies"] > found.kinds_ms["other kernels"]
