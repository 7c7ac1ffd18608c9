"""The preset shapes end to end: planned, run on a bare machine, resumed, refused, reported."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mobile.errors import OutOfReach, Refused
from mobile.links.cuda import NEAR
from reports.__main__ import parser
from reports.data.results import read
from reports.pages import content
from reports.pages.write import markdown
from reports.sections import synthetic as synthetic_sections
from suites.plan.preset import read_preset
from suites.record import Finished, RunFolder, load
from suites.run import runner
from suites.run.executors import Workers
from suites.run.jobs import Job
from suites.run.work import KINDS
from suites.run.worker import measuring
from suites.synthetic import plan, timing
from suites.synthetic.cells import synthetic_cell_from
from tests import shapes


@pytest.fixture(scope="session")
def preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shapes") / "narrow.toml"
    path.write_text(shapes.PRESET)
    return path


@pytest.fixture(scope="session")
def done(preset, tmp_path_factory) -> Path:
    """A run over the virtual link, in a Python without the packages that a bare GPU machine lacks; one cell last."""
    out, bare = tmp_path_factory.mktemp("run") / "run", shapes.bare(tmp_path_factory.mktemp("bare"))
    asked = ("run", "--preset", str(preset), "--link", "virtual", "--out", str(out))
    first = shapes.suites(*asked, "--only", "native", environment=bare)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "1 of 1 cells have records" in first.stdout
    assert len(read(out).absent) == shapes.CELLS - 1  # what was not picked is still expected
    rest = shapes.suites(*asked, environment=bare)
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert f"{shapes.CELLS} cells, 1 done" in rest.stdout
    assert f"{shapes.CELLS} of {shapes.CELLS} cells have records" in rest.stdout
    return out


def test_the_bare_python_of_these_tests_lacks_what_it_says(tmp_path):
    environment = shapes.bare(tmp_path)
    for absent in ("lm_eval", "scipy", "matplotlib", "datasets", "psutil", "hypothesis"):
        run = subprocess.run([sys.executable, "-c", f"import {absent}"], env=environment, capture_output=True)
        assert b"ModuleNotFoundError" in run.stderr, absent
    listed = "from importlib.metadata import entry_points as e; print(len(e(group='mobile.strategies')), end='')"
    run = subprocess.run([sys.executable, "-c", listed], env=environment, capture_output=True)
    assert run.stdout == b"0", run.stderr


def test_the_tests_that_need_a_gpu_start_on_a_bare_machine(tmp_path):
    """They are read whole there; only what is timed with lm-eval is left out."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=shapes.ROOT, env=shapes.bare(tmp_path), capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    collected = {line.partition("::")[0] for line in found.stdout.splitlines() if "::" in line}
    files = {f"tests/gpu/{path.name}" for path in (shapes.ROOT / "tests/gpu").glob("test_*.py")}
    assert collected == files - {"tests/gpu/test_live_timing.py"}


def test_the_shipped_preset_is_whole_and_says_what_it_takes():
    preset = read_preset("shapes")
    assert {shape.scope for shape in preset.synthetic} == {"gpu+pcie", "gpu+throttled"}
    assert {shape.link_gb_per_s for shape in preset.synthetic} == {None, 25, 12}
    assert {shape.model.weights for shape in preset.synthetic} == {"synthetic"}
    assert len({shape.id for shape in preset.synthetic}) == len(preset.synthetic)
    swept = {shape.rate for shape in preset.synthetic if shape.swept}
    assert swept == {0, 0.05, 0.1, 0.2, 0.3, 0.5}
    assert all(float(rate * preset.synthetic[0].decode_tokens).is_integer() for rate in swept)
    assert {s.budget for s in preset.synthetic if s.strategy.startswith("on-demand")} == {"smallest"}
    for model in {shape.model.name for shape in preset.synthetic}:
        for part in ("native", "25GB/s recorded", "25GB/s [uz]*", "12GB/s"):  # a command of ten minutes does one
            assert plan.seconds_of(preset.only(f"{model} {part}").synthetic) < 600
    lines = plan.describe([(shape, False) for shape in preset.synthetic])
    assert len(lines) == 5
    assert re.search(r"qwen3-30b-a3b: \d+ cells, 0 done; host memory \d+ GiB .* about \d+ minutes", lines[3])


def test_without_a_gpu_it_is_refused_in_a_sentence(preset):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Refused, match=r"timed on an NVIDIA GPU and torch finds none here; .* --link paced"):
        plan.check("shapes", read_preset(str(preset)).synthetic)
    plan.check("shapes", read_preset(str(preset), link="paced").synthetic)


@pytest.fixture
def card(monkeypatch):
    """Pretend to a GPU that shows so much memory."""

    def shows(gib: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(gib * 2**30), int(gib * 2**30)))

    return shows


def test_a_card_that_shows_a_little_less_than_the_budget_is_planned_with_what_it_has(card):
    """A card sold with 16 GB shows 15.7 to 15.99 GiB."""
    shapes_ = read_preset("shapes").only("deepseek-v2-lite").synthetic
    for gib in (15.7, 15.99):
        card(gib)
        assert f"This GPU shows {gib:.2f} GiB: cells of 16GiB are given that." in plan.check("shapes", shapes_)
    large = next(shape for shape in shapes_ if shape.budget == "16GiB")
    assert timing.memory_of(large, torch.device("cuda")) == int(15.99 * 2**30)
    assert timing.memory_of(large, torch.device("cpu")) == 16 * 2**30
    smallest = next(shape for shape in shapes_ if shape.budget == "smallest")
    assert timing.memory_of(smallest, torch.device("cuda")) is None
    card(80)
    assert timing.memory_of(large, torch.device("cuda")) == 16 * 2**30
    assert not any("are given that" in remark for remark in plan.check("shapes", shapes_))


@pytest.mark.parametrize(("sold", "shown"), [(8, 7.6), (12, 11.6), (16, 15.7), (16, 15816 / 1024), (24, 23.5)])
def test_a_budget_of_the_size_a_card_is_sold_with_is_all_that_the_card_shows(card, sold, shown):
    asked = [
        replace(shape, budget=f"{sold}GiB") for shape in read_preset("shapes").synthetic if shape.strategy == "lru"
    ]
    card(shown)
    assert f"This GPU shows {shown:.2f} GiB: cells of {sold}GiB are given that." in plan.check("shapes", asked)
    assert timing.memory_of(asked[0], torch.device("cuda")) == int(shown * 2**30)


def test_a_card_that_is_too_small_for_some_cells_leaves_out_only_those(card):
    shapes_ = read_preset("shapes").only("deepseek-v2-lite").synthetic
    card(11.63)
    told = plan.check("shapes", shapes_)
    assert "This GPU shows 11.63 GiB: cells of 16GiB are left out, and only they." in told
    assert not any("are given that" in remark for remark in told)
    large = next(shape for shape in shapes_ if shape.budget == "16GiB")
    with pytest.raises(
        Refused, match=r"A budget of 16GiB is more than the 11\.63 GiB of this GPU; give a smaller budget"
    ):
        timing.memory_of(large, torch.device("cuda"))
    only_large = [shape for shape in shapes_ if shape.budget == "16GiB"]
    with pytest.raises(Refused, match=r"A budget of 16 GiB is asked for and this GPU has 11\.6 GiB"):
        plan.check("shapes", only_large)


def test_a_run_leaves_out_what_asks_for_more_than_its_machine_has_and_that_is_no_failure(preset, tmp_path, monkeypatch):
    """Of the machine only the sizes are made up: a card that shows 4 GiB, and a link that cannot be had at 25 GB/s."""

    def in_this_process(job: Job) -> list[Finished]:
        pieces = [KINDS[job.spec["kind"]].read(fields) for fields in job.spec["pieces"]]
        return list(map(measuring(pieces, RunFolder(Path(job.spec["run"]))), pieces))

    memory_of, attached = timing.memory_of, timing.attached

    def attached_unless_too_fast(cell, made):
        if cell.link_gb_per_s is not None and cell.strategy == "mobile":
            raise OutOfReach("This link copies 12.0 GB/s and cannot be throttled to 25; give a smaller number.")
        return attached(cell, made)

    monkeypatch.setattr(runner, "do", in_this_process)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4 << 30, 4 << 30))
    monkeypatch.setattr(timing, "memory_of", lambda cell, device: memory_of(cell, torch.device("cuda")))
    monkeypatch.setattr(timing, "attached", attached_unless_too_fast)
    asked, folder, said = read_preset(str(preset), link="virtual"), RunFolder(tmp_path / "run"), io.StringIO()
    with ThreadPoolExecutor(1) as pool:

        def run(chosen) -> int:
            return runner.execute(asked, folder, Console(file=said, width=300), Workers(pool, pool), chosen)

        assert run(asked.only("native")) == 1  # nothing at all was measured
        assert run(asked) == 0
    assert f"{shapes.CELLS} cells have records, 4 are left out; took" in said.getvalue()
    assert "\nfailed" not in said.getvalue()
    assert "left out olmoe-1b-7b native zipf 1.0 lru 8GiB: A budget of 8GiB is more than" in said.getvalue()
    found = read(folder.path)
    assert (len(found.all_records), len(found.left_out), found.absent) == (shapes.CELLS - 4, 4, ())
    page = markdown(content.build(found))
    assert "4 left out" in page
    assert all(label in page and why in page for label, why in found.left_out)
    built = parser().parse_args(["build", str(folder.path)])
    assert built.command(built) == 0


def test_the_plan_says_that_a_link_near_to_what_is_asked_is_taken_as_it(card):
    card(80)
    preset = read_preset("shapes")
    assert any("by 3% at most, is taken as it is" in told for told in plan.check("shapes", preset.synthetic))
    assert NEAR == synthetic_sections.NEAR, "the page holds a link to what the engine accepts"
    assert plan.check("shapes", preset.only("olmoe-1b-7b native").synthetic) == []


def test_the_page_says_where_the_machine_was_a_little_less_than_was_asked_for(done):
    results = read(done)

    def page(**config: object) -> str:
        changed = [replace(record, config={**record.config, **config}) for record in results.synthetic]
        return markdown(content.build(replace(results, synthetic=tuple(changed))))

    assert "The link carries 24.4 GB/s by itself, which was taken as the 25 asked for." in page(
        link_native_gb_per_s=24.4, link_throttled=False
    )
    assert "copies read ordinary memory" in page(link_page_locked=False)
    slow = {"link_gb_per_s": 25.0, "link_measured_gb_per_s": 20.0}
    assert "Copies came at" not in page(**slow)  # over a link that is no GPU's
    throttled = [replace(r, scope="gpu+throttled", config={**r.config, **slow}) for r in results.synthetic]
    page_of = markdown(content.build(replace(results, synthetic=tuple(throttled))))
    assert "Copies came at 20.0 GB/s where 25 were asked for." in page_of
    short = {"memory_nbytes": int(15.7 * 2**30), "memory_asked_nbytes": 16 * 2**30}
    assert "was all that the card has, 15.70 GiB." in page(**short)
    for usual in ({"link_throttled": True, "link_page_locked": True}, {}):
        told = page(**usual)
        assert "by itself, which" not in told
        assert "ordinary memory" not in told
        assert "all that the card has" not in told


def test_what_a_preset_of_shapes_cannot_be_asked(preset, tmp_path):
    with pytest.raises(Refused, match="leave --model out"):
        read_preset("shapes", folders={"olmoe-1b-7b": tmp_path})
    with pytest.raises(Refused, match="leave --link out"):
        read_preset("smoke", link="paced")
    with pytest.raises(Refused, match="No cell of narrow is called"):
        read_preset(str(preset)).only("mixtral")
    unsaid = tmp_path / "unsaid.toml"
    unsaid.write_text(shapes.PRESET.replace('strategies = ["lru"]', 'strategies = ["mobile"]'))
    with pytest.raises(Refused, match=r"says nothing of fallbacks; give its run rates"):
        read_preset(str(unsaid))


def test_records_say_what_was_asked_and_what_was_got(done):
    records = {(r.task, r.strategy, r.config["fallback_asked"]): r for r in read(done).synthetic}
    assert len(records) == shapes.CELLS
    for record in records.values():
        assert (record.scope, record.weights) == ("cpu+virtual", "synthetic")
        assert (record.config["moe_layers"], record.config["real_moe_layers"]) == (2, 16)
        assert record.checks
        assert all(record.checks.values())
        assert [item.correct for item in record.items] == [None, None]
        assert all(item.decode_tokens == 10 and item.prompt_tokens == 6 for item in record.items)
        assert record.environment["packages"]["lm-eval"] is None  # it was made where there is none
    mobile = {rate: r for (_, name, rate), r in records.items() if name == "mobile"}
    assert sum(item.fallbacks for item in mobile[0.5].items) == 10
    assert sum(item.fallbacks for item in mobile[0.0].items) == 0
    assert mobile[None].config["fallback_scripted"] == sum(item.fallbacks for item in mobile[None].items) / 20
    main = [r for (task, *_), r in records.items() if task == "recorded routing"]
    assert len({tuple(item.prompt_sha256 for item in record.items) for record in main}) == 1


def test_the_same_cell_is_the_same_again(done, preset):
    shape = next(s for s in read_preset(str(preset), link="virtual").synthetic if s.swept and s.rate == 0.5)
    loaded = timing.load([shape], RunFolder(done))
    again, before = timing.record(shape, loaded), load(RunFolder(done).record(shape.id))
    assert (again.items, again.counters, again.guesses) == (before.items, before.counters, before.guesses)
    other = timing.record(replace(shape, link="paced", link_gb_per_s=0.5), loaded)
    assert other.scope == "cpu+paced"
    assert all(other.checks.values())
    assert other.config["link_measured_gb_per_s"] <= 0.5
    assert [item.prompt_sha256 for item in other.items] == [item.prompt_sha256 for item in again.items]


def test_a_memory_budget_holds_the_share_that_it_would_hold_of_the_real_model(done):
    lru = next(record for record in read(done).synthetic if record.strategy == "lru")
    assert lru.budget == "8GiB"
    assert 0.4 < lru.slots / (2 * 64) < 0.6  # about half of the real model's 13 GB fit beside what is dense


def test_a_run_of_shapes_alone_is_a_whole_page(done):
    results = read(done)
    assert not results.records
    report = content.build(results)
    page = markdown(report)
    assert report.alarm is None
    assert "2 of 16 MoE layers" in page
    assert "NOT COMPARABLE (projected)" in page
    assert not re.search(r"\| (REPRODUCED|SHORT|EXCEEDS) \|", page)
    assert [figure.name for figure in report.figures] == ["band-olmoe-1b-7b"]
    rates = {row[1]: row for row in report.figures[0].data.rows if row[0] == "on-demand"}
    assert rates["50"][-1] == "1.3333"
    assert float(rates["0"][2]) > float(rates["50"][2])


def test_shapes_stand_beside_scored_cells_and_change_none_of_their_chapters(done):
    from tests.report_runs import Rule, results

    scored, shaped = results(Rule()), read(done).synthetic
    alone, both = content.build(scored), content.build(replace(scored, synthetic=shaped))
    kept = {section.heading: section for section in both.sections}
    changed = [section.heading for section in alone.sections if kept.get(section.heading) != section]
    assert changed == ["Controls", "Limits"]  # which hold the checks and the limits of both
    assert len(both.sections) > len(alone.sections)


def test_a_shape_travels_as_json(preset):
    import json
    from dataclasses import asdict

    for shape in read_preset(str(preset)).synthetic:
        assert synthetic_cell_from(json.loads(json.dumps(asdict(shape)))) == shape
