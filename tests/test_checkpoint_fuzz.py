"""A thousand checkpoints, each broken in one place: every one is read, or refused in one sentence."""

from __future__ import annotations

import json
import random
import shutil
import struct
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from test_checkpoints import INDEX
from test_foreign_checkpoints import SHIPPED, opened, refused
from transformers import AutoModelForCausalLM, OlmoeConfig

from mobile.checkpoints import examine, generation, weights
from mobile.checkpoints.headers import read_header

INPUTS = 1000  # of each kind, and of those that take Transformers 20 milliseconds
FEWER = 400
ABSURD: list[Any] = [
    *(None, True, 0, -1, 1, 2, 7, 10**6, 10**9, 10**30, 3.7, nan, inf, "", "many", "../../x", "[/x]", "x" * 5000),
    *([], {}, [1], [[[[]]]], {"a": {"b": {}}}, ["x"] * 999, "\ud800", "a\0b"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of several files."""
    tiny("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def packed(header: object, tensors: bytes) -> bytes:
    """A safetensors file of this header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def test_a_header_is_read_as_the_library_reads_it_or_refused(tmp_path):
    """Bytes, numbers and names are changed; the library must refuse what we do, and the other way round."""
    dice, path = random.Random(17), tmp_path / "x.safetensors"
    save_file({name: torch.arange(12.0).view(3, 4) for name in "abc"} | {"e": torch.zeros(0)}, path, {"format": "pt"})
    [length] = struct.unpack("<Q", path.read_bytes()[:8])
    whole = path.read_bytes()
    header, tensors = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    same = 0
    for _ in range(INPUTS):
        content, changed = bytearray(whole), json.loads(json.dumps(header))
        kind = dice.randrange(5)
        if kind == 0:  # a byte of the length or the header
            content[dice.randrange(8 + length)] = dice.randrange(256)
        elif kind == 1:  # the file's end
            content = content[: dice.randrange(len(content))] if dice.random() < 0.7 else content + b"x"
        elif kind == 2:  # the places
            places = [changed[name]["data_offsets"] for name in "abc"]
            dice.shuffle(places)
            for name, place in zip("abc", places, strict=True):
                changed[name]["data_offsets"] = place
            content = bytearray(packed(changed, tensors + b"x" * dice.randrange(2)))
        else:  # a field of a tensor, or a number in its shape or place
            field = dice.choice(["dtype", "shape", "data_offsets"])
            entry = changed[dice.choice("abce")]
            values = [*ABSURD, "F16", "F64", "F4", "I64", [12], [3, 4], [4, 3], [0, 48], [48, 96], [-1, 47]]
            if kind == 3 and field != "dtype":
                entry[field][dice.randrange(len(entry[field]))] = dice.choice(ABSURD)
            else:
                entry[field] = dice.choice(values)
            content = bytearray(packed(changed, tensors))
        path.write_bytes(content)
        try:
            with safe_open(path, framework="pt") as file:
                theirs = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            theirs = None
        ours: list[dict] = []
        sentence = refused(lambda ours=ours: ours.append(read_header(path)))
        assert (theirs is None) == (sentence != ""), bytes(content[:400])
        if theirs is not None:
            assert {key: list(tensor.shape) for key, tensor in ours[0].items()} == theirs
            same += 1
    assert 50 < same < INPUTS / 2


def test_an_index_is_read_or_refused(folder):
    dice, path = random.Random(18), folder / INDEX
    whole, source = json.loads(path.read_text()), examine.find(folder)
    names = [
        "../x",
        "/etc/x",
        "x/../..",
        "a\0b",
        "\ud800",
        "..",
        ".",
        "",
        "~/x",
        "a\nb",
        "sub/",
        "x" * 5000,
        "a/" * 999,
    ]
    read = 0
    for _ in range(INPUTS):
        changed = json.loads(json.dumps(whole))
        key, value = dice.choice([*whole["weight_map"]]), dice.choice(ABSURD)
        kind = dice.randrange(5)
        if kind == 0:
            changed[dice.choice(["weight_map", "metadata"])] = value
        elif kind == 1:
            changed["weight_map"][key] = value
        elif kind == 2:
            changed["weight_map"][key] = dice.choice(names) + ".safetensors"
        elif kind == 3:
            changed["metadata"]["dtype"] = value
        text = json.dumps(changed)
        path.write_text(text[: dice.randrange(len(text))] if kind == 4 else text)
        found: list[Any] = []
        sentence = refused(lambda found=found: found.append(weights.weights_of(source)))
        if not sentence:
            assert all((folder / file).resolve().parent == folder for file in found[0].files)
            refused(lambda found=found: weights.stored_dtype(source, found[0]))
            read += 1
    assert 50 < read < INPUTS / 2


def test_settings_of_generate_are_taken_or_refused(folder):
    dice, source = random.Random(19), examine.find(folder)
    config = examine.config_of(source)
    path = folder / "generation_config.json"
    groups = (generation.COUNTS, generation.FEW, generation.NUMBERS, generation.TOKENS, generation.CHOSEN_TOKENS)
    names = [name for group in groups for name in group] + ["stop_strings", "bad_words_ids", "sequence_bias"]
    taken = 0
    for _ in range(INPUTS):
        name, value = dice.choice(names), dice.choice(ABSURD)
        path.write_text(json.dumps({name: value}) if dice.random() < 0.9 else json.dumps(value))
        taken += not refused(lambda: generation.check_generation(source, config))
    assert 50 < taken < INPUTS / 2


def test_a_configuration_makes_a_model_or_is_refused(tmp_path, monkeypatch):
    """One setting is changed in each; what is accepted has as many weights as the file, and every expert in it."""
    dice = random.Random(20)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(OlmoeConfig(**sizes, **heads, eos_token_id=2)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    others = ["auto_map", "quantization_config", "rope_scaling", "layer_types", "torch_dtype", "transformers_weights"]
    others += ["text_config", "sub_configs", "attribute_map", "is_encoder_decoder", "num_labels", "id2label", "to_dict"]
    examined, layers = 0, []
    monkeypatch.setattr(examine, "MOST_MODULES", 2000)
    for _ in range(FEWER):
        name, value = dice.choice([*whole, *others]), dice.choice(ABSURD)
        path.write_text(json.dumps({**whole, name: value}))
        sentence = refused(lambda: layers.append(examine.examine(examine.find(tmp_path)).experts_nbytes))
        examined += not sentence
    assert 50 < examined < FEWER / 2
    assert max(layers) < 2 * (tmp_path / "model.safetensors").stat().st_size * 4


def test_a_tokenizer_reads_a_prompt_or_is_refused(tmp_path):
    dice = random.Random(21)
    shipped = Path(shutil.copytree(SHIPPED, tmp_path / "shipped"))
    files = {name: json.loads((shipped / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    files["tokenizer.json"]["model"] = {
        "type": "WordLevel",
        "vocab": {"a": 0, "b": 1, "?": 2, "c": 3},
        "unk_token": "?",
    }
    places = [*files["tokenizer_config.json"], "chat_template", "extra_special_tokens", "added_tokens_decoder"]
    read = 0
    for _ in range(FEWER):
        changed = json.loads(json.dumps(files))
        value = dice.choice(ABSURD)
        match dice.randrange(3):
            case 0:
                changed["tokenizer_config.json"][dice.choice(places)] = value
            case 1:
                changed["tokenizer.json"][dice.choice([*files["tokenizer.json"]])] = value
            case 2:
                changed["tokenizer.json"]["model"][dice.choice(["type", "vocab", "unk_token"])] = value
        for name, content in changed.items():
            (shipped / name).write_text(json.dumps(content))
        read += not refused(lambda: opened(shipped).encode([{"role": "user", "content": "a b"}]))
    assert 20 < read < FEWER
