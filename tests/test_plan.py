"""`mobile plan` and `suites plan` say first whether it runs here, and refuse what a load refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_refusals import command

import mobile
from mobile.checkpoints.source import cached_whole
from mobile.cli import main
from mobile.costs.hardware import profile, write_profile
from suites.plan import preflight
from suites.plan.preset import read_preset

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "suites/models/olmoe-tiny"
EXPERTS = 12 * 2**30  # of olmoe-1b-7b: 16 layers of 64 experts of 3 x 2,048 x 1,024 weights in bf16


@pytest.fixture
def plan(capsys):
    """Run `mobile plan` here: its code, its lines on stdout, and stderr."""

    def run(*argv: object) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = main(["plan", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("given", "runs"), [(EXPERTS, True), (EXPERTS - 1, False), ("13GB", True), ("1MiB", False)])
def test_the_first_line_says_whether_the_host_can_hold_the_experts(plan, given, runs):
    code, out, err = plan("olmoe-1b-7b", "--host-memory", given)
    assert (code, err) == (0 if runs else 1, "")
    if runs:
        assert out[0] == "runs: olmoe-1b-7b on rtx4080-pcie4 with 16.00 GiB"
    else:
        assert out[0].startswith(
            "does not run here: olmoe-1b-7b on rtx4080-pcie4 with 16.00 GiB, because the experts take 12.0 GiB of host "
            "memory and "
        )
    assert any(line.startswith("Host memory: ") for line in out)
    code, out, _ = plan("olmoe-1b-7b", "--host-memory", given, "--json")
    made = json.loads("\n".join(out))
    assert code == (0 if runs else 1)
    assert (made["runs"], made["fits"], made["host_fits"], made["because"] is None) == (runs, True, runs, runs)


def test_brackets_in_the_sources_of_a_profile_are_printed_as_they_are(plan, tmp_path):
    card = replace(profile("auto"), name="card [red]", sources=("datasheet [1], table [/2]",))
    write_profile(card, tmp_path / "card.json")
    _, out, _ = plan("olmoe-1b-7b", "--hardware", tmp_path / "card.json")
    assert "card [red]: datasheet [1], table [/2]" in out
    assert " on card [red] with " in out[0]


def test_without_a_word_the_host_is_this_one(plan, monkeypatch):
    class Small:
        usable_nbytes = EXPERTS - 1

    monkeypatch.setattr("mobile.cli.plan.host", Small)
    assert plan("olmoe-1b-7b")[0] == 1
    monkeypatch.setattr(Small, "usable_nbytes", None)  # not Linux
    assert plan("olmoe-1b-7b")[0] == 0


def test_a_budget_that_is_too_small_is_the_first_line_and_refused(plan):
    code, out, err = plan("olmoe-1b-7b", "--memory", "1GiB")
    assert code == 2
    assert len(out) == 1
    assert out[0].startswith("does not run here: olmoe-1b-7b, because: A budget of 1,024 MiB cannot hold olmoe-1b-7b")
    assert err.startswith("error: A budget of 1,024 MiB cannot hold")
    code, out, _ = plan("olmoe-1b-7b", "--memory", "1GiB", "--json")
    said = json.loads("\n".join(out))
    assert (code, said["runs"], said["fits"]) == (2, False, False)
    assert said["because"] == said["reason"]


def test_a_size_that_is_none_is_refused(plan):
    code, out, err = plan("olmoe-1b-7b", "--host-memory", "plenty")
    assert (code, out) == (2, [])
    assert "write it like 8GiB" in err


CHANGES: dict[str, Callable[[Path], object]] = {
    "no weights but others": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "a damaged file": lambda f: (f / "model.safetensors").write_bytes(b"short"),
    "an index of nothing": lambda f: [
        (f / "model.safetensors").unlink(),
        (f / "model.safetensors.index.json").write_text("{}"),
    ],
    "an adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
    "a broken configuration": lambda f: (f / "config.json").write_text("{"),
    "no experts": lambda f: (f / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2})
    ),
    "another quantisation": lambda f: (f / "config.json").write_text(
        json.dumps({**json.loads((f / "config.json").read_text()), "quantization_config": {"quant_method": "gptq"}})
    ),
    "weights that are named and absent": lambda f: (f / "config.json").write_text(
        json.dumps({**json.loads((f / "config.json").read_text()), "transformers_weights": "x.safetensors"})
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_load_refuses_a_plan_refuses_in_the_same_words(plan, folder, change):
    change(folder)
    with pytest.raises(mobile.Refused) as refused:
        mobile.load(folder, "lru", slots=8, device="cpu", progress=False)
    code, out, err = plan(folder)
    assert code == 2
    assert err == f"error: {refused.value}\n"
    assert not out or out == [f"does not run here: {folder}, because: {refused.value}"]


def test_a_configuration_alone_can_be_planned_for(plan, tmp_path):
    shutil.copy(MODEL / "config.json", tmp_path)
    assert plan(tmp_path)[0] == 0


def test_on_a_cpu_the_model_and_its_slots_need_host_memory_as_well(monkeypatch):
    """A card has its own; here the store, the dense weights and the slots lie side by side."""
    from mobile.checkpoints import examine, loading
    from mobile.live_model import compat

    known = examine.examine(examine.find(MODEL))
    own = compat.geometry_of(known.empty, known.layers, known.layout)
    needed = known.experts_nbytes + own.resident_nbytes + (8 + loading.PREFILL_BUFFERS) * known.layout.nbytes

    class Small:
        usable_nbytes = needed - 1

    monkeypatch.setattr(loading, "host", Small)
    with pytest.raises(mobile.Refused, match="GiB of host memory"):
        mobile.load(MODEL, "lru", slots=8, device="cpu", progress=False)
    monkeypatch.setattr(Small, "usable_nbytes", needed)
    mobile.load(MODEL, "lru", slots=8, device="cpu", progress=False)


# --- suites plan ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("preset", ["paper", "shapes"])
def test_a_plan_of_a_preset_that_needs_a_gpu_says_so_first_and_exits_with_0(preset, tmp_path):
    done = command("suites", "plan", "--preset", preset, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith(f"does not run here: {preset}, because: Preset {preset} is timed on an NVIDIA GPU")
    assert second.startswith(f"{preset}: ")


def test_a_plan_of_a_preset_says_that_it_runs_and_what_it_has_to_be_allowed(monkeypatch):
    assert preflight.answer(read_preset("smoke")) == "runs: smoke"
    paper = read_preset("paper")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16_700_000_000, 16_700_000_000))
    monkeypatch.setattr(preflight, "host", type("Host", (), {"usable_nbytes": 128 << 30}))
    monkeypatch.setattr(preflight, "cached_whole", lambda *_: True)
    monkeypatch.setattr(preflight.HfApi, "dataset_info", lambda *_, **__: None)
    assert preflight.answer(paper) == "runs: paper, with --run-generated-code"


def test_weights_are_in_the_cache_when_all_their_files_are(tmp_path, monkeypatch):
    """A configuration alone, which comes first, is not the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--a--b"
    snapshot = stored / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert not cached_whole("a/b", None)
    places = {"x": "model-1.safetensors", "y": "model-2.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (snapshot / "model-1.safetensors").touch()
    assert not cached_whole("a/b", None)
    (snapshot / "model-2.safetensors").touch()
    assert cached_whole("a/b", None)
    assert not cached_whole("a/b", "v2")
    (snapshot / "model.safetensors.index.json").write_text("{}")
    assert not cached_whole("a/b", None)
    (snapshot / "model.safetensors").touch()
    assert cached_whole("a/b", None)
