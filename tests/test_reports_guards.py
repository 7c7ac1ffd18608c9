"""The guards of a report: the manifest, the difference of two runs, the gate, and the checklist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from reports.checks import bundle, expected
from reports.checks.checklist import evidence, lines
from reports.checks.difference import difference
from reports.data.results import NoResults, read
from reports.pages import content, write
from tests import report_runs
from tests.report_runs import Rule, results

ROOT = Path(__file__).parent.parent


def reports(*arguments: object) -> subprocess.CompletedProcess:
    """Run `python -m reports` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "reports", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a run folder with its page and manifest."""
    folder = report_runs.write(Rule(), tmp_path_factory.mktemp("run") / "tiny")
    found = read(folder)
    write.write(content.build(found), found, folder)
    bundle.seal(folder, found)
    return folder


def test_an_untouched_bundle_holds(run):
    found = bundle.verify(run)
    assert found.changed == ()
    assert found.surroundings == ()
    assert found.files > 30


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.data())
def test_any_changed_byte_is_found(run, data):
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != bundle.MANIFEST)
    victim = data.draw(some.sampled_from(files))
    sound = victim.read_bytes()
    at = data.draw(some.integers(0, len(sound) - 1))
    victim.write_bytes(sound[:at] + bytes([sound[at] ^ data.draw(some.integers(1, 255))]) + sound[at + 1 :])
    try:
        assert bundle.verify(run).changed == (f"{victim.relative_to(run).as_posix()} differs",)
    finally:
        victim.write_bytes(sound)


def test_a_file_added_or_taken_away_is_found(run):
    (run / "records" / "extra.json").write_text("{}")
    victim = next((run / "figures").glob("*.svg"))
    sound = victim.read_bytes()
    victim.unlink()
    try:
        found = bundle.verify(run).changed
        assert set(found) == {f"figures/{victim.name} is missing", "records/extra.json was added"}
    finally:
        victim.write_bytes(sound)
        (run / "records" / "extra.json").unlink()


def test_the_manifest_names_code_and_packages(run):
    sealed = json.loads((run / bundle.MANIFEST).read_text())
    assert {"reports/stats/intervals.py", "suites/record.py", "mobile/ledger.py"} <= sealed["code"].keys()
    assert re.fullmatch(r"2\S+ [0-9a-f]{64}", sealed["wheels"]["torch"])
    sealed["code"]["reports/stats/intervals.py"] = "0"
    (run / bundle.MANIFEST).write_text(json.dumps(sealed))
    assert bundle.verify(run).surroundings == ("code: reports/stats/intervals.py differs",)
    bundle.seal(run, read(run))


def test_a_folder_without_a_manifest_says_what_to_do(tmp_path):
    with pytest.raises(bundle.NoManifest, match="reports build"):
        bundle.verify(tmp_path)


# --- two runs ------------------------------------------------------------------------------------------


def kinds(first, second) -> set[str]:
    """Return the kinds of change between two runs."""
    return {row[-1] for row in difference(first, second).cells.rows}


def changed(found, **changes):
    """Return the same results with one lru cell changed, and that cell."""
    at = next(n for n, r in enumerate(found.records) if r.strategy == "lru")
    records = list(found.records)
    records[at] = replace(records[at], **changes)
    return replace(found, records=tuple(records)), records[at]


def test_equal_runs_do_not_differ():
    assert difference(results(Rule()), results(Rule())).matters == ()


def test_what_changed_is_told_apart():
    found = results(Rule())
    _, victim = changed(found)
    text = tuple(replace(item, output="?") for item in victim.items)
    assert kinds(found, changed(found, items=text)[0]) == {"outputs"}
    assert kinds(found, changed(found, counters={**victim.counters, "loads": 1})[0]) == {"counters"}
    slower = tuple(replace(item, decode_ns=item.decode_ns + 1) for item in victim.items)
    assert kinds(found, changed(found, items=slower)[0]) == {"time"}
    assert kinds(found, replace(found, records=found.records[1:])) == {"cells"}


def test_unlike_machines_are_not_compared_by_time():
    ours = results(Rule(scope="gpu+pcie", gpu={"name": "one"}))
    slower = {"items": tuple(replace(i, decode_ns=2 * i.decode_ns) for i in changed(ours)[1].items)}
    assert kinds(ours, changed(ours, **slower)[0]) == {"time"}
    theirs = changed(results(Rule(scope="gpu+pcie", gpu={"name": "another"})), **slower)[0]
    found = difference(ours, theirs)
    assert found.matters == ()
    assert "machine" in {row[0] for row in found.surroundings.rows}


# --- the gate ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path) -> Path:
    found = results(Rule())
    expected.save(found, "a page", tmp_path)
    return tmp_path


def test_the_same_run_passes_the_gate_and_any_other_does_not(kept):
    found = results(Rule())
    passed = expected.gate(found, kept)
    assert (passed.t0, passed.t1) == ((), ())
    assert passed.cells == len(found.records) + len(found.controls)
    assert passed.speedups > 10
    _, victim = changed(found)
    one = expected.gate(changed(found, counters={**victim.counters, "loads": 111})[0], kept)
    assert [line.split(": ")[1] for line in one.t0] == ["loads is 111, expected 110"]
    assert one.t1 == ()
    later = tuple(replace(item, decode_ns=item.decode_ns + 1) for item in victim.items)
    late = expected.gate(changed(found, items=later)[0], kept)
    assert late.t0 == ()
    assert "decode_ns" in late.t1[0]
    text = tuple(replace(item, output="?") for item in victim.items)
    assert "outputs is" in expected.gate(changed(found, items=text)[0], kept).t0[0]
    assert "no record" in expected.gate(replace(found, records=found.records[1:]), kept).t0[0]


def test_wall_times_are_no_part_of_an_expectation(tmp_path):
    found = results(Rule(scope="gpu+pcie"))
    expected.save(found, "a page", tmp_path)
    later = tuple(replace(item, decode_ns=2 * item.decode_ns) for item in changed(found)[1].items)
    passed = expected.gate(changed(found, items=later)[0], tmp_path)
    assert (passed.t0, passed.t1, passed.speedups) == ((), (), 0)


def test_an_expectation_is_small(tmp_path):
    """Of a run of 750 cells, under a megabyte."""
    found = results(Rule())
    expected.save(found, "a page", tmp_path)
    each = (tmp_path / expected.CELLS).stat().st_size / (len(found.records) + len(found.controls))
    assert 750 * each < 1e6


def test_nothing_to_hold_a_run_against_says_what_to_do(tmp_path):
    with pytest.raises(expected.NoExpectation, match="reports expect"):
        expected.gate(results(Rule()), tmp_path)


# --- the checklist -------------------------------------------------------------------------------------


def test_the_checklist_has_32_lines_and_a_sound_run_lacks_only_what_it_lacks(run):
    answers = lines.run_tests(evidence.gather(run))
    assert [number for number, *_ in answers] == list(range(1, 33))
    assert len({line for _, line, *_ in answers}) == 32
    missing = {number: why for number, _, result, why in answers if result == lines.MISSING}
    assert set(missing) == {32}, missing
    assert {number for number, _, result, _ in answers if result == lines.READER} == {26, 28}


@pytest.mark.parametrize(
    ("number", "spoil"),
    [
        (6, lambda seen: _records(seen, lambda r: {"items": tuple(replace(i, prompt_sha256=r.id) for i in r.items)})),
        (
            7,
            lambda seen: _records(
                seen, lambda r: {"items": tuple(replace(i, decode_tokens=len(r.strategy)) for i in r.items)}
            ),
        ),
        (10, lambda seen: _records(seen, lambda r: {"config": {**r.config, "strategy_source": None}})),
        (13, lambda seen: _records(seen, lambda r: {"items": r.items[:5]})),
        (15, lambda seen: _records(seen, lambda r: {"items": tuple(replace(i, ttft_ns=None) for i in r.items)})),
        (16, lambda seen: _records(seen, lambda r: {"scope": "gpu+pcie"})),
        (17, lambda seen: _records(seen, lambda r: {"counters": {**r.counters, "decode_bytes": 10**15}})),
        (20, lambda seen: _records(seen, lambda r: {"config": {**r.config, "task_items": 999}})),
        (21, lambda seen: _records(seen, lambda r: {"config": {**r.config, "generation": None}})),
        (21, lambda seen: _records(seen, lambda r: {"environment": {**r.environment, "git_dirty": True}})),
        (22, lambda seen: replace(seen, run=seen.run / "figures")),
        (23, lambda seen: _records(seen, lambda r: {"checks": {"a check": False}})),
        (24, lambda seen: replace(seen, results=replace(seen.results, controls=()))),
        (25, lambda seen: replace(seen, results=replace(seen.results, absent=(("a cell", "FAILED: it broke"),)))),
        (27, lambda seen: replace(seen, plan={})),
        *((number, lambda seen: replace(seen, page="")) for number in (3, 4, 5, 14, 18, 19, 31)),
    ],
)
def test_each_line_can_fail(run, number, spoil):
    answers = {n: result for n, _, result, _ in lines.run_tests(spoil(evidence.gather(run)))}
    assert answers[number] == lines.MISSING


WARM = {"warmup": {"tokens": 20, "ns": 1}, "processes": 3, "link_measured_gb_per_s": 24.0}


@pytest.mark.parametrize(
    ("number", "lacking"),
    [
        (12, {"warmup": None}),
        (13, {"processes": 1}),
        (17, {"link_measured_gb_per_s": None}),
        (17, {"link_measured_gb_per_s": 1e-6}),
    ],
)
def test_what_is_measured_says_how(run, number, lacking):
    """A run that calls itself measured holds lines 12, 13, 16 and 17 only with what live cells write down."""
    seen = _records(
        evidence.gather(run),
        lambda r: {
            "scope": "gpu+pcie",
            "config": {**r.config, **WARM},
            "environment": {**r.environment, "telemetry": {1}},
        },
    )
    found = {n: result for n, _, result, _ in lines.run_tests(seen)}
    assert [found[n] for n in (12, 13, 16, 17)] == [lines.HELD] * 4
    spoiled = _records(seen, lambda r: {"config": {**r.config, **lacking}})
    assert {n: result for n, _, result, _ in lines.run_tests(spoiled)}[number] == lines.MISSING


def _records(seen, change):
    spoiled = tuple(replace(r, **change(r)) for r in seen.results.records)
    return replace(seen, results=replace(seen.results, records=spoiled))


# --- from the shell ------------------------------------------------------------------------------------


def test_the_verbs_say_and_return_what_they_found(run, tmp_path):
    built = reports("build", run)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "report.html" in built.stdout
    assert "NOT COMPARABLE (projected)" in built.stdout
    assert reports("verify", run).returncode == 0
    assert "Nothing that matters" in reports("diff", run, run).stdout
    assert reports("expect", run, "--out", tmp_path / "kept").returncode == 0
    passed = reports("gate", run, "--against", tmp_path / "kept")
    assert passed.returncode == 0, passed.stdout
    assert "T0 (tokens and counters): as expected" in passed.stdout
    checked = reports("check", run)
    assert checked.returncode == 1
    assert "1 MISSING" in checked.stdout


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    for verb in ("build", "check", "gate", "expect"):
        done = reports(verb, tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    with pytest.raises(NoResults):
        read(tmp_path)
