"""The preset `paper`, everything but the weights: real checkpoints stood in for by the shipped model, and the live
timing path over links that need no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobile.costs.geometry import GEOMETRIES
from mobile.errors import Refused
from suites.identity import HERE
from suites.measure import live as live_cells
from suites.plan import preflight
from suites.plan.preset import read_preset
from suites.record import RunFolder, load

ROOT = Path(__file__).parent.parent
SHIPPED = HERE / "models/olmoe-tiny"
PAPER = (HERE / "presets/paper.toml").read_text()
COMPARED = ["lru", "static-half", "mobile"]
DATA = Path(os.environ.get("MOBILE_TASK_DATA", "/nowhere"))


def suites(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "suites", *arguments], cwd=ROOT, capture_output=True, text=True)


def small(link: str, tasks: list[str], models: int = 1, **other: object) -> str:
    """The preset with other tasks, few items, and a link that needs no GPU."""
    head, *rest = PAPER.split("[[models]]")
    said = {"tasks": tasks, "items": 3, "link": link, **other}
    kept = [line for line in head.splitlines() if line.split(" = ")[0] not in said]
    lines = [*kept, *(f"{name} = {json.dumps(value)}" for name, value in said.items())]
    return "\n".join([*lines, *("[[models]]" + model for model in rest[:models])])


@pytest.fixture
def preset(tmp_path: Path):
    def write(*arguments: object, **named: object) -> str:
        path = tmp_path / "paper-small.toml"
        path.write_text(small(*arguments, **named))
        return str(path)

    return write


# --- the plan, before anything is fetched ----------------------------------------------------------------


def test_the_plan_says_what_it_takes():
    done = suites("plan", "--preset", "paper")
    assert done.returncode == 0, done.stderr
    for name, geometry in GEOMETRIES.items():
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
        store = geometry.total_experts * geometry.expert_nbytes
        assert f"download {(store + geometry.resident_nbytes) / 1e9:.0f} GB" in line
        assert f"host memory {store / 2**30:.0f} GiB" in line
        assert "GPU memory 16.0 GiB" in line
        assert "hours" in line
    assert "an estimate: 150 tokens an answer" in done.stdout


def test_the_estimate_is_what_the_arithmetic_of_the_page_gives():
    """OLMoE at 25 GB/s: 12.9 GB stream in half a second, then 15.5 tokens a second."""
    cell = read_preset("paper").live[0]
    assert cell.generation.model.name == "olmoe-1b-7b"
    assert preflight.seconds_an_answer(GEOMETRIES["olmoe-1b-7b"], cell) == pytest.approx(
        12.885 / 25 + 150 / 15.5, rel=2e-3
    )


def test_the_models_are_the_papers_families_by_hub_id():
    hubs = {cell.generation.model.hub for cell in read_preset("paper").cells}
    assert hubs == {
        "allenai/OLMoE-1B-7B-0924",
        "Qwen/Qwen1.5-MoE-A2.7B",
        "deepseek-ai/DeepSeek-V2-Lite",
        "Qwen/Qwen3-30B-A3B",
    }
    tasks = {cell.generation.task for cell in read_preset("paper").cells}
    assert len(tasks) == 1 + 1 + 27


# --- refusals ------------------------------------------------------------------------------------------


def test_generated_code_runs_only_where_it_was_allowed():
    done = suites("run", "--preset", "paper")
    assert done.returncode == 2
    assert "pass --run-generated-code to allow it" in done.stderr


def test_a_models_own_functions_are_judged_unasked_only_where_the_model_is_ours(preset):
    ours = read_preset(preset("virtual", ["python_functions"]), folders={"olmoe-1b-7b": SHIPPED})
    preflight.check(ours, run_generated_code=False)
    with pytest.raises(Refused, match="Task python_functions runs code that olmoe-1b-7b wrote"):
        preflight.check(read_preset(preset("virtual", ["python_functions"])), run_generated_code=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_before_anything_is_fetched():
    done = suites("run", "--preset", "paper", "--run-generated-code")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Preset paper is timed on an NVIDIA GPU and torch finds none here")


def test_too_small_a_machine_is_refused(monkeypatch):
    preset = read_preset("paper")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    with pytest.raises(Refused, match=r"is to be given 2.0 GiB of GPU memory at least and this GPU has 1.0 GiB"):
        preflight.check(preset, run_generated_code=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16_700_000_000, 16_700_000_000))
    few = type("Host", (), {"usable_nbytes": 20 << 30})
    monkeypatch.setattr(preflight, "host", few)
    with pytest.raises(Refused, match=r"qwen3-30b-a3b take 54 GiB of host memory and 20 GiB are free"):
        preflight.check(preset, run_generated_code=True)
    monkeypatch.setattr(few, "usable_nbytes", 128 << 30)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 100 * 10**9}))
    with pytest.raises(Refused, match=r"The weights take 135 GB and 100 GB are free"):
        preflight.check(preset, run_generated_code=True)


def test_a_card_that_is_too_small_for_some_cells_leaves_out_only_those(monkeypatch):
    preset = read_preset("paper")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight, "host", type("Host", (), {"usable_nbytes": 128 << 30}))
    monkeypatch.setattr(preflight, "cached_whole", lambda *_: True)
    monkeypatch.setattr(preflight.HfApi, "dataset_info", lambda *_, **__: None)
    few = preset.only("olmoe-1b-7b")
    for gib, left_out in ((7.63, True), (11.63, True), (15.7, False), (23.5, False)):
        total = int(gib * 2**30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda total=total: (total, total))
        told = preflight.check(few, run_generated_code=True)
        left = f"This GPU shows {gib:.2f} GiB: cells of olmoe-1b-7b 16GiB are left out, and only they."
        assert told == ([left] if left_out else [])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 8 << 30))
    large = next(cell for cell in preset.live if cell.budget == "16GiB")
    monkeypatch.setattr(
        live_cells, "checkpoint", lambda model: pytest.fail("it was looked for, and perhaps downloaded")
    )
    with pytest.raises(Refused, match=r"A budget of 16GiB is more than the 8\.00 GiB of this GPU"):
        live_cells.load([large], RunFolder(Path()))


def test_an_absent_hub_is_refused_with_what_to_give_instead(preset, monkeypatch):
    def down(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(preflight.HfApi, "model_info", down)
    monkeypatch.setattr(preflight.HfApi, "dataset_info", down)
    with pytest.raises(Refused, match=r"cannot be reached \(ConnectionError\); give --model olmoe-1b-7b=FOLDER"):
        preflight.check(read_preset(preset("virtual", ["gsm8k"])), run_generated_code=False)
    local = read_preset(preset("virtual", ["gsm8k"]), folders={"olmoe-1b-7b": SHIPPED})
    with pytest.raises(
        Refused, match=r"give --data-dir FOLDER with gsm8k/test.jsonl, gsm8k/train.jsonl or gsm8k/train_"
    ):
        preflight.check(local, run_generated_code=False)


def test_a_model_that_is_not_the_real_one_is_never_called_real(preset, tmp_path):
    named = read_preset(preset("virtual", ["object_counting"]), folders={"olmoe-1b-7b": SHIPPED})
    assert {cell.generation.model.weights for cell in named.cells} == {"shipped-tiny"}
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).symlink_to(SHIPPED / name)
    path = preset("virtual", ["object_counting"], strategies=["on-demand"], budgets=["smallest"])
    done = suites("run", "--preset", path, "--out", str(tmp_path / "run"), "--model", f"olmoe-1b-7b={copy}")
    assert done.returncode == 1
    assert "and olmoe-1b-7b has (16, 64, 8); give the real checkpoint" in " ".join(done.stdout.split())


@pytest.mark.parametrize("given", ["olmoe", "=", "olmoe-1b-7b=/nowhere"])
def test_a_model_folder_is_checked(given):
    done = suites("plan", "--preset", "paper", "--model", given)
    assert done.returncode == 2
    assert "write NAME=FOLDER" in done.stderr


def test_a_stranger_to_the_preset_is_refused():
    done = suites("plan", "--preset", "paper", "--model", f"mixtral={SHIPPED}")
    assert done.returncode == 2
    assert "The preset has no model mixtral; it has: olmoe-1b-7b" in done.stderr


# --- timed live ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> list:
    """The preset over the virtual link, on a shipped task, with the shipped model for OLMoE."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "p.toml").write_text(small("virtual", ["object_counting"], strategies=COMPARED, budgets=["8GiB"]))
    done = suites(
        "run", "--preset", str(folder / "p.toml"), "--out", str(folder / "run"), "--model", f"olmoe-1b-7b={SHIPPED}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted((load(path) for path in (folder / "run/records").iterdir()), key=lambda r: (r.strategy, r.budget))


@pytest.fixture(scope="module")
def replayed(tmp_path_factory) -> list:
    """The same cells, by replay."""
    folder = tmp_path_factory.mktemp("replayed")
    text = small("virtual", ["object_counting"], strategies=COMPARED, budgets=["8GiB"])
    (folder / "p.toml").write_text("\n".join(line for line in text.splitlines() if not line.startswith("link")))
    done = suites(
        "run", "--preset", str(folder / "p.toml"), "--out", str(folder / "run"), "--model", f"olmoe-1b-7b={SHIPPED}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted((load(path) for path in (folder / "run/records").iterdir()), key=lambda r: (r.strategy, r.budget))


def test_timed_live_is_what_a_replay_gives(live, replayed):
    """Every item: text, score, spans that fell back, counters, and times to the nanosecond."""
    assert [(r.strategy, r.budget) for r in live] == [(r.strategy, r.budget) for r in replayed]
    assert len(live) == len(COMPARED)
    for one, other in zip(live, replayed, strict=True):
        assert one.items == other.items
        assert one.counters == other.counters
        assert one.guesses == other.guesses
        assert (one.slots, one.geometry, one.ceiling_tokens_per_s) == (
            other.slots,
            other.geometry,
            other.ceiling_tokens_per_s,
        )


def test_live_records_say_what_they_are(live):
    for record in live:
        assert (record.scope, record.weights) == ("cpu+virtual", "shipped-tiny")
        assert record.config["link"] == "virtual"
        assert record.config["batch_of_generation"] == 1
        assert record.config["data"]["test"].startswith("object_counting.jsonl sha256:")
    fell = [item for record in live if record.strategy == "mobile" for item in record.items if item.fallbacks]
    assert fell
    assert all(item.fallback_spans for item in fell)


def test_the_paced_link_takes_real_time(preset, tmp_path):
    path = preset("paced", ["object_counting"], strategies=["on-demand"], budgets=["smallest"], items=1)
    done = suites("run", "--preset", path, "--out", str(tmp_path / "run"), "--model", f"olmoe-1b-7b={SHIPPED}")
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = [load(path) for path in (tmp_path / "run/records").iterdir()]
    [item] = record.items
    assert record.scope == "cpu+paced"
    assert item.decode_tokens > 5
    assert item.decode_bytes == item.decode_tokens * 4 * 8 * record.config["expert_nbytes"]
    least = item.decode_tokens * 4 * 8 * record.config["expert_nbytes"] / 25e9
    assert least < item.decode_ns / 1e9 < record.wall_seconds
    assert 0 < item.ttft_ns / 1e9 < record.wall_seconds
    assert record.config["timing"].startswith("live")
    assert record.config["warmup"]["tokens"] > 5
    assert 0 < record.config["warmup"]["ns"] / 1e9 < record.wall_seconds
    assert (record.config["task_items"], record.config["link_measured_gb_per_s"]) == (250, None)
    assert record.counters["decode_dense_seconds"] is record.counters["decode_expert_seconds"] is None


@pytest.mark.skipif(not (DATA / "gsm8k/test.jsonl").is_file(), reason="MOBILE_TASK_DATA names no folder with the tasks")
def test_the_papers_tasks_end_to_end_on_real_items(preset, tmp_path):
    """The shipped model knows none of it and scores next to nothing; every number of the way is there all the same."""
    path = preset("virtual", ["gsm8k", "humaneval"], strategies=["on-demand", "mobile"], budgets=["smallest"], items=2)
    out = tmp_path / "run"
    arguments = ["--preset", path, "--out", str(out), "--data-dir", str(DATA), "--model", f"olmoe-1b-7b={SHIPPED}"]
    assert "gsm8k: shots are drawn from" in suites("plan", *arguments).stdout or (DATA / "gsm8k/train.jsonl").is_file()
    done = suites("run", *arguments, "--run-generated-code")
    assert done.returncode == 0, done.stdout + done.stderr
    records = [load(path) for path in (out / "records").iterdir()]
    assert {(r.task, r.strategy) for r in records} == {
        (task, strategy) for task in ("gsm8k", "humaneval") for strategy in ("on-demand", "mobile")
    }
    for record in records:
        assert len(record.items) == 2
        assert all(item.prompt is None and item.decode_tokens > 0 and item.decode_ns > 0 for item in record.items)
        assert "sha256:" in record.config["data"]["test"]
    judged = [item.answer for record in records if record.task == "humaneval" for item in record.items]
    assert all(answer == "passed" or ": " in answer for answer in judged)
