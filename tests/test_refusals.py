"""Bad input gets one sentence that says what to change, and changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from transformers import LlamaConfig, LlamaForCausalLM

import mobile
from mobile.errors import Refused

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkpoint(tmp_path):
    tiny("olmoe").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "magic"}, "Unknown strategy 'magic'; choose one of: .*lru, mobile"),
        ({"slots": 3}, "3 slots cannot hold one token's 4 experts; give at least 4"),
        ({"memory": "1GiB"}, "cannot hold"),
        ({"memory": "plenty"}, "write it like 8GiB"),
        ({"memory": "8GiB", "slots": 8}, "not both"),
        ({"strategy": "lru", "gamma": 0.5}, "has no gamma"),
        ({"gamma": -1.0}, "negative"),
        ({"hardware": "abacus"}, "Unknown hardware"),
        ({"link": "string"}, "choose auto, cuda, disk, virtual or paced"),
        ({"geometry": "olmoe-1b-7b"}, "cannot stand for it"),
        ({"strategy": "resident", "slots": 10}, "too few"),
    ],
)
def test_bad_options_are_refused_and_leave_the_model_as_it_was(options, says):
    model = tiny("olmoe")
    before, attributes = {k: v.clone() for k, v in model.state_dict().items()}, set(vars(model))
    with pytest.raises(Refused, match=says) as refused:
        mobile.attach(model, **options)
    assert "\n" not in str(refused.value)
    assert set(vars(model)) == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(hasattr(module, "_mobile_binding") for module in model.modules())


def test_a_dense_model_is_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(Refused, match="nothing to offload"):
        mobile.attach(dense)


def test_attaching_twice_and_detaching_nothing_are_refused():
    model = mobile.attach(tiny("olmoe"), "lru", slots=8)
    with pytest.raises(Refused, match="already attached"):
        mobile.attach(model)
    mobile.detach(model)
    with pytest.raises(Refused, match="nothing to detach"):
        mobile.detach(model)


def test_a_checkpoint_loads_from_a_folder(checkpoint):
    model = mobile.load(checkpoint, "on-demand", slots=8)
    assert model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3).shape == (1, 6)
    assert model.mobile.stats()["tokens"] == 2


def test_missing_truncated_and_incomplete_checkpoints_are_refused(checkpoint, tmp_path):
    with pytest.raises(Refused, match="There is no folder"):
        mobile.load(tmp_path / "absent")
    with pytest.raises(Refused, match="Unknown strategy"):
        mobile.load(tmp_path / "absent", "magic")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Refused, match="damaged or cut short"):
        mobile.load(checkpoint)
    weights.unlink()
    with pytest.raises(Refused, match=r"lacks model\.safetensors"):
        mobile.load(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(Refused, match=r"no config\.json"):
        mobile.load(checkpoint)


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match="Cannot load nobody/nothing"):
        mobile.load("nobody/nothing")


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd or ROOT, capture_output=True, text=True)


def test_the_commands_refuse_in_one_line(tmp_path):
    for arguments, says in (
        (
            ("suites", "run", "--preset", "nonsense"),
            "Unknown preset 'nonsense'; choose one of: accuracy, cpu, disk, measured, paper, past",
        ),
        (("reports", "build", str(tmp_path)), "is not a run folder"),
        (("reports", "build", str(tmp_path / "absent")), "is not a run folder"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert says in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("budgets = [", 'budgets = ["heaps", '), "write it like 8GiB"),
        (("strategies = [", 'strategies = ["magic", '), "Unknown strategy 'magic'"),
        (("tasks = [", 'tasks = ["origami", '), "Unknown task 'origami'"),
        (("items = 32", "items = 0"), "items must be between"),
        (("hardware = [", 'hardware = ["abacus", '), "Unknown hardware"),
        (("items = 32", ""), "lacks 'items'"),
        (("items = 32", "items = 32\nfewer_items = { lfu = 1 }"), "'lfu', which is not among the strategies"),
        (("items = 32", "items = 32\nfewer_items = { lru = 0 }"), "asked at least one item"),
        (("items = 32", "items = "), "cannot be read"),
        (('"8GiB"]', '"8GiB", "2GiB"]'), "cannot hold olmoe-1b-7b"),
        (("seeds = [0]", "seeds = []"), "asks for no cell"),
        (("models/olmoe-tiny", "models/gone"), "SHA256SUMS is missing"),
    ],
)
def test_a_preset_that_asks_for_the_impossible_is_refused_before_any_work(tmp_path, change, says):
    text = (ROOT / "suites/presets/smoke.toml").read_text()
    assert change[0] in text
    (tmp_path / "mine.toml").write_text(text.replace(*change, 1))
    done = command("suites", "run", "--preset", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_differs_from_its_hashes_is_refused(tmp_path):
    shutil.copytree(ROOT / "suites/models/olmoe-tiny", tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps({}))
    text = (ROOT / "suites/presets/smoke.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("models/olmoe-tiny", str(tmp_path / "model")))
    done = command("suites", "plan", "--preset", str(tmp_path / "mine.toml"))
    assert done.returncode == 2
    assert "differs from SHA256SUMS" in done.stderr
