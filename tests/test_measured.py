"""Synthetic cells over the disk link: timed in turn, predicted from the same scripts, killed and resumed, reported."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mobile.costs.hardware import profile
from mobile.errors import Refused
from mobile.policies.strategy import resolve
from reports.data.fingerprint import fingerprint
from reports.data.results import read
from reports.pages import content
from reports.pages.write import markdown
from reports.sections import clock
from suites.plan.preset import read_preset
from suites.record import RunFolder, read_json
from suites.synthetic import in_turn, models, plan, timing
from suites.synthetic.calibrate import predicted
from suites.synthetic.script import ScriptLength, drawn, steps_of, with_rate
from suites.synthetic.script_player import play
from tests import shapes as narrow

PRESET = """
minutes = 2
link = "disk"
hardware = ["auto"]
seeds = [0]
prompt_tokens = 4
warmup_tokens = 1
decode_tokens = 4
repeats = 2
budgets = ["smallest"]
beside = ["mmap"]
beside_memory = "2GiB"
beside_tokens = 2
beside_repeats = 1
layers = 2
shrink = 16

[[runs]]
routing = "recorded"
links = ["native"]
strategies = ["on-demand", "on-demand-overlap", "mobile"]

[[runs]]
routing = "recorded"
links = ["native"]
strategies = ["mobile"]
rates = [0.5]

[[models]]
name = "olmoe-1b-7b"
geometry = "olmoe-1b-7b"
family = "olmoe"
path = "models/olmoe-tiny"
"""
CELLS, REPEATS = 4, 2


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "small.toml"
    path.write_text(PRESET)
    return path


@pytest.fixture(scope="module")
def done(preset, tmp_path_factory) -> Path:
    """A run in a Python without the packages that a bare machine lacks."""
    out, bare = tmp_path_factory.mktemp("run") / "run", narrow.bare(tmp_path_factory.mktemp("bare"))
    ran = narrow.suites("run", "--preset", str(preset), "--out", str(out), environment=bare)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{CELLS + 1} of {CELLS + 1} cells have records" in ran.stdout
    assert re.search(rf"^turns +{CELLS * REPEATS} of {CELLS * REPEATS}$", ran.stdout, re.MULTILINE)
    return out


def records(run: Path) -> dict:
    return {(r.strategy, r.config["fallback_asked"]): r for r in read(run).synthetic}


def test_records_are_of_real_bytes_in_real_time_and_say_so(done):
    for record in records(done).values():
        assert (record.scope, record.weights, record.config["kind"]) == ("cpu+disk", "synthetic", "shape")
        assert record.checks
        assert all(record.checks.values())
        assert isinstance(record.config["link_direct"], bool)
        assert len(record.config["link_depth"]) == len(record.config["disk_gb_per_s"]) == REPEATS
        assert min(record.config["disk_gb_per_s"]) > 0
        assert record.counters["bytes_loaded"] == record.counters["loads"] * record.config["expert_nbytes"]
        assert record.config["expert_nbytes"] % 4096 == 0
    assert records(done)["mobile", 0.5].counters["fallbacks"] >= 2 * 2


def test_cells_take_turns_forwards_and_backwards(done):
    (log,) = (done / "logs").glob("in turn-*.log")
    played = re.findall(r"^olmoe-1b-7b native recorded (.*), repeat (\d):", log.read_text(), re.MULTILINE)
    first, second = ([label for label, repeat in played if repeat == str(number)] for number in range(REPEATS))
    assert len(first) == CELLS
    assert second == first[::-1]


def test_every_strategy_plays_the_same_scripts(done):
    prompts = {tuple(item.prompt_sha256 for item in record.items) for record in records(done).values()}
    assert len(prompts) == 1


def test_a_killed_run_goes_on_with_the_next_turn(preset, done, tmp_path):
    shapes, run = read_preset(str(preset)).synthetic, RunFolder(tmp_path / "run")
    kept = [(cell, repeat) for cell in shapes for repeat in range(REPEATS)]
    for cell, repeat in kept[:-1]:
        path = run.turn(cell.id, repeat)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(RunFolder(done).turn(cell.id, repeat).read_bytes())
    cell, repeat = kept[-1]
    run.turn(cell.id, repeat).write_bytes(b"{ half of it")  # as a disk that was full would leave it
    loaded = in_turn.load(shapes, run)
    for each in shapes:
        in_turn.measure(each, loaded, run)
    for each in shapes:
        before, after = (read_json(folder.record(each.id)) for folder in (RunFolder(done), run))
        assert [item["decode_ns"] for item in before["items"]][:repeat] == [
            item["decode_ns"] for item in after["items"]
        ][:repeat]
        assert (before["items"] == after["items"]) is (each.id != cell.id)


def test_a_cell_that_cannot_be_played_fails_alone(preset, tmp_path, monkeypatch):
    shapes, run = read_preset(str(preset)).synthetic, RunFolder(tmp_path)
    monkeypatch.setattr(in_turn, "calibrated", lambda *_: None)
    loaded = in_turn.load(shapes, run)
    play_it = in_turn.turn

    def turn(cell, *rest):
        if cell is shapes[0]:
            raise Refused("The file ends before layer 1; delete it, and it is made again.")
        return play_it(cell, *rest)

    monkeypatch.setattr(in_turn, "turn", turn)
    in_turn.measure(shapes[1], loaded, run)
    with pytest.raises(Refused, match="ends before layer 1"):
        in_turn.measure(shapes[0], loaded, run)
    assert run.record(shapes[1].id).is_file()
    assert not run.record(shapes[0].id).is_file()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return models.make("olmoe-1b-7b", layers=2, shrink=16, device="cpu", folder=tmp_path_factory.mktemp("rows"))


def test_every_expert_in_the_file_is_another_one(made):
    for name in ("gate_up_proj", "down_proj"):
        rows = torch.cat([made.store.views(layer)[name].flatten(1) for layer in range(2)])
        assert len({row.numpy().tobytes() for row in rows.view(torch.int16)}) == made.geometry.total_experts
        assert 0.015 < rows.std() < 0.025


@pytest.mark.parametrize("name", ["on-demand", "on-demand-overlap", "lru", "lfu", "static-half", "mobile"])
def test_a_script_replayed_takes_as_long_as_the_model_playing_it_on_the_same_clock(made, name):
    """Predictions are replays: to the nanosecond what the engine does over the virtual link."""
    length = ScriptLength(5, 12, 3)
    scripts = [
        with_rate(drawn("zipf 1.0", length, layers=2, experts=64, top_k=8, seed=seed), 0.4, seed) for seed in range(2)
    ]
    strategy, card = resolve(name), profile("rtx4080-pcie4")
    slots = strategy.min_slots(made.geometry)
    with made.attached(strategy, slots=slots, hardware=card, link="virtual") as engine:
        played = [play(made, script) for script in scripts]
        assert engine.geometry == made.geometry
    replayed = predicted(scripts, strategy, made.geometry, slots, card)
    for live, again in zip(played, replayed, strict=True):
        assert (live.prefill_ns, live.decode_ns, live.decode_bytes) == (
            again.prefill_ns,
            again.decode_ns,
            again.decode_bytes,
        )
        parts = ("tokens", "fallbacks", "hits", "demand_loads", "prefetch_loads", "loads")
        assert [getattr(live.counters, part) for part in parts] == [getattr(again.counters, part) for part in parts]


def test_a_strategy_that_looks_ahead_is_not_predicted_from_a_script():
    script = drawn("uniform", ScriptLength(2, 3), layers=2, experts=8, top_k=2, seed=0)
    with pytest.raises(Refused, match="next-gate decides by router logits"):
        steps_of(script, resolve("next-gate"))


def test_the_virtual_clock_predicts_every_repeat_twice(done):
    for record in records(done).values():
        ours, own = record.config["predicted"], record.config["predicted_at_own_rates"]
        assert len(ours["decode_ns"]) == len(own["decode_ns"]) == REPEATS
        assert "read past the page cache" in " ".join(ours["profile"]["sources"]) or not record.config["link_direct"]
        if record.strategy.startswith("on-demand"):
            assert ours["decode_bytes"] == [item.decode_bytes for item in record.items]
        slower = replace(record, config={**record.config, "predicted": {**ours, "decode_ns": [2 * 10**12] * REPEATS}})
        assert clock.relative_error(slower) > clock.relative_error(record)


def test_the_page_says_what_was_measured_and_judges_nothing_by_the_paper(done):
    page = markdown(content.build(read(done)))
    assert "Measured: over this machine's disk, with experts of the size of olmoe-1b-7b, 2 of its 16 layers" in page
    assert "NOT COMPARABLE (measured on another link)" in page
    assert "cpu+disk, synthetic" in page
    assert "## Beside what a user would run instead from a disk" in page
    assert "| stock, memory-mapped | uniform | 2GiB, " in page
    assert "| ours: on-demand-overlap | recorded | 8 slots |" in page
    assert "Experts lie in a file and are read" in page
    assert "The virtual clock's error of TPOT" in page
    assert "| at which the cell's rows came |" in page
    assert not re.search(r"\| (REPRODUCED|SHORT|EXCEEDS) \|", page)


def test_the_gate_holds_only_what_a_script_fixes(done):
    record = records(done)["mobile", 0.5]
    counters = fingerprint(record)["counters"]
    assert set(counters) == {"prompt_tokens", "tokens", "fallbacks"}
    assert "decode_ns" not in fingerprint(record)


def test_the_plan_says_what_the_disk_must_hold(preset):
    lines = plan.describe([(cell, False) for cell in read_preset("disk").synthetic])
    assert lines[3].startswith("qwen3-30b-a3b: ")
    assert "a file of 58 GB for the experts of 48 layers" in lines[3]
    assert "disk 58 GB while it runs" in lines[-1]
    (told,) = plan._too_large(read_preset("disk").synthetic, 40 * 10**9)
    assert told.startswith("The experts of qwen3-30b-a3b take 58 GB of disk and 40 GB are free: its cells will fail.")
    assert not list(plan._too_large(read_preset("disk").synthetic, 60 * 10**9))


def test_the_default_preset_ends_with_the_measured_part():
    cpu, measured = read_preset("cpu"), read_preset("measured")
    assert measured.minutes <= 4
    assert [cell.id for cell in cpu.synthetic] == [cell.id for cell in measured.synthetic]
    assert cpu.scored
    assert {cell.scope for cell in measured.cells} == {"cpu+disk"}
    assert {cell.strategy for cell in measured.synthetic} >= {
        "on-demand",
        "on-demand-overlap",
        "lru",
        "lfu",
        "static-half",
        "mobile",
    }
    assert all(cell.repeats % 2 == 0 for cell in measured.synthetic)  # as often first as last


def test_every_real_geometry_is_in_the_preset_disk_at_full_size():
    disk = read_preset("disk")
    assert len({cell.model.geometry for cell in disk.synthetic}) == 4
    assert {(cell.layers, cell.shrink) for cell in disk.synthetic} == {(None, 1)}
    assert timing.LINKS["disk"].scope == "cpu+disk"
