"""Shapes on a GPU: wall time over the link as it is and slowed, page-locked once, refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda_link import skip_unless_rows_can_be_page_locked

from mobile.errors import Refused
from suites.plan.preset import read_preset
from suites.record import RunFolder
from suites.synthetic import engine_cost, timing
from suites.synthetic.models import make
from suites.synthetic.script import ScriptLength, drawn
from suites.synthetic.script_player import play
from tests.shapes import PRESET


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes") / "narrow.toml"
    path.write_text(PRESET.replace("shrink = 16", "shrink = 2"))
    return read_preset(str(path)).synthetic


@pytest.fixture(scope="module")
def loaded(shapes, tmp_path_factory):
    return timing.load(shapes[:1], RunFolder(tmp_path_factory.mktemp("run")))


def test_the_store_is_page_locked_once_for_every_engine(loaded):
    skip_unless_rows_can_be_page_locked()
    assert all(rows.is_pinned() for rows in loaded.made.store.rows)
    for _ in range(2):
        with loaded.made.attached("on-demand", slots=8) as engine:
            assert engine.device.type == "cuda"
    assert all(rows.is_pinned() for rows in loaded.made.store.rows)


@pytest.mark.parametrize("link_gb_per_s", [None, 2.0])
def test_a_shape_is_timed_over_the_link_that_was_asked_for(shapes, loaded, link_gb_per_s):
    for shape in shapes[:4]:
        record = timing.record(replace(shape, link_gb_per_s=link_gb_per_s), loaded)
        assert record.scope == ("gpu+pcie" if link_gb_per_s is None else "gpu+throttled")
        assert all(record.checks.values()), record.checks
        assert all(item.decode_ns > 0 and item.decode_bytes > 0 for item in record.items)
        if link_gb_per_s is not None:
            assert record.config["link_measured_gb_per_s"] == pytest.approx(link_gb_per_s, rel=0.15)
            assert record.config["link_native_gb_per_s"] > link_gb_per_s


def test_a_link_slower_than_asked_is_refused_for_that_cell_alone(shapes, loaded):
    with pytest.raises(Refused, match="cannot be throttled"):
        timing.record(replace(shapes[0], link_gb_per_s=10_000.0), loaded)
    assert timing.record(shapes[0], loaded).items


def test_slots_are_given_back_before_the_same_cell_is_predicted(loaded):
    """Whoever keeps the engine, as the measurement does: a real model's slots fill a card once, not twice."""
    script = drawn(
        "uniform",
        ScriptLength(prompt_tokens=4, steps=3, warmup=1),
        layers=loaded.made.geometry.moe_layers,
        experts=64,
        top_k=8,
        seed=0,
    )
    taken = []
    for _ in range(2):  # what a process allocates once is allocated the first time
        with loaded.made.attached("resident") as engine:
            play(loaded.made, script)
            held = torch.cuda.memory_allocated()
        taken.append(torch.cuda.memory_allocated())
        assert held - taken[-1] >= 0.9 * loaded.made.store.nbytes
    assert taken[1] <= taken[0] + 2**20
    assert engine.stats()["tokens"] == 3


def test_the_bare_loop_and_the_engine_compute_the_same_on_a_gpu(loaded):
    made = loaded.made
    with torch.no_grad(), made.attached(engine_cost.EVERYTHING, slots=made.geometry.total_experts) as engine:
        routed = engine_cost.Routed(engine, made)
        for outputs in zip(routed.bare(), routed.read(), routed.ours(), strict=True):
            assert all(torch.equal(outputs[0], other) for other in outputs)
    cost = engine_cost.bare_cost(made, blocks=4)
    assert min(cost.bare_seconds, cost.read_seconds, cost.ours_seconds) > 0


def test_everything_resident_is_refused_where_it_does_not_fit():
    made = make("olmoe-1b-7b", layers=1, device="cuda")
    free = torch.cuda.mem_get_info()[0]
    held = torch.empty(free - 2**29, dtype=torch.uint8, device="cuda")
    with pytest.raises(Refused, match="GiB free; give fewer slots"), made.attached("resident", slots=64):
        pass
    del held
    torch.cuda.empty_cache()
    with made.attached("resident", slots=64) as engine:
        assert engine.slots == 64
