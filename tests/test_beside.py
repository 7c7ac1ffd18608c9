"""Reference cells on a CPU: plain Transformers on the same weights, and the engine's cost a layer."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reports.data.results import read
from reports.pages import content, write
from reports.sections import references
from suites.plan.preset import read_preset
from suites.synthetic import engine_cost, models, reference
from suites.synthetic.cells import LINKS
from suites.synthetic.reference_cells import DEVICE_MAP, ENGINE_COST, RESIDENT, ReferenceCell, reference_cell_from
from tests import shapes as narrow

PRESET = narrow.PRESET.replace(
    'link = "cuda"', 'link = "paced"\nbeside = ["engine", "resident", "device_map"]\nbeside_tokens = 3'
).replace("repeats = 2", "repeats = 1")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("beside") / "besides.toml"
    path.write_text(PRESET)
    return path


@pytest.fixture(scope="module")
def besides(preset) -> dict[str, ReferenceCell]:
    return {beside.what: beside for beside in read_preset(str(preset)).references}


def made(layers: int = 2):
    return models.make("olmoe-1b-7b", layers=layers, shrink=16, device="cpu", dtype=torch.float32)


def test_a_preset_asks_for_them_and_in_virtual_time_there_are_none(preset, besides):
    assert list(besides) == [ENGINE_COST, RESIDENT, DEVICE_MAP]
    assert {b.decode_tokens for b in besides.values()} == {3}
    assert not read_preset(str(preset), link="virtual").references
    assert len(read_preset("shapes").references) == 3 * 4
    assert all(reference_cell_from({**vars(b), "model": vars(b.model)}) == b for b in besides.values())
    assert LINKS


def test_the_stock_model_has_the_stores_experts_and_the_store_is_empty():
    one = made()
    rows = [layer.clone() for layer in one.store.rows]
    layout, name = one.layout, one.layout.fields[0].name
    model = reference.plain(one)
    assert not any(layer.numel() for layer in one.store.rows)
    for number, layer in enumerate(one.layers):
        assert torch.equal(getattr(layer.experts, name), layout.views(rows[number])[name])
    assert sum(p.numel() for p in model.parameters()) > sum(layer.numel() for layer in rows)


def test_device_map_offload_moves_weights_through_accelerates_hooks_and_computes_the_same():
    pytest.importorskip("accelerate")
    model = reference.plain(made())
    other, ids = copy.deepcopy(model), torch.arange(5)[None]
    assert "whole layers move" in reference.offloaded(other, CPU, "1GiB")
    assert all(weight.device.type == "meta" for weight in other.model.layers[0].parameters())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("implementation", reference.IMPLEMENTATIONS)
def test_the_engine_is_timed_against_the_stock_model_that_computes_the_same(implementation):
    one = made()
    cost = reference.engine_cost(one, implementation, blocks=4)
    assert (cost.stock, cost.layers, cost.blocks) == (implementation, 2, 4)
    assert cost.low_seconds <= cost.layer_seconds <= cost.high_seconds
    assert min(cost.stock_seconds, cost.ours_seconds) > 0
    assert not hasattr(one.model, "mobile")


def test_the_engine_is_timed_against_a_bare_loop_that_computes_the_same_bit_for_bit():
    one = made()
    cost = engine_cost.bare_cost(one, blocks=4)
    assert (cost.layers, cost.blocks) == (2, 4)
    assert cost.low_seconds <= cost.layer_seconds <= cost.high_seconds
    assert min(cost.bare_seconds, cost.read_seconds, cost.ours_seconds) > 0
    assert not hasattr(one.model, "mobile")
    with one.attached(engine_cost.EVERYTHING, slots=one.geometry.total_experts, link="paced") as engine:
        routed = engine_cost.Routed(engine, one)
        tokens = engine.ledger.counters.tokens
        with torch.no_grad():
            ways = [routed.bare(), routed.read(), routed.ours()]
        assert engine.ledger.counters.tokens == tokens + 1, "it is a decode step to the engine"
        for layer, outputs in enumerate(zip(*ways, strict=True)):
            assert outputs[0].abs().sum() > 0
            assert all(torch.equal(outputs[0], other) for other in outputs), layer
            assert not torch.equal(outputs[0], ways[0][1 - layer]), "layers have experts of their own"


def test_the_bare_loop_asks_and_waits_for_nothing(monkeypatch):
    """Neither the engine, nor its residency, nor its link, nor its grouping has a part in it."""
    one = made()
    with one.attached(engine_cost.EVERYTHING, slots=one.geometry.total_experts, link="paced") as engine:
        routed = engine_cost.Routed(engine, one)

        def none_of_it(*_: object, **__: object) -> None:
            raise AssertionError

        for owner, name in ((type(engine), "step"), (type(engine.residency), "layer"), (type(engine.link), "compute")):
            monkeypatch.setattr(owner, name, none_of_it)
        monkeypatch.setattr(engine_cost, "group", none_of_it)
        reads, really = [], torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or really(tensor))
        with torch.no_grad():
            assert len(routed.bare()) == 2
            bare = len(reads)
            assert len(routed.read()) == 2
            assert len(reads) - bare == bare + 2, "the one that reads does so once a layer, and no more"
            with pytest.raises(AssertionError):
                routed.ours()


def test_each_way_runs_twice_a_block_once_in_either_order():
    order = []
    ways = {name: lambda name=name: order.append(name) for name in "abc"}
    found = engine_cost.in_blocks(ways, CPU, blocks=2)
    assert order == list("abccba") * (engine_cost.WARM_UP + 2)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_aim_is_set_against_the_bare_loop_and_relative_to_its_bound(besides):
    cost = {
        "layers": 4,
        "blocks": 4,
        "bare_seconds": 1e-3,
        "read_seconds": 1.1e-3,
        "ours_seconds": 1.3e-3,
        "layer_seconds": 80e-6,
        "low_seconds": 70e-6,
        "high_seconds": 90e-6,
        "bound_seconds": 25e-6,
    }
    record = reference.record(replace(besides[DEVICE_MAP], memory="1GiB", decode_tokens=1))
    for bound, aim in ((25e-6, "met"), (15e-6, "not met")):
        changed = replace(
            record, strategy=ENGINE_COST, config={**record.config, "bare": {**cost, "bound_seconds": bound}}
        )
        [row] = references.bare_cost((changed,)).rows
        assert row[1:] == (
            "4",
            "1.000",
            "1.100",
            "1.300",
            "80.0",
            "70.0 to 90.0",
            f"{bound * 1e6:.1f}",
            f"{80 - bound * 1e6:.1f}",
            aim,
        )
    before = replace(record, config={name: value for name, value in record.config.items() if name != "bare"})
    assert references.bare_cost((before,)).rows == (), "a record from before has none"


def test_without_accelerate_the_record_says_so_and_is_no_failure(besides, monkeypatch):
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    record = reference.record(besides[DEVICE_MAP])
    assert record.items == ()
    assert record.config["refused"].startswith("accelerate is not installed")


def test_each_is_recorded_with_its_times(besides):
    resident = reference.record(replace(besides[RESIDENT], repeats=2))
    assert [item.decode_tokens for item in resident.items] == [3, 3]
    assert all(item.ttft_ns > 0 and item.decode_ns > 0 for item in resident.items)
    assert resident.config["stock"].startswith("every weight on cpu; experts by ")


def test_a_run_on_a_bare_machine_has_their_chapters(preset, tmp_path):
    """accelerate is not there: its row says so, and the run is whole."""
    ran = narrow.suites(
        "run",
        "--preset",
        str(preset),
        "--out",
        str(tmp_path / "run"),
        "--only",
        "native [se]*",
        environment=narrow.bare(tmp_path / "bare"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = read(tmp_path / "run")
    assert len(results.references) == 3
    assert not results.synthetic
    report = content.build(results)
    assert all(path.is_file() for path in write.write(report, results, tmp_path / "run"))
    page = write.markdown(report)
    assert "## Beside plain Transformers" in page
    assert "accelerate is not installed" in page
    assert "| stock, everything resident |" in page
    assert "## What the engine costs a layer" in page
    assert page.count("| grouped_mm |") == 1
    assert "Everything resident: the engine against a bare loop" in page
    assert "beyond the bound" in page
