"""A composed name works wherever a name goes: load, every command, presets, comparisons, and through to the report."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import PRESET, run

import mobile
from mobile.cli import main
from mobile.errors import Refused
from mobile.policies.strategy import resolve, strategies
from suites.abba import variants
from suites.plan.preset import read_preset
from suites.record import load
from suites.synthetic.cells import SyntheticCell

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "suites/models/olmoe-tiny")
JOINED = '["resident", "static-half", "mobile", "mobile+lfu", "static-half+lfu+cpu-hybrid", "next-gate+lfu"]'
EVERY = PRESET.replace('["static-half", "mobile"]', JOINED).replace('"7GiB", "8GiB"', '"8GiB"')


@pytest.fixture
def said(capsys):
    """Run a command here; return its JSON."""

    def command(*words: str, code: int = 0) -> dict:
        capsys.readouterr()
        assert main([*words, "--json"]) == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return command


def test_a_listing_says_which_parts_each_name_brings_and_what_a_composed_one_is(said, capsys):
    listed = {one["name"]: one["parts"] for one in said("strategies")["strategies"]}
    assert listed["mobile"] == ["gating"]
    assert listed["fate"] == ["eviction", "lookahead"]
    assert listed["adapmoe"] == ["gating", "eviction", "lookahead"]
    assert listed["cpu-hybrid"] == ["placement"]
    assert listed["lru"] == listed["on-demand"] == listed["resident"] == []
    (one, plain) = said("strategies", "mobile+lfu+cpu-hybrid", "lru")["strategies"]
    assert (one["name"], one["lossless"]) == ("mobile+lfu+cpu-hybrid", False)
    assert one["summary"] == "gating of mobile, eviction of lfu, placement of cpu-hybrid"
    assert plain["name"] == "lru"
    assert main(["strategies"]) == 0
    assert "brings: eviction, lookahead\n" in capsys.readouterr().out
    assert main(["strategies", "mobile+lru"]) == 2
    assert capsys.readouterr().err.startswith("error: Strategy lru brings no gating")


def test_each_pair_of_listed_names_is_composed_or_refused_in_a_sentence():
    made = 0
    for first in strategies():
        for second in strategies():
            try:
                one = resolve(f"{first}+{second}")
            except Refused as refused:
                told = str(refused)
            else:
                made += 1
                told = f"{one.summary}."
                assert set(one.parts) == {*strategies()[first].parts, *strategies()[second].parts}
                assert not set(strategies()[first].parts) & set(strategies()[second].parts)
            assert told.endswith(".")
    assert made > 50


def test_a_plan_bounds_those_that_are_asked_for(said, capsys):
    asked = ("mobile", "mobile+lfu", "mobile+cpu-hybrid", "static-half", "static-half+cpu-hybrid")
    words = [word for name in asked for word in ("--strategy", name)]
    rows = {row["strategy"]: row for row in said("plan", "olmoe-1b-7b", "--host-memory", "64GiB", *words)["strategies"]}
    assert tuple(rows) == asked
    never, always = rows["mobile+cpu-hybrid"]["bounds"]
    (half,) = rows["static-half+cpu-hybrid"]["bounds"]
    assert rows["mobile+lfu"]["bounds"] == rows["mobile"]["bounds"]
    assert (never["nbytes"], never["link_tokens_per_s"]) == (half["nbytes"], half["link_tokens_per_s"])
    assert never["nbytes"] < always["nbytes"] < rows["mobile"]["bounds"][1]["nbytes"]
    assert main(["plan", "olmoe-1b-7b", "--strategy", "mobile+lruu"]) == 2
    assert "did you mean lru?" in capsys.readouterr().err
    assert main(["plan", "olmoe-1b-7b", "--disk", "3GB/s", "--strategy", "mobile+cpu-hybrid"]) == 2
    assert "computes experts where they lie, which a disk cannot" in capsys.readouterr().err


def test_a_command_generates_traces_and_replays_under_it(said, tmp_path, capsys):
    engine = ("--slots", "80", "--strategy", "mobile+lfu", "--gamma", "0.99", "--max-new-tokens", "12")
    assert said("generate", MODEL, "Q: not True is", *engine)["strategy"] == "mobile+lfu"
    (tmp_path / "prompts.txt").write_text("Q: not True is\n")
    path = str(tmp_path / "t.npz")
    assert main(["trace", MODEL, "--prompts", str(tmp_path / "prompts.txt"), "--out", path, *engine]) == 0
    made = said("replay", path)
    assert made["recorded_by"] == "mobile+lfu"
    assert {result["strategy"] for result in made["results"]} == {"mobile", "mobile+lfu"}
    plot = ("--plot", str(tmp_path / "hits.svg"))
    made = said("replay", path, "--strategy", "mobile+belady", "--strategy", "mobile+next-gate", *plot)
    assert {result["strategy"] for result in made["results"]} == {"mobile+belady", "mobile+next-gate"}
    assert "mobile+belady" in (tmp_path / "hits.svg").read_text()
    assert main(["replay", path, "--strategy", "lfu+cpu-hybrid"]) == 2
    assert "it would choose other experts than mobile+lfu did" in capsys.readouterr().err


def test_a_model_is_loaded_under_it():
    model = mobile.load(MODEL, "mobile+lfu+cpu-hybrid", slots=80, gamma=0.9)
    assert (model.mobile.strategy.name, model.mobile.strategy.gamma) == ("mobile+lfu+cpu-hybrid", 0.9)


def test_two_composed_ones_can_be_compared():
    first, second = variants.named("mobile", "mobile+lfu", ())
    assert (first.strategies, second.strategies) == (("mobile",), ("mobile+lfu",))
    with pytest.raises(Refused, match="Strategies lfu and belady both bring the eviction"):
        variants.named("lru", "lfu+belady", ())


def test_a_disk_s_script_is_played_under_it(tmp_path):
    text = (ROOT / "suites/presets/measured.toml").read_text()
    path = tmp_path / "joined.toml"
    path.write_text(text.replace('"static-half"', '"static-half+lfu"').replace('"mobile"', '"mobile+lfu"'))
    assert path.read_text() != text
    played = {cell.strategy for cell in read_preset(str(path)).cells if isinstance(cell, SyntheticCell)}
    assert "mobile+lfu" in played


def test_one_live_run_of_a_gating_serves_all_that_take_it(tmp_path):
    """Also with the suite's own checks, and through to a page, where the name is whole."""
    path, out = tmp_path / "joined.toml", tmp_path / "run"
    path.write_text(EVERY)
    preset = read_preset(str(path))
    assert [one.strategy for one in preset.generations] == ["resident", "static-half", "mobile"]
    done = run(path, out)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [load(file) for file in (out / "records").glob("*.json")]
    names = {record.strategy for record in records}
    assert names == set(json.loads(JOINED))
    outputs = {}
    for record in records:
        outputs.setdefault(resolve(record.strategy).routed_by.split("+")[0], set()).add(
            tuple((item.doc, item.output) for item in record.items)
        )
        assert all(record.checks.values())
    assert {name: len(found) for name, found in outputs.items() if name in ("mobile", "static-half")} == {
        "mobile": 1,
        "static-half": 1,
    }
    built = subprocess.run(
        [sys.executable, "-m", "reports", "build", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    assert "| mobile+lfu (gamma 0.7) |" in (out / "report.md").read_text()
    assert "\nmobile+lfu (gamma 0.7) & " in (out / "tables.tex").read_text()
    rows = list(csv.DictReader((out / "cells.csv").open()))
    assert {row["strategy"] for row in rows} == names
    assert any("mobile+lfu" in svg.read_text() for svg in (out / "figures").glob("*.svg"))
    again = subprocess.run(
        [sys.executable, "-m", "suites", "replay", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stdout + again.stderr
