"""Expected speeds: the measured curves, the time that follows from them, and how far it is from a replay's."""

from __future__ import annotations

import json
import shutil
import statistics
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tiny_run import PRESET, run

from mobile.costs import expected
from mobile.costs.cost_model import CostModel
from mobile.costs.expected import Curve, curves, expect, room, slots_of, token_ns
from mobile.costs.geometry import GEOMETRIES, slots_for
from mobile.costs.hardware import parse_nbytes, profile
from mobile.policies.strategy import resolve
from mobile.replay.replay import ReplaySetup, time_requests
from mobile.replay.trace import Step
from mobile.residency.residency import PREFILL_BUFFERS
from suites.__main__ import main as suites
from suites.budget import is_memory, percent_of
from suites.measure import hit_curves

ROOT = Path(__file__).parent.parent
FAR = 0.1  # how far from the virtual clock a speed of a task's own curve may be
CARD = profile("rtx4080-pcie4")


# --- the curves ---------------------------------------------------------------------------------------


def test_every_strategy_has_a_curve_for_each_router_and_task():
    cells = [(curve.strategy, curve.experts, curve.top_k, curve.task) for curve in curves()]
    assert len(cells) == len(set(cells)) == len(hit_curves.STRATEGIES) * 4 * 5
    routers = {(geometry.experts, geometry.top_k) for geometry in GEOMETRIES.values()}
    assert {(experts, top_k) for _, experts, top_k, _ in cells} == routers
    assert {strategy for strategy, *_ in cells} == set(hit_curves.STRATEGIES)


def test_more_slots_never_miss_much_more_and_all_of_them_miss_nothing():
    for curve in curves():
        assert tuple(curve.rooms) == hit_curves.ROOMS
        assert list(curve.missed) == (["full"] if curve.fallback_rate is None else ["little", "big"])
        first = next(iter(curve.missed))
        assert all(0 <= share <= 1 for shares in curve.missed.values() for share in shares)
        for fewer, more in zip(curve.missed[first], curve.missed[first][1:], strict=False):
            assert more <= fewer + 0.08, curve
        # What the processor computes does not enter the cache, so that cpu-hybrid goes on missing.
        assert curve.missed[first][-1] < (0.12 if "cpu-hybrid" in curve.strategy else 0.01), curve
        if curve.strategy == "lru":
            assert curve.missed["full"][0] > 0.99, "half of the slots that a token needs keep nothing"


def test_the_file_is_small():
    assert expected.FILE.stat().st_size < 50_000


def test_the_wheel_has_it():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any(fnmatch(f"costs/{expected.FILE.name}", pattern) for pattern in packaged["mobile"])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_room_is_some_number_of_slots(geometry):
    for slots in (geometry.top_k, geometry.moe_layers * geometry.top_k, geometry.total_experts // 2):
        assert slots_of(geometry, room(geometry, slots)) == slots
    assert room(geometry, geometry.total_experts) == 2
    assert room(geometry, geometry.moe_layers * geometry.top_k) == 1
    assert slots_of(geometry, 0.0001) == geometry.top_k


def test_between_two_rooms_a_share_lies_on_a_line_and_beyond_the_last_it_stays():
    curve = Curve("x", 8, 2, "t", None, (0.5, 1.0, 2.0), {"full": (1.0, 0.8, 0.0)})
    found = [curve.share("full", at) for at in (0.0, 0.5, 0.75, 1.0, 1.25, 2.0, 3.0)]
    assert found == pytest.approx([1.0, 1.0, 0.9, 0.8, 0.6, 0.0, 0.0])
    assert Curve("x", 8, 2, "t", None, (0.5, 2.0), {"full": (0.8, 0.0)}).share("full", 0.25) == pytest.approx(0.9)


def test_a_model_unlike_the_measured_ones_has_the_band_of_all():
    geometry = replace(GEOMETRIES["olmoe-1b-7b"], experts=8, top_k=2)
    cost, lru = CostModel(CARD, geometry), [curve for curve in curves() if curve.strategy == "lru"]
    assert len(lru) == 20
    alone = [expect(cost, "lru", 70, among=[curve]).tokens_per_s for curve in lru]
    whole = expect(cost, "lru", 70)
    assert (whole.low, whole.high) == (min(alone), max(alone))
    assert whole.tokens_per_s == pytest.approx(statistics.harmonic_mean(alone))
    assert expect(CostModel(CARD, GEOMETRIES["olmoe-1b-7b"]), "lru", 519).high < expect(cost, "lru", 128).high
    assert expect(cost, "fate", 70) is None


# --- the time -----------------------------------------------------------------------------------------


def test_nothing_missed_is_compute_alone_and_all_missed_is_plain_offloading():
    geometry = GEOMETRIES["olmoe-1b-7b"]
    cost = CostModel(CARD, geometry)
    assert token_ns(cost, {"full": 0.0}, 0.0) == pytest.approx(cost.resident_ns(geometry.top_k))
    alone = tuple((layer,) for layer in range(geometry.moe_layers))
    on = ReplaySetup(resolve("on-demand-overlap"), geometry, alone, CARD, geometry.top_k)
    token = Step("full", 1, (tuple(range(geometry.top_k)),) * geometry.moe_layers)
    assert token_ns(cost, {"full": 1.0}, 0.0) == pytest.approx(time_requests(on, [[token]])[1].counters.decode_ns)


def test_a_fallback_costs_a_second_pass_and_a_processor_takes_time_off_the_link():
    cost = CostModel(CARD, GEOMETRIES["olmoe-1b-7b"])
    missed = {"little": 0.5, "big": 0.25}
    never, half, always = (token_ns(cost, missed, rate) for rate in (0.0, 0.5, 1.0))
    assert half == pytest.approx((never + always) / 2)
    assert always - never > cost.router_replay_ns + 16 * 8 * 0.25 * cost.load_ns
    assert token_ns(cost, {"full": 0.5}, 0.0, split=lambda missing: missing // 2) < token_ns(cost, {"full": 0.5}, 0.0)


def cells() -> list[tuple[str, str, str, str, dict]]:
    """The committed virtual cells of measured strategies: model, task, strategy, budget, and what was counted."""
    found = json.loads((ROOT / "reports/expected/cpu/cells.json").read_text())["cells"]
    parts = [(*label.replace(" (gamma 0.7)", "").split(" / "), cell) for label, cell in found.items()]
    return [
        (model, task, strategy, budget, cell)
        for model, task, strategy, hardware, budget, *_, cell in parts
        if strategy in hit_curves.STRATEGIES and hardware == CARD.name and model in MODELS
    ]


MODELS = {
    "olmoe-tiny": "olmoe-1b-7b",
    "qwen2-moe-tiny": "qwen1.5-moe-a2.7b",
    "deepseek-v2-tiny": "deepseek-v2-lite",
    "qwen3-moe-tiny": "qwen3-30b-a3b",
}


def test_speeds_of_a_tasks_own_curve_are_near_the_virtual_clocks_and_bands_hold():
    """Against all committed cells of those strategies, at the presets' budgets, which are no rooms of the curves."""
    off, held = [], []
    for model, task, name, budget, cell in cells():
        geometry, strategy = GEOMETRIES[MODELS[model]], resolve(name)
        cost, slots = CostModel(CARD, geometry), strategy.min_slots(geometry)
        if is_memory(budget):
            slots = slots_for(geometry, parse_nbytes(budget), CARD.reserve_nbytes, PREFILL_BUFFERS)
        elif budget.endswith("%"):
            slots = round(geometry.total_experts * percent_of(budget) / 100)
        placement = strategy.on_cpu and strategy.on_cpu(cost)
        split = placement and (lambda missing, placement=placement: len(placement.on_cpu(0, (1,) * missing)))
        real = cell["counters"]["tokens"] / (cell["decode_ns"] / 1e9)
        own = [curve for curve in expected.curves_for(geometry, name) if curve.task == task]
        off.append(expect(cost, name, slots, split, among=own).tokens_per_s / real - 1)
        band = expect(cost, name, slots, split)
        held.append(band.low / 1.05 <= real <= band.high * 1.05)
    assert len(off) >= 200
    assert statistics.median(map(abs, off)) < 0.02
    assert max(map(abs, off)) < FAR
    assert statistics.mean(held) > 0.95


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A run of two items under the strategies that curves are drawn from."""
    folder = tmp_path_factory.mktemp("small")
    preset = PRESET.replace('"static-half", "mobile"', '"lru", "mobile"').replace(
        '"smallest", "7GiB", "8GiB"', '"8GiB"'
    )
    (folder / "small.toml").write_text(preset)
    done = run(folder / "small.toml", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_the_command_counts_what_a_replay_counts_and_writes_the_file_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["suites", "hit-curves", str(small), "--out", str(tmp_path / "curves.json")])
    assert suites() == 0
    monkeypatch.setattr(expected, "FILE", tmp_path / "curves.json")
    made = [Curve(rooms=hit_curves.ROOMS, **each) for each in json.loads(expected.FILE.read_text())["curves"]]
    assert [curve.strategy for curve in made] == list(hit_curves.STRATEGIES)
    records = [json.loads(file.read_text()) for file in (small / "records").iterdir()]
    (lru,) = (record for record in records if record["strategy"] == "lru")
    shares, geometry = made[0].missed["full"], GEOMETRIES["olmoe-1b-7b"]
    at = room(geometry, lru["slots"])
    below = max(number for number, each in enumerate(hit_curves.ROOMS) if each <= at)
    missed = lru["counters"]["demand_loads"] / (lru["counters"]["tokens"] * geometry.moe_layers * geometry.top_k)
    assert shares[below + 1] <= missed <= shares[below]


def test_a_run_without_what_it_needs_is_refused(small, tmp_path, monkeypatch, capsys):
    shutil.copytree(small, tmp_path / "run")
    for file in (tmp_path / "run/records").iterdir():
        if json.loads(file.read_text())["strategy"] == "lru":
            file.unlink()
    words = ["suites", "hit-curves", str(tmp_path / "run"), "--out", str(tmp_path / "curves.json")]
    monkeypatch.setattr("sys.argv", words)
    assert suites() == 2
    assert "has no records of lru and of mobile on the same model and task" in capsys.readouterr().err
    assert not (tmp_path / "curves.json").exists()
