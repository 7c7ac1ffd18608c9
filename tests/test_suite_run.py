"""A run from preset to page: repeated, killed, broken. Small, but with the real model and the real processes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from reports.data import compare
from reports.data.results import read
from reports.pages.content import build
from reports.plots import token_time
from reports.tables import speed
from suites.measure.repeated import Held, repeat
from suites.plan.preset import read_preset
from suites.record import RunFolder, load, read_json, write_json

ROOT = Path(__file__).parent.parent
PRESET = (ROOT / "suites/presets/smoke.toml").read_text().replace("items = 32", "items = 4")


def suites(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "suites", *arguments]


def run_preset(preset: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        suites("run", "--preset", str(preset), "--out", str(out)), cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(PRESET)
    return path


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory) -> Path:
    """A run folder with every record."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run_preset(preset, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 cells have records" in done.stdout
    return out


def facts(record) -> dict:
    """A record without what may differ between two runs of the same cell."""
    kept = {**vars(record), "items": [vars(item) for item in record.items]}
    return {name: value for name, value in kept.items() if name not in ("wall_seconds", "environment")}


def test_a_second_run_gives_the_same_records_and_the_same_page(finished, preset, tmp_path):
    assert run_preset(preset, tmp_path / "again").returncode == 0
    for first in sorted((finished / "records").iterdir()):
        assert facts(load(first)) == facts(load(tmp_path / "again" / "records" / first.name))
    assert build(read(finished)) == build(read(tmp_path / "again"))


def test_every_check_the_run_made_of_itself_held(finished):
    results = read(finished)
    held = [ok for record in results.records for ok in record.checks.values()]
    assert held
    assert all(held)
    assert build(results).alarm is None


# --- the records of a run, held to its traces -------------------------------------------------------


def scaled(record, by):
    """Return a record whose times are all scaled, its sums kept."""
    items = tuple(replace(i, ttft_ns=round(i.ttft_ns * by), decode_ns=round(i.decode_ns * by)) for i in record.items)
    return replace(record, items=items)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: scaled(r, 1.5), "items[0].ttft_ns is"),
        (lambda r: replace(r, items=tuple(replace(i, fallbacks=9) for i in r.items)), "items[0].fallbacks is 9"),
        (lambda r: replace(r, counters={**r.counters, "hits": 10**6}), "counters.hits is 1000000"),
        (lambda r: replace(r, budget="16GiB"), "slots is"),
        (lambda r: replace(r, budget="abc%"), "cannot be replayed: Cannot read the share 'abc%'"),
        (lambda r: replace(r, strategy="static-half", gamma=None), "strategy is 'static-half', and of its trace"),
        (lambda r: replace(r, strategy="no-such"), "cannot be replayed: Unknown strategy 'no-such'"),
        (lambda r: replace(r, hardware="mine"), "cannot be replayed: its hardware 'mine' is known by no name"),
        (lambda r: replace(r, hardware="/dev/zero.json"), "cannot be replayed: its hardware"),
        (lambda r: replace(r, geometry="qwen3-30b-a3b"), "cannot be replayed: Geometry qwen3-30b-a3b has"),
        (lambda r: replace(r, model="another"), "model is 'another', and its trace is of 'olmoe-tiny'"),
        (lambda r: replace(r, scope="gpu+pcie"), "scope is gpu+pcie"),
        (lambda r: replace(r, lossless=True), "lossless is True"),
        (lambda r: replace(r, config={**r.config, "expert_nbytes": 1}), "config.expert_nbytes is 1"),
        (lambda r: replace(r, config={**r.config, "generation": None}), "its config names no live run"),
        (lambda r: replace(r, config={**r.config, "generation": "0"}), "generations/0.npz is not there"),
    ],
)
def test_a_record_that_its_trace_does_not_give_is_named(finished, preset, tmp_path, change, says):
    folder = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    cell = next(c for c in read_preset(str(preset)).cells if (c.strategy, c.budget) == ("mobile", "smallest"))
    plan = read_json(folder.plan)
    cells = [{"id": one["id"], "label": one["label"]} for one in plan["cells"] if one["id"] == cell.id]
    write_json(folder.plan, {**plan, "cells": cells})
    assert list(repeat(folder)) == [Held(cell.label, replayed=True, wrong=None)]
    change(load(folder.record(cell.id))).save(folder.record(cell.id))
    [held] = repeat(folder)
    assert held.wrong.startswith(says)
    assert "\n" not in held.wrong


def test_a_finished_run_is_what_its_traces_give_and_an_edited_one_is_not(finished, tmp_path):
    def replayed(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(suites("replay", *arguments), cwd=ROOT, capture_output=True, text=True)

    done = replayed(str(finished))
    assert done.returncode == 0
    assert "12 of 12 replayed records are what their traces give" in done.stdout + done.stderr
    folder = shutil.copytree(finished, tmp_path / "run")
    path = sorted((folder / "records").iterdir())[0]
    scaled(load(path), 0.5).save(path)
    done = replayed(str(folder))
    assert done.returncode == 1
    assert "11 of 12" in done.stdout + done.stderr
    done = replayed(str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_running_again_does_nothing(finished, preset):
    before = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}
    assert run_preset(preset, finished).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()} == before


def test_a_cell_that_fails_is_printed_and_stops_nothing_else(finished, preset, tmp_path):
    """A live run has fewer answers than its trace: its cells fail with a reason, the others keep their records."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    broken = next(cell for cell in read_preset(str(preset)).cells if cell.strategy == "static-half")
    answers = RunFolder(out).answers(broken.generation.id)
    told = read_json(answers)
    write_json(answers, {**told, "answers": told["answers"][1:]})
    for record in (out / "records").glob("*.json"):
        if load(record).strategy == "static-half":
            record.unlink()
    done = run_preset(preset, out)
    assert done.returncode == 1
    assert "10 of 12 cells have records" in done.stdout
    absent = dict(read(out).absent)
    assert len(absent) == 2
    assert all("ValueError: zip()" in why for why in absent.values())
    built = subprocess.run(
        [sys.executable, "-m", "reports", "build", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 1, "a run with failed cells must not pass for a good one"
    assert built.stdout.count("no record") == 2
    page = build(read(out))
    listed = next(section for section in page.sections if section.heading == "Failed and missing cells")
    assert len(listed.tables[0].rows) == 2


def test_the_page_is_whole(finished):
    subprocess.run([sys.executable, "-m", "reports", "build", str(finished)], cwd=ROOT, check=True, capture_output=True)
    page, text = (finished / "report.html").read_text(), (finished / "report.md").read_text()
    for needed in ("NOT COMPARABLE (projected)", "cpu+virtual, shipped-tiny", "static-half", "ceiling", "McNemar"):
        assert needed in page
        assert needed in text
    assert "REPRODUCED:" in page
    assert ">REPRODUCED<" not in page
    assert page.count("<svg") == len(build(read(finished)).figures) > 3
    loaded = re.sub(r'<a href="https:[^"]*">', "", page)  # a link of ours loads nothing
    assert not re.search(r"""(src|href)=["']?https?:|url\(https?:|@import""", loaded), "the page must open offline"
    assert (finished / "figures" / "pareto-olmoe-tiny.svg").is_file()


@pytest.mark.parametrize("lost", ["resident", "on-demand", "on-demand-overlap", "lru", "static-half", "mobile"])
def test_a_strategy_that_lacks_a_task_is_not_pooled_and_breaks_no_page(finished, lost):
    """Two tasks, one strategy without the second: the page is built, and no pooled row mixes unlike items."""
    results = read(finished)
    second = tuple(replace(r, task="second") for r in results.records if r.strategy != lost)
    part = replace(results, records=(*results.records, *second), absent=((f"{lost} second", "FAILED: injected"),))
    page = build(part)
    smallest = speed.by_strategy(part, "olmoe-tiny", "smallest")
    assert lost not in {row[0].split(" ")[0] for row in smallest.rows}
    assert len(smallest.rows) == 5
    assert any("FAILED: injected" in row for s in page.sections for t in s.tables for row in t.rows)


def test_a_broken_control_is_the_first_thing_the_page_says(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    victim = next((tmp_path / "run" / "records").iterdir())
    record = load(victim)
    replace(record, checks=dict.fromkeys(record.checks, False)).save(victim)
    assert build(read(tmp_path / "run")).alarm.startswith("Nothing below can be trusted")


def test_the_report_is_of_the_last_run_wherever_it_was_put(preset, finished, tmp_path):
    """Started from another folder, with the run put outside `runs`."""
    where = {"cwd": tmp_path, "capture_output": True, "text": True}
    none = subprocess.run([sys.executable, "-m", "reports", "build"], **where)
    assert none.returncode == 2
    assert "There has been no run here" in none.stderr
    out = tmp_path / "elsewhere"
    shutil.copytree(finished, out)
    assert subprocess.run(suites("run", "--preset", str(preset), "--out", str(out)), **where).returncode == 0
    (out / "report.md").unlink(missing_ok=True)
    assert subprocess.run([sys.executable, "-m", "reports", "build"], **where).returncode == 0
    assert (out / "report.md").is_file()


def test_on_demand_never_passes_its_ceiling(finished):
    for record in read(finished).records:
        if record.strategy.startswith("on-demand"):
            assert record.ceiling_tokens_per_s == pytest.approx(15.5, abs=0.05)
            for item in record.items:
                assert item.decode_tokens / (item.decode_ns / 1e9) < record.ceiling_tokens_per_s


def test_the_parts_of_a_tokens_time_add_up_to_it(finished):
    """And where a record does not tell them apart, waiting is set against everything else."""
    results = read(finished)
    data = token_time.stacked_parts(results, "olmoe-tiny").data
    assert {f"{part} (ms)" for part in ("waiting for the link", "experts")} < set(data.head)
    whole = {
        name: 1e3 * r.counters["decode_seconds"] / r.counters["tokens"]
        for r in results.records
        for name in [compare.strategy_name(r)]
        if r.budget in ("smallest", "all")
    }
    assert {row[0]: sum(map(float, row[1:])) for row in data.rows} == pytest.approx(whole, abs=3e-4)
    unknown = dict.fromkeys(("decode_dense_seconds", "decode_expert_seconds", "decode_cpu_stall_seconds"))
    untold = tuple(replace(r, counters={**r.counters, **unknown}) for r in results.records)
    assert token_time.stacked_parts(replace(results, records=untold), "olmoe-tiny").data.head[1:] == (
        "waiting (ms)",
        "everything else (ms)",
    )
