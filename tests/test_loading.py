"""From files to an offloaded model: memory, speed of the path, formats, and what is refused before it is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt
from families import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, OlmoeConfig, Qwen3MoeConfig

import mobile
from mobile.checkpoints import loading


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny("qwen2_moe").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Transformers do all the reading, as for a format whose conversion we do not know."""
    monkeypatch.setattr(loading, "plan_readings", lambda *_: None)


@pytest.mark.parametrize("path", ["direct", "converted"])
def test_both_ways_of_reading_give_the_stock_weights(checkpoint, path, monkeypatch):
    assert len(list(checkpoint.glob("*.safetensors"))) > 5
    if path == "converted":
        converted(monkeypatch)
    loaded = mobile.load(checkpoint, "lru", slots=8, device="cpu")
    assert all(layer.experts.gate_up_proj.numel() == 0 for layer in loaded.mobile.layers)
    ours = mobile.detach(loaded).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def test_a_dtype_asked_for_is_what_experts_and_the_rest_get(checkpoint):
    loaded = mobile.load(checkpoint, "lru", slots=8, device="cpu", dtype=torch.bfloat16)
    assert loaded.mobile.store.layout.dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in mobile.detach(loaded).state_dict().items())


def test_generation_settings_come_with_the_checkpoint(checkpoint):
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 7]}))
    assert mobile.load(checkpoint, "lru", slots=8, device="cpu").generation_config.eos_token_id == [2, 7]


MEASURE = """
import sys, threading, time
import torch, mobile
from mobile.checkpoints import loading
folder, path = sys.argv[1:]
if path == "converted":
    loading.plan_readings = lambda *_: None
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)
before = anonymous()
watcher = threading.Thread(target=watch); watcher.start()
model = mobile.load(folder, "lru", slots=16, device="cpu", progress=False)
done.set(); watcher.join()
row = model.mobile.store.rows[0].nbytes
print(peak - before, model.mobile.store.nbytes, row)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("path", ["direct", "converted"])
def test_host_memory_peaks_at_the_checkpoint_and_one_layer(tmp_path, path):
    """Anonymous memory above what the process had before: 1.05 of the files, one layer, and the slots."""
    config = OlmoeConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        vocab_size=256,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert files > 400e6
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), path], capture_output=True, text=True, check=True
    )
    peak, store, layer = map(int, done.stdout.split())
    slots = 18 * layer / 32
    assert store > 0.95 * files
    assert peak < 1.05 * files + layer + slots, f"{peak / files:.3f} of the files' {files / 1e6:.0f} MB"


def test_an_mxfp4_checkpoint_is_dequantised_as_it_is_computed(tmp_path):
    """gpt-oss as published: 4-bit blocks and their scales, with the biases and everything else in bf16."""
    experts, hidden, width = 4, 64, 32
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=experts,
        num_experts_per_tok=2,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        eos_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            del weights[key]
            weights[f"{key}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            weights[f"{key}_scales"] = torch.randint(120, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(written))

    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation="eager")
    expected = greedy(stock, prompt())
    loaded = mobile.load(tmp_path, "mobile", slots=4, gamma=1.1, device="cpu")
    assert loaded.mobile.store.weights(0, "gate_up_proj").unpacked().float().std() > 0.01
    assert torch.equal(greedy(loaded, prompt())[1], expected[1])
    assert loaded.mobile.stats()["fallbacks"] > 0
    theirs = stock.state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in mobile.detach(loaded).state_dict().items())


def test_an_fp8_checkpoint_is_dequantised_as_it_is_computed(tmp_path):
    """Blocks of 128 by 128 with a scale each, as DeepSeek-V3 is published."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for key in [key for key in weights if key.endswith("_proj.weight")]:
        weight = weights[key].float()
        scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        weights[key] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{key}_scale_inv"] = scale.expand(weight.shape[0] // 128, weight.shape[1] // 128).contiguous()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True), experts_implementation="eager"
    )
    loaded = mobile.load(tmp_path, "mobile", slots=4, gamma=1.1, device="cpu")
    assert loaded.mobile.store.layout.weight_dtype == torch.bfloat16
    assert torch.equal(greedy(loaded, prompt())[1], greedy(stock, prompt())[1])


def test_another_quantisation_is_refused_by_name(checkpoint):
    written = json.loads((checkpoint / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (checkpoint / "config.json").write_text(json.dumps(written))
    with pytest.raises(mobile.Refused, match="quantised with awq"):
        mobile.load(checkpoint, "lru", slots=8)


def drop(checkpoint: Path, key: str) -> None:
    for file in checkpoint.glob("*.safetensors"):
        weights = load_file(file)
        if weights.pop(key, None) is not None:
            save_file(weights, file, {"format": "pt"})
            return
    raise AssertionError(f"no {key}")


@pytest.mark.parametrize("path", ["direct", "converted"])
@pytest.mark.parametrize(
    "key", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoint, key, path, monkeypatch):
    drop(checkpoint, key)
    if path == "converted":
        converted(monkeypatch)
    with pytest.raises(mobile.Refused):
        mobile.load(checkpoint, "lru", slots=8, device="cpu")


def test_a_budget_that_cannot_hold_it_is_refused_before_any_weight_is_read(checkpoint, monkeypatch):
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(loading, "read_directly", read)
    with pytest.raises(mobile.Refused, match="cannot hold"):
        mobile.load(checkpoint, "lru", memory="1GiB", device="cpu")


def test_host_memory_that_is_not_there_is_refused_before_any_weight_is_read(monkeypatch):
    with pytest.raises(mobile.Refused, match="GiB of host memory"):
        loading._check_host_memory(2**60)


def test_pickled_weights_are_not_read(checkpoint):
    for file in checkpoint.glob("model*"):
        file.unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(mobile.Refused, match="only complete safetensors checkpoints are read"):
        mobile.load(checkpoint, "lru", slots=8)


def test_code_in_a_checkpoint_runs_only_when_asked(checkpoint, tmp_path):
    """Its experts are stacked on disk: Transformers stacks none for a type of model it does not know."""
    for file in checkpoint.glob("*.safetensors*"):
        file.unlink()
    save_file(tiny("qwen2_moe").state_dict(), checkpoint / "model.safetensors", {"format": "pt"})
    written = json.loads((checkpoint / "config.json").read_text())
    written |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    (checkpoint / "config.json").write_text(json.dumps(written))
    (checkpoint / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM\n"
        "class MyConfig(Qwen2MoeConfig):\n    model_type = 'mine'\n"
        "class MyModel(Qwen2MoeForCausalLM):\n    config_class = MyConfig\n"
    )
    with pytest.raises(mobile.Refused, match="trust_remote_code"):
        mobile.load(checkpoint, "lru", slots=8, device="cpu")
    assert not (tmp_path / "ran").exists()
    model = mobile.load(checkpoint, "lru", slots=8, device="cpu", trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert greedy(model, prompt())[0].shape == (1, 19)


def test_a_hub_id_is_read_from_the_cache_without_a_network(checkpoint, tmp_path):
    home = tmp_path / "cache"
    stored = home / "hub/models--somebody--something"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs/main").write_text("0" * 40)
    shutil.copytree(checkpoint, stored / "snapshots" / ("0" * 40))
    code = (
        "import torch, mobile; model = mobile.load('somebody/something', 'lru', slots=8, device='cpu');"
        "print(model.generate(torch.tensor([[1, 5]]), max_new_tokens=2).shape)"
    )
    offline = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    offline.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1," in done.stdout


def test_the_bar_shows_bytes_and_speed_on_stderr_and_nothing_when_off(checkpoint, capfd):
    mobile.load(checkpoint, "lru", slots=8, device="cpu", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "kB" in err
    assert "/s" in err
    mobile.load(checkpoint, "lru", slots=8, device="cpu", progress=False)
    assert capfd.readouterr() == ("", "")
