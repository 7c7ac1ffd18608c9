"""A cell timed live over a real link: wall time, real bytes, and the scope that says so."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from suites.identity import HERE
from suites.plan.preset import read_preset
from suites.record import RunFolder

pytest.importorskip("lm_eval")  # which writes the prompts of scored cells
from suites.measure import live


def test_a_cell_is_timed_on_the_wall_clock(tmp_path):
    preset = read_preset("smoke")
    cell = next(cell for cell in preset.cells if cell.strategy == "mobile" and cell.budget == "smallest")
    generation = replace(cell.generation, items=4)
    cell = replace(cell, generation=generation, link="cuda", hardware="auto")
    begun = time.perf_counter_ns()
    loaded = live.load([cell], RunFolder(tmp_path))
    record = live.record(cell, loaded)
    took = time.perf_counter_ns() - begun
    assert (record.scope, record.weights) == ("gpu+pcie", "shipped-tiny")
    assert len(record.items) == 4
    assert 0 < sum(item.ttft_ns + item.decode_ns for item in record.items) < took
    assert record.config["dtype"] == "bfloat16"
    assert record.config["link_gb_per_s"] > 0
    assert all(item.decode_tokens > 0 and item.decode_bytes > 0 for item in record.items)
    assert loaded.found == (HERE / "models/olmoe-tiny").name
