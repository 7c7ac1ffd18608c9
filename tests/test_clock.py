"""The virtual clock against the wall clock: calibrated, predicted, recorded and reported, over a paced link on a CPU.

Nothing here asks how large an error is: on a processor that others use it means nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mobile.costs.cost_model import CostModel
from mobile.costs.hardware import HardwareProfile, profile
from mobile.errors import Refused
from mobile.ledger import Event, Ledger
from mobile.replay.replay import ReplaySetup
from reports.data.results import read
from reports.pages import content
from reports.pages.write import markdown
from reports.sections import clock
from suites.plan.preset import read_preset
from suites.record import RunFolder, load
from suites.synthetic import calibrate, measurement, timing
from suites.synthetic.link_use import LinkUse, fallback_use, fallbacks_on_clock, link_bound
from tests import shapes as narrow

PRESET = """
minutes = 2
link = "paced"
hardware = ["auto"]
seeds = [0]
prompt_tokens = 4
warmup_tokens = 1
decode_tokens = 4
repeats = 2
budgets = ["smallest"]
layers = 2
shrink = 16

[[runs]]
routing = "uniform"
links = [0.5]
strategies = ["on-demand", "on-demand-overlap", "mobile"]
rates = [0.5]

[[models]]
name = "olmoe-1b-7b"
geometry = "olmoe-1b-7b"
family = "olmoe"
path = "models/olmoe-tiny"
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clock") / "clocked.toml"
    path.write_text(PRESET)
    return path


@pytest.fixture(scope="module")
def done(preset, tmp_path_factory) -> Path:
    """Run the preset in a Python without the packages that a bare GPU machine lacks."""
    out, bare = tmp_path_factory.mktemp("run") / "run", narrow.bare(tmp_path_factory.mktemp("bare"))
    ran = narrow.suites("run", "--preset", str(preset), "--out", str(out), environment=bare)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 of 3 cells have records" in ran.stdout
    return out


@pytest.fixture(scope="module")
def loaded(preset):
    return timing.load(read_preset(str(preset)).synthetic[:1], RunFolder(Path()))


def test_a_run_is_calibrated_once_for_the_machine_and_once_a_link(done):
    assert len(list((done / "calibration").glob("*.json"))) == 2


def test_every_cell_holds_what_was_predicted_of_it_and_by_which_profile(done):
    for record in read(done).synthetic:
        predicted = record.config["predicted"]
        assert len(predicted["decode_ns"]) == len(predicted["ttft_ns"]) == 2
        assert predicted["profile"]["name"].endswith("calibrated")
        assert min(predicted["decode_ns"]) > 0
        if record.strategy != "mobile":  # whose bytes follow from the script alone
            assert predicted["decode_bytes"] == [item.decode_bytes for item in record.items]


def test_the_page_has_both_clocks_and_says_that_a_paced_link_measures_nothing(done):
    page = markdown(content.build(read(done)))
    assert "## Virtual clock against wall clock" in page
    assert "TPOT of 3 cells: the median error is" in page
    assert "| as calibrated |" in page
    assert "measured beside the cell" not in page
    assert "a thread that sleeps" in page
    assert "4 fallbacks" in page
    assert "The calibrated machine" in page
    assert "least squares over" in page


def test_a_link_of_twice_the_bandwidth_is_predicted_to_be_faster(preset, loaded, tmp_path):
    shape = next(s for s in read_preset(str(preset)).synthetic if s.strategy == "on-demand")
    card = calibrate.calibrated(shape, torch.bfloat16, RunFolder(tmp_path))
    scripts, strategy = timing.scripts_for(shape, loaded), timing.resolve("on-demand")
    fast = replace(card, link_gb_per_s=2 * card.link_gb_per_s)
    one, two = (
        sum(each.decode_ns for each in calibrate.predicted(scripts, strategy, loaded.made.geometry, 8, use))
        for use in (card, fast)
    )
    rows = len(scripts) * 2 * 8 * 4 * loaded.made.geometry.expert_nbytes
    assert one - two == pytest.approx(rows / card.link_gb_per_s / 2, rel=1e-3)


def test_a_measurement_stands_where_the_clock_cannot_be_asked(preset, loaded, done, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise Refused("24 slots take 58.0 GiB and cuda:0 has 20.0 GiB free; give fewer slots.")

    monkeypatch.setattr(measurement, "predicted", refused)
    shape = next(s for s in read_preset(str(preset)).synthetic if s.strategy == "on-demand")
    record = timing.record(shape, loaded, timing.profile(shape.hardware))
    assert record.items[0].decode_ns > 0
    assert record.config["predicted"] is None
    results = read(done)
    page = markdown(content.build(replace(results, synthetic=(*results.synthetic, record))))
    assert "Measured and not predicted: olmoe-1b-7b, on-demand" in page
    assert "(24 slots take 58.0 GiB" in page
    assert "TPOT of 3 cells" in page


def test_a_cell_is_measured_on_a_machine_that_no_profile_fits(preset, loaded, monkeypatch, tmp_path):
    def refused(*_: object) -> None:
        raise Refused("More bytes did not take longer in copies; measure again with nothing else running.")

    monkeypatch.setattr(timing, "calibrated", refused)
    shape, run = read_preset(str(preset)).synthetic[0], RunFolder(tmp_path)
    timing.measure(shape, loaded, run)
    record = load(run.record(shape.id))
    assert record.items[0].decode_ns > 0
    assert record.config["predicted"] is None
    assert record.config["unpredicted"].startswith("More bytes did not take longer")


def test_a_virtual_cell_predicted_by_its_own_profile_is_off_by_nothing(preset, loaded):
    """The prediction leaves the bytes where they are, and its clock must not notice."""
    for asked in read_preset(str(preset), link="virtual").synthetic:
        shape = replace(asked, link_gb_per_s=None)
        record = timing.record(shape, loaded, timing.profile(shape.hardware))
        assert clock.relative_error(record) == 0, shape.strategy
        assert clock.relative_error(record, "ttft_ns") == 0
        if shape.strategy == "mobile":
            use = record.config["fallback_use"]
            assert 0 < use["ns"] < sum(item.decode_ns for item in record.items)
            assert use["passes"] == 4
            assert use["nbytes"] % record.config["expert_nbytes"] == 0
        else:
            assert record.config["fallback_use"] is None


def test_a_resumed_run_goes_on_with_the_profile_it_has(preset, tmp_path):
    shape, run = read_preset(str(preset)).synthetic[0], RunFolder(tmp_path)
    first = calibrate.calibrated(shape, torch.bfloat16, run)
    assert calibrate.calibrated(shape, torch.bfloat16, run) == first
    other = calibrate.calibrated(replace(shape, link_gb_per_s=0.25), torch.bfloat16, run)
    assert other.memory_gb_per_s == first.memory_gb_per_s
    assert other.link_gb_per_s != first.link_gb_per_s
    assert calibrate.calibrated(replace(shape, link="virtual"), torch.bfloat16, run) is None


def test_the_pace_of_a_row_is_what_attach_gives_it(preset):
    shape = read_preset(str(preset)).synthetic[0]
    assert calibrate.pace_of(shape)(10**6) == 10_000 + 2_000_000
    assert calibrate.pace_of(replace(shape, link_gb_per_s=None))(10**6) == 10_000 + 40_000


# --- the link in fallbacks --------------------------------------------------------------------------


def ledger_of(marks: list[tuple[str, int, int]], ends: list[int]) -> Ledger:
    """Return a ledger of copies of 10 ns with these ends, and these marks."""
    ledger = Ledger()
    for end in ends:
        ledger.event("load", end - 10, end, (0, 0))
    for mark in marks:
        ledger.mark(*mark)
    ledger.counters.loads = len(ends)
    return ledger


def test_a_fallback_lasts_from_being_unsure_to_its_last_copy():
    marks = [("little", 0, 0), ("fallback", 100, 2), ("big", 105, 3), ("little", 140, 5), ("little", 170, 6)]
    ledger = ledger_of(marks, [10, 20, 115, 125, 150, 160])
    assert fallback_use(ledger, 7) == LinkUse(passes=1, ns=50, nbytes=21)  # the copy to 150 had begun before 140


def test_a_fallback_that_copied_nothing_is_none_and_the_last_one_ends_with_the_ledger():
    marks = [("little", 0, 0), ("fallback", 30, 1), ("big", 31, 1), ("little", 50, 1), ("fallback", 60, 1)]
    assert fallback_use(ledger_of(marks, [10, 80]), 7) == LinkUse(passes=1, ns=20, nbytes=7)


def test_a_ledger_that_lost_copies_says_nothing():
    ledger = ledger_of([("fallback", 0, 0)], [10])
    ledger.counters.loads += 1
    assert fallback_use(ledger, 7) is None


@pytest.mark.parametrize("name", ["on-demand", "on-demand-overlap"])
@pytest.mark.parametrize("link_gb_per_s", [0.2, 25.0])  # copies take longer than products, and shorter
def test_the_clock_uses_the_link_as_far_as_the_bound_of_its_schedule(loaded, preset, name, link_gb_per_s):
    shape = next(s for s in read_preset(str(preset)).synthetic if s.strategy == name)
    geometry, strategy = loaded.made.geometry, timing.resolve(name)
    card = HardwareProfile("plain", 2**34, 700.0, 90.0, link_gb_per_s, 1e-5, 4e-6, 2**30, 40.0, 0.5, (), 5e-5, 1e-4)
    scripts, cost = timing.scripts_for(shape, loaded), CostModel(card, geometry)
    played = calibrate.predicted(scripts, strategy, geometry, geometry.top_k, card)
    row_gb_per_s = geometry.expert_nbytes / cost.load_ns
    share = sum(one.decode_bytes for one in played) / sum(one.decode_ns for one in played) / row_gb_per_s
    bound = link_bound(strategy, cost, None)
    assert share == pytest.approx(bound.decode, rel=1e-6)
    assert bound.fallback is None
    faster = link_bound(strategy, CostModel(replace(card, link_gb_per_s=2 * link_gb_per_s), geometry), None)
    assert faster.decode < bound.decode, "the faster the link, the longer it has nothing to do"


def test_fallbacks_are_bounded_by_their_schedule_on_the_clock_and_a_cache_bounds_nothing(loaded):
    geometry = loaded.made.geometry
    cost = CostModel(profile("auto"), geometry)
    use = LinkUse(passes=3, ns=20 * cost.load_ns, nbytes=7 * geometry.expert_nbytes)
    bound = link_bound(timing.resolve("mobile"), cost, use)
    assert bound.fallback == pytest.approx(7 / 20)
    assert bound.decode is None
    assert link_bound(timing.resolve("lru"), cost, None).decode is None
    assert link_bound(timing.resolve("mobile"), cost, LinkUse(0, 0, 0)).fallback is None


@pytest.mark.parametrize("cold", [False, True])
def test_fallbacks_on_the_clock_are_those_of_a_live_run_on_its_link(preset, loaded, cold):
    shape = next(s for s in read_preset(str(preset), link="virtual").synthetic if s.strategy == "mobile")
    shape = replace(shape, link_gb_per_s=None, repeats=1 if cold else 2)
    record, strategy = timing.record(shape, loaded), timing.resolve("mobile")
    geometry = loaded.made.geometry
    layer_map = tuple((layer,) for layer in range(geometry.moe_layers))
    setup = ReplaySetup(strategy, geometry, layer_map, timing.profile(shape.hardware), record.slots)
    on_clock = fallbacks_on_clock(timing.scripts_for(shape, loaded), setup, cold=cold)
    assert vars(on_clock) == record.config["fallback_use"]
    assert on_clock.passes == 2 * shape.repeats


def test_every_predicted_cell_has_the_bound_on_its_link_and_the_aim_is_relative_to_it(done):
    results = read(done)
    table = clock.link_use(results.synthetic)
    rows = {(row[2].split()[0], row[5]): dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert set(rows) == {
        ("on-demand", "decode steps"),
        ("on-demand-overlap", "decode steps"),
        ("mobile", "4 fallbacks"),
    }
    for (name, _), row in rows.items():
        share, bound, of_bound = (float(row[head][:-2]) for head in ("of the link", "bound", "of the bound"))
        assert of_bound == pytest.approx(100 * share / bound, abs=1.0)
        assert row["aim"] == ("-" if name == "on-demand" else "met" if of_bound >= 95 else "not met")
    assert "95% of the bound" in markdown(content.build(results))
    old = [replace(r, config={k: v for k, v in r.config.items() if k != "link_bound"}) for r in results.synthetic]
    assert {row[-3:] for row in clock.link_use(old).rows} == {("-", "-", "-")}, "records from before have none"


def test_marks_go_with_the_ledger_and_a_replay_keeps_none():
    ledger = Ledger()
    ledger.event("load", 0, 1, (0, 0))
    ledger.mark("little", 0, 0)
    ledger.clear()
    assert not ledger.marks
    assert isinstance(Event("load", 0, 1, (0, 0)), tuple)
