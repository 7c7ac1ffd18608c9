"""Signal cells: what is recorded of a token is what a stock model does with it, and the page says what beats what."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import report_runs
import torch
from test_two_pass import routers
from tiny_run import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobile.errors import Refused
from reports.data.results import read
from reports.pages.content import build
from reports.sections import signals as section
from reports.stats.caught import Tokens, caught, interval
from reports.tables import signals as tables
from suites.plan.preset import read_preset
from suites.record import RunFolder, load, read_json, write_json
from suites.tasks.files import shipped
from suites.tasks.fresh import training_side
from suites.tasks.item import held_out

SHIPPED = Path(__file__).parent.parent / "suites/models/olmoe-tiny"
PRESET = """
minutes = 1
tasks = ["object_counting"]
items = 2
seeds = [0]
hardware = ["rtx4080-pcie4"]
budgets = ["smallest"]
strategies = []
gammas = []
signals = ["margin", "coverage", "random"]
signal_items = 6

[[models]]
name = "olmoe-tiny"
path = "models/olmoe-tiny"
geometry = "olmoe-1b-7b"
weights = "shipped-tiny"
family = "olmoe"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    (folder / "signals.toml").write_text(PRESET)
    done = run(folder / "signals.toml", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 cells have records" in done.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def record(finished):
    return load(next((finished / "records").glob("*.json")))


@torch.no_grad()
def both_ways(doc: int, tokens: int) -> tuple[list[int], list[float]]:
    """Whether K/2 agrees with K on each of full K's tokens, and the little pass's doubt, on a stock model."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(SHIPPED)(shipped("object_counting")[doc]["prompt"], return_tensors="pt")
    full = model.config.num_experts_per_tok

    def step(last, cache, top_k):
        for router in routers(model):
            router.top_k = top_k
        return model(last, past_key_values=cache, use_cache=True)

    out, agrees, doubts = step(ids["input_ids"], None, full), [], []
    for _ in range(tokens):
        last = out.logits[:, -1].argmax(-1, keepdim=True)
        little = step(last, copy.deepcopy(out.past_key_values), full // 2).logits[0, -1]
        out = step(last, out.past_key_values, full)
        agrees.append(int(little.argmax() == out.logits[0, -1].argmax()))
        doubts.append(1 - float(little.softmax(-1).max()))
    return agrees, doubts


def test_every_token_is_what_a_stock_model_does_both_ways(record):
    config = record.config
    for number in (0, 3):
        agrees, doubts = both_ways(config["docs"][number], len(config["agree"][number]))
        assert len(agrees) > 10
        assert list(config["agree"][number]) == agrees
        assert config["doubts"]["probability"][number] == pytest.approx(doubts, abs=1e-3)


def test_each_signal_answers_by_itself_and_is_counted(record):
    assert [each["signal"] for each in record.config["live"]] == ["probability", "margin", "coverage", "random"]
    assert record.config["live"][0]["gamma"] == 0.7
    assert record.counters["disagreements"] == sum(item.count(0) for item in record.config["agree"])
    for each in record.config["live"]:
        assert each["fallbacks"] <= each["tokens"]
        assert record.counters[f"{each['signal']}_lost"] == each["lost"]


def test_the_page_of_such_a_run_has_the_chapter_and_no_other_page_has(finished):
    page = build(read(finished))
    assert "Better than the highest probability?" in [part.heading for part in page.sections]
    assert section.sections(report_runs.results(report_runs.Rule())) == []


def test_a_record_that_does_not_pair_up_is_refused(finished, record, tmp_path):
    data = read_json(RunFolder(finished).record(record.id))
    data["config"]["doubts"]["margin"][0].append(0.5)
    write_json(tmp_path / f"{record.id}.json", data)
    with pytest.raises(ValueError, match="every token"):
        load(tmp_path / f"{record.id}.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [(('"margin"', '"margn"'), "did you mean margin"), (('"object_counting"', '"gsm8k"'), "training side")],
)
def test_a_preset_is_refused_with_an_unknown_signal_or_a_task_without_a_training_side(tmp_path, change, says):
    (tmp_path / "signals.toml").write_text(PRESET.replace(*change))
    with pytest.raises(Refused, match=says):
        read_preset(str(tmp_path / "signals.toml"))


def test_a_preset_without_the_key_has_no_such_cell(tiny_preset):
    assert read_preset(str(tiny_preset)).signals == []


def test_fresh_items_are_none_of_the_test_items():
    tests = {item["prompt"] for item in shipped("web_of_lies")}
    fresh = training_side("web_of_lies", 300)
    assert not any(held_out(item.key) or item.prompt in tests for item in fresh)
    assert len({item.prompt for item in fresh}) == 300
    assert fresh[:20] == training_side("web_of_lies", 20)


# --- statistics ------------------------------------------------------------------------------------


def tokens(wrong: list[int], **doubts: list[float]) -> Tokens:
    """Tokens of as many items, one each."""
    made = {name: np.array(values) for name, values in doubts.items()}
    return Tokens(np.arange(len(wrong)), np.array(wrong, dtype=bool), made)


def test_the_curve_is_that_of_a_count_by_hand():
    seen = tokens([1, 0, 1, 0], sure=[0.9, 0.1, 0.8, 0.2], half=[0.9, 0.8, 0.2, 0.1], tied=[0.5, 0.5, 0.5, 0.5])
    draws = np.ones((1, 4), dtype=int)
    rate = [np.array([0.5])]
    found = {name: caught(seen, doubt, rate, draws) for name, doubt in seen.doubts.items()}
    assert [float(each.at[0][0]) for each in found.values()] == [1.0, 0.5, 0.5]
    assert [float(each.area[0]) for each in found.values()] == pytest.approx([0.75, 0.625, 0.5])


def test_a_better_signal_is_found_and_one_that_is_the_same_is_not():
    rng = np.random.default_rng(1)
    wrong = (rng.random(2000) < 0.1).astype(int).tolist()
    noise = rng.random(2000)
    weak = [0.2 * w + 0.33 * n for w, n in zip(wrong, noise, strict=True)]
    strong = [0.8 * w + 0.2 * n for w, n in zip(wrong, noise, strict=True)]
    per_item = [list(range(begin, begin + 20)) for begin in range(0, 2000, 20)]

    def pick(values: list) -> list:
        return [[values[at] for at in item] for item in per_item]

    live = [{"signal": "probability", "gamma": 0.7, "tokens": 10, "fallbacks": 1, "lost": 1, "gained": 0}]
    made = report_runs.records(report_runs.Rule())[0]
    config = {
        **made.config,
        "kind": "signals",
        "docs": list(range(100)),
        "agree": pick([1 - w for w in wrong]),
        "doubts": {"probability": pick(weak), "oracle": pick(strong), "same": pick(weak), "noise": pick(list(noise))},
        "live": live,
    }
    rows = tables.rows([replace(made, config=config)])
    assert {row.signal: row.verdict for row in rows} == {
        "probability": "the paper's",
        "oracle": "better",
        "same": "no difference shown",
        "noise": "worse",
    }
    assert "Better than the highest probability on all of 1 family: oracle." in section.in_words(rows)
    assert "Nothing beats" in section.in_words([row for row in rows if row.signal != "oracle"])
    assert tables.alone_table([replace(made, config=config)]).rows[0][:5] == (
        "olmoe",
        "probability",
        "10.0 %",
        "1",
        "0",
    )


def test_the_interval_holds_the_value_and_narrows_with_items():
    rng = np.random.default_rng(2)
    widths = []
    for count in (200, 2000):
        wrong = rng.random(count) < 0.2
        seen = tokens(wrong.tolist(), one=(0.5 * wrong + rng.random(count)).tolist())
        shown = interval(caught(seen, seen.doubts["one"], [], seen.draws).area)
        assert shown.low < shown.value < shown.high
        widths.append(shown.high - shown.low)
    assert widths[1] < widths[0]


def test_tune_items_are_written_for_mobile_tune(tmp_path):
    from mobile.tuning.items import read_items
    from suites.tasks.__main__ import write_fresh

    write_fresh("arithmetic", 5, 1, tmp_path / "a.jsonl")
    assert all(item.answer and json.loads(item.answer) is not None for item in read_items(tmp_path / "a.jsonl").items)
    write_fresh("python_functions", 5, 1, tmp_path / "p.jsonl")
    assert [item.answer for item in read_items(tmp_path / "p.jsonl").items] == [None] * 5
