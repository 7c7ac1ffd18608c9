"""Two files of pytest-benchmark: compared where one machine made both, and refused in a sentence otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from reports.checks import abba
from reports.checks.benchmarks import UnlikeMachines, identity, same
from reports.pages import write
from suites.record import write_json
from tests import absurd

pytest.importorskip("pytest_benchmark")
GPU = {"name": "H100", "uuid": "GPU-1"}
PROCESSOR = {"brand_raw": "A", "count": 2}
NUMBERS = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "ld15iqr", "hd15iqr", "ops", "total")
STATS = {
    **dict.fromkeys(NUMBERS, 1.0),
    "rounds": 5,
    "iterations": 1,
    "iqr_outliers": 0,
    "stddev_outliers": 0,
    "outliers": "0;0",
}


def result(**changed: Any) -> dict[str, Any]:
    bench = {
        "group": None,
        "name": "t",
        "fullname": "a::t",
        "params": None,
        "param": None,
        "extra_info": {},
        "options": {},
        "stats": STATS,
    }
    return {
        "machine_info": {"gpu": None, "cpu": PROCESSOR, "node": "one"},
        "commit_info": {},
        "benchmarks": [bench],
        "datetime": "2026-01-01T00:00:00",
        "version": "5.1.0",
        **changed,
    }


@pytest.fixture
def compared(tmp_path, monkeypatch, capfd):
    """Compare two files of these contents; returns the exit code, what was shown, and what was refused."""
    from reports.__main__ import main

    def compare(base: Any, head: Any) -> tuple[int, str, str]:
        for name, content in (("base", base), ("head", head)):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / f"{name}.json").write_bytes(data)
        words = ["reports", "benchmarks", str(tmp_path / "base.json"), str(tmp_path / "head.json")]
        monkeypatch.setattr("sys.argv", words)
        code = main()
        return code, *capfd.readouterr()

    return compare


def test_results_of_one_machine_are_shown_side_by_side(compared):
    code, shown, refused = compared(result(), result())
    assert (code, refused) == (0, "")
    assert shown.count("a::t") + shown.count("\nt (") >= 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"gpu": GPU}, {"gpu": {**GPU, "uuid": "GPU-2"}}),
        ({"gpu": GPU}, {"gpu": None, "cpu": PROCESSOR}),
        ({"gpu": None, "cpu": PROCESSOR}, {"gpu": None, "cpu": {**PROCESSOR, "count": 4}}),
        ({"gpu": None, "cpu": PROCESSOR}, {"gpu": None, "cpu": {**PROCESSOR, "brand_raw": "B"}}),
    ],
)
def test_two_machines_are_told_apart(one, other):
    same(one, one)
    with pytest.raises(UnlikeMachines, match="run both on one machine"):
        same(one, other)


@pytest.mark.parametrize(
    "machine",
    [
        None,
        "gpu",
        [],
        {},
        {"gpu": "H100"},
        {"gpu": {}},
        {"gpu": {"name": "H100"}},
        {"gpu": {"name": "H100", "uuid": ""}},
        {"gpu": {"name": None, "uuid": "GPU-1"}},
        {"gpu": None},
        {"gpu": None, "cpu": None},
        {"gpu": None, "cpu": {}},
        {"gpu": None, "cpu": "A"},
        {"gpu": None, "cpu": {"count": 8}},
        {"gpu": None, "cpu": {"brand_raw": "A"}},
        {"gpu": None, "cpu": {"brand_raw": "", "count": 8}},
        {"gpu": None, "cpu": {"brand_raw": None, "count": 8}},
        {"gpu": None, "cpu": {"brand_raw": "A", "count": 0}},
    ],
)
def test_a_machine_of_which_something_is_unknown_is_like_none_not_even_itself(machine):
    with pytest.raises(UnlikeMachines, match="does not say"):
        identity(machine)
    with pytest.raises(UnlikeMachines, match="does not say"):
        same(machine, machine)


ODD = {
    "no JSON": b"{",
    "no text": b"\xff",
    "too deep": b"[" * 100_000,
    "a list": [],
    "a number": 3,
    "another file": {"cells": []},
    "no benchmark": result(benchmarks=[]),
    "benchmarks null": result(benchmarks=None),
    "benchmarks a word": result(benchmarks="t"),
    "a benchmark null": result(benchmarks=[None]),
    "no statistics": result(benchmarks=[{"fullname": "a::t", "stats": None}]),
    "part of the statistics": result(benchmarks=[{"fullname": "a::t", "stats": {"min": 1.0}}]),
    "a statistic that is a word": result(benchmarks=[{"fullname": "a::t", "stats": {**STATS, "median": "x"}}]),
    "a statistic that is no number": result(
        benchmarks=[{"fullname": "a::t", "stats": {**STATS, "median": float("nan")}}]
    ),
    "no name": result(benchmarks=[{"fullname": None, "stats": STATS}]),
    "what pytest-benchmark alone finds odd": result(benchmarks=[{"fullname": "a::t", "stats": STATS}]),
}


def test_a_number_beyond_any_and_a_long_name_are_refused_in_a_short_sentence(compared):
    [bench] = result()["benchmarks"]
    for head in (
        result(benchmarks=[{**bench, "stats": {**STATS, "iqr": 10**400}}]),
        result(machine_info={"gpu": None, "cpu": {**PROCESSOR, "brand_raw": "x" * 5000}}),
    ):
        code, shown, refused = compared(result(), head)
        assert (code, shown) == (2, "")
        assert refused.count("\n") == 1
        assert len(refused) < 500


@pytest.mark.parametrize("head", ODD.values(), ids=ODD)
def test_a_file_that_is_broken_or_odd_is_refused_in_a_sentence(compared, head):
    code, shown, refused = compared(result(), head)
    assert (code, shown) == (2, "")
    assert refused.startswith("error: ")
    assert refused.count("\n") == 1
    assert "nox -s bench" in refused


def test_files_of_runs_trials_and_expectations_that_lack_something_are_refused(tmp_path, monkeypatch, capsys):
    from reports.__main__ import main

    def refusal(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["reports", *words])
        assert main() == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    write_json(tmp_path / "run.json", {"preset": "x", "cells": [{"id": "1"}]})
    assert "is no plan ('label')" in refusal("build", str(tmp_path))
    write_json(tmp_path / "trial.json", {"format": 1})
    assert "a trial without kind" in refusal("abba", str(tmp_path))
    write_json(tmp_path / "trial.json", {"kind": "compare"})
    assert "a trial of format None" in refusal("abba", str(tmp_path))
    assert "is not a run folder" in refusal("check", str(Path(__file__)))
    assert "File name too long" in refusal("check", "x" * 256)
    assert "invalid choice: 'buid'" in refusal("buid")
    assert "see python -m reports --help" in refusal("build", "--frobnicate")


def test_absurd_trials_are_refused_or_judged(tmp_path):
    timed = {"strategy": "lru", "written": [1, 2], "ids_sha256": "f" * 64}
    timed["repeats"] = [{"wall_ns": 1000, "counters": {"loads": 3}}, {"wall_ns": 1100, "counters": {"loads": 3}}]
    one = {"steps": 2, "repeats": 2, "layers": 1, "model": None, "link": "disk", "cpu": "c", "torch": "2", "gpu": None}
    one |= {"git_commit": "a", "git_dirty": False, "transformers": "5", "python": "3", "strategies": [timed]}
    one |= {"disk": {"model": "d", "source": "s", "file_system": "f"}}
    sides, processes = [{"name": "base"}, {"name": "head"}], [[one] * 3, [one] * 3]
    sound = {"format": 1, "kind": "regression", "scope": "cpu+disk", "sides": sides, "processes": processes}
    random, judged, told = Random(9), 0, []
    for number in range(1000):
        absurd.put(tmp_path / "trial.json", absurd.changed(json.loads(json.dumps(sound)), random) if number else sound)
        try:
            trial = abba.read(tmp_path)
            write.markdown(abba.report(trial, abba.judge(trial)))
            judged += 1
        except abba.Unjudgeable as refused:
            told.append(str(refused))
    assert min(judged, len(told)) > 50
    assert all("\n" not in one and len(one) < 500 for one in told)
