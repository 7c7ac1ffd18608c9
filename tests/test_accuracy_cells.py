"""The preset accuracy: fresh items, answers of the stock model, a rule that keeps its error rate, and an early end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import report_runs
import torch
from tiny_run import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobile.errors import Refused
from reports.checks.expected import folder_of, gate
from reports.data.fingerprint import fingerprints
from reports.data.results import read
from reports.pages.content import build
from reports.pages.write import markdown
from reports.sections.accuracy import KEPT
from reports.stats.intervals import Paired
from reports.tables.accuracy import judged
from suites.plan.accuracy_cells import FULL_K, PAPERS, RANDOM, STATIC
from suites.plan.looks import ERROR, difference, error_of
from suites.plan.preset import presets, read_preset
from suites.record import RunFolder, load, read_json, write_json
from suites.tasks.catalogue import SHIPPED
from suites.tasks.files import shipped
from suites.tasks.fresh import verdict_items
from suites.tasks.item import held_out

FOLDER = Path(__file__).parent.parent / "suites/models/qwen2-moe-tiny"
TASKS, ITEMS = ("object_counting", "web_of_lies"), 6
PRESET = """
minutes = 1
tasks = ["object_counting", "web_of_lies"]
fresh_items = 6
rounds = 2
margin_points = {margin}
gammas = [0.99]
seeds = [3]

[[models]]
name = "qwen2-moe-tiny"
path = "models/qwen2-moe-tiny"
geometry = "qwen1.5-moe-a2.7b"
weights = "shipped-tiny"
family = "qwen2-moe"
"""


def finish(folder: Path, margin: float) -> Path:
    folder.mkdir()
    (folder / "rounds.toml").write_text(PRESET.format(margin=margin))
    done = run(folder / "rounds.toml", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 cells have records" in done.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return finish(tmp_path_factory.mktemp("accuracy") / "all", 1)


@pytest.fixture(scope="module")
def records(finished):
    return sorted(
        (load(path) for path in (finished / "records").glob("*.json")), key=lambda r: (r.config["round"], r.task)
    )


@torch.no_grad()
def stock_answers(task: str, prompts: list[str]) -> list[str]:
    """The short answer of the stock model to each prompt, asked alone."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    said = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**ids, max_new_tokens=150, do_sample=False)[0, ids["input_ids"].shape[1] :]
        line = tokenizer.decode(written, skip_special_tokens=True).split("\n")[0]
        found = re.search(r"answer is (\w+)", line)
        said.append(found[1] if found else "")
    return said


@pytest.mark.parametrize("task", sorted(SHIPPED))
def test_fresh_items_are_on_the_test_side_different_and_not_shipped(task):
    items = verdict_items(task, 200, 3)
    assert len({item.prompt for item in items}) == 200
    assert all(held_out(item.key) for item in items)
    assert not {item.prompt for item in items} & {item["prompt"] for item in shipped(task)}
    assert items[:50] == verdict_items(task, 50, 3)
    assert items != verdict_items(task, 200, 4)


def test_full_k_scores_what_the_stock_model_answers(records):
    for record in records:
        items = verdict_items(record.task, 2 * ITEMS, 3)[ITEMS * (record.config["round"] - 1) :][:ITEMS]
        said = stock_answers(record.task, [item.prompt for item in items])
        right = "".join("01"[answer == item.answer] for answer, item in zip(said, items, strict=True))
        assert record.config["right"][FULL_K] == right


def test_every_gating_answers_and_the_control_falls_back_about_as_often(records):
    for record in records:
        assert set(record.config["right"]) == {FULL_K, STATIC, PAPERS, "MoBiLE 0.99", RANDOM}
        assert all(record.checks.values())
        assert len(record.checks) == 2
        counts = {each["gating"]: each for each in record.config["gatings"]}
        assert counts[FULL_K]["fallbacks"] == counts[STATIC]["fallbacks"] == 0 < counts[PAPERS]["tokens"]
        assert counts["MoBiLE 0.99"]["fallbacks"] > counts[PAPERS]["fallbacks"]
        assert counts[RANDOM]["fallbacks"] <= counts["MoBiLE 0.99"]["fallbacks"]


def test_a_settled_family_is_asked_no_more_and_the_page_says_so(tmp_path):
    run = finish(tmp_path / "early", 90)
    results = read(run)
    by_round = {r.config["round"]: r.config for r in results.accuracy}
    assert by_round[1]["ended"] is None
    assert by_round[2]["ended"] == {"after": 1, "verdict": "yes"}
    assert by_round[2]["keys"] == []
    [one] = judged(results.accuracy)
    assert (one.items, one.look, one.verdict) == (2 * ITEMS, 1, "yes")
    [section] = [s for s in build(results).sections if s.heading == "Is the loss negligible?"]
    assert "12, ended after round 1" in section.tables[0].rows[0]


def test_a_round_without_all_its_records_settles_nothing(tmp_path):
    folder = tmp_path / "lost"
    run = finish(folder, 90)
    first = [cell for cell in read_preset(str(folder / "rounds.toml")).accuracy if cell.round == 1]
    last = next(cell for cell in read_preset(str(folder / "rounds.toml")).accuracy if cell.round == 2)
    assert last.settled(RunFolder(run)) == (1, "yes")
    first[0].output(RunFolder(run)).unlink()
    assert last.settled(RunFolder(run)) is None


def test_the_page_counts_what_the_records_hold(finished, records):
    [one] = judged(read(finished).accuracy)
    right = [record.config["right"] for record in records]
    pairs = [pair for each in right for pair in zip(each[FULL_K], each["MoBiLE 0.99"], strict=True)]
    found = one.difference("MoBiLE 0.99")
    assert (found.items, found.lost, found.gained) == (24, pairs.count(("1", "0")), pairs.count(("0", "1")))
    assert one.look == 2
    text = str(build(read(finished)).sections)
    assert f"{100 * (1 - error_of(1, 2)):.2f} %, {100 * (1 - error_of(2, 2)):.2f} %" in text


def test_a_gate_sees_one_answer_that_changed(finished, records, tmp_path):
    before = fingerprints(read(finished))
    path = finished / "records" / f"{records[0].id}.json"
    data = read_json(path)
    try:
        changed = json.loads(json.dumps(data))
        changed["config"]["right"][STATIC] = changed["config"]["right"][STATIC].translate(str.maketrans("01", "10"))
        write_json(path, changed)
        assert fingerprints(read(finished)) != before
        changed["config"]["right"][STATIC] += "1"
        write_json(path, changed)
        with pytest.raises(ValueError, match="must have 6 items"):
            load(path)
    finally:
        write_json(path, data)


@pytest.mark.parametrize("looks", [1, 2, 3, 5])
def test_the_errors_of_all_looks_add_up(looks):
    errors = [error_of(look, looks) for look in range(1, looks + 1)]
    assert sum(errors) == pytest.approx(ERROR)
    assert errors == sorted(errors)


def test_without_shared_substance_the_interval_is_bonett_and_prices():
    first, second = "1" * 50 + "0" * 50, "1" * 40 + "0" * 40 + "1" * 20
    found, known = difference(first, second, [str(n) for n in range(100)], ERROR), Paired(100, 10, 20).difference
    assert (found.value, found.low, found.high) == pytest.approx((known.value, known.low, known.high))


def test_items_that_share_their_substance_count_as_one():
    rng = np.random.default_rng(0)
    first = "".join(rng.choice(["0", "1"], 300))
    second = "".join(rng.choice(["0", "1"], 300))
    alone = difference(first, second, [str(n) for n in range(300)], ERROR)
    twice = difference(first * 2, second * 2, [str(n) for n in range(300)] * 2, ERROR)
    naive = difference(first * 2, second * 2, [str(n) for n in range(600)], ERROR)
    assert twice.high - twice.low == pytest.approx(alone.high - alone.low, rel=0.02)
    assert naive.high - naive.low == pytest.approx((alone.high - alone.low) / 2**0.5, rel=0.02)


def test_looking_twice_calls_a_loss_of_the_margin_negligible_in_at_most_one_of_forty_runs():
    rng, wrong, runs, half = np.random.default_rng(1), 0, 1500, 300
    for _ in range(runs):
        change = rng.choice([-1, 0, 1], 2 * half, p=[0.07, 0.87, 0.06])  # a true difference of exactly -1 point
        first = "".join("01"[int(each < 1)] for each in change)
        second = "".join("01"[int(each > -1)] for each in change)
        keys = [str(n) for n in range(2 * half)]
        wrong += any(
            difference(first[:seen], second[:seen], keys[:seen], error_of(look, 2)).within(1) == "yes"
            for look, seen in ((1, half), (2, 2 * half))
        )
    assert wrong / runs < 0.025 + 3 * (0.025 * 0.975 / runs) ** 0.5


def test_the_shipped_preset_asks_four_thousand_items_a_family_at_least():
    assert "accuracy" in presets()
    cells = read_preset("accuracy").accuracy
    for model in {cell.model.name for cell in cells}:
        first = [cell for cell in cells if cell.model.name == model and cell.round == 1]
        assert sum(cell.items for cell in first) >= 4000
        assert {cell.task for cell in first} == set(SHIPPED)
        assert first[0].gammas == (0.7, 0.9, 0.99)


def test_published_tasks_have_no_fresh_items(tmp_path):
    path = tmp_path / "public.toml"
    path.write_text(PRESET.format(margin=1).replace("web_of_lies", "gsm8k"))
    with pytest.raises(Refused, match="gsm8k"):
        read_preset(str(path))


def test_the_committed_page_is_what_its_records_give():
    kept = read(KEPT)
    assert not kept.absent
    assert (KEPT / "report.md").read_text(encoding="utf-8") == markdown(build(kept), figures=False)
    held = gate(kept, folder_of("accuracy"))
    assert (held.t0, held.t1) == ((), ())
    assert held.cells == len(read_preset("accuracy").cells)


def test_other_pages_cite_the_committed_verdict():
    report = build(report_runs.results(report_runs.Rule()))
    [cited] = [section for section in report.sections if section.heading == "The loss, with enough questions"]
    [own] = [section for section in build(read(KEPT)).sections if section.heading == "Is the loss negligible?"]
    assert cited.tables == own.tables
    assert "in the committed run of the preset accuracy" in report.first.verdict
    for other in (report_runs.Rule(weights="real"), report_runs.Rule(weights="synthetic")):  # of which it says nothing
        report = build(report_runs.results(other))
        assert "preset accuracy" not in report.first.verdict
        assert cited.heading not in [section.heading for section in report.sections]
