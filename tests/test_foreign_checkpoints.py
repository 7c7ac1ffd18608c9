"""A checkpoint of a stranger's is loaded, or refused in one sentence: no traceback, no hang, no memory, no crash."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import tiny
from test_checkpoints import INDEX, change_weights, edit, first_file, load

import mobile
from mobile.checkpoints import examine, reading
from mobile.cli import main
from mobile.cli.terminal import reader as readers
from mobile.cli.terminal.template_limit import MOST_CHARACTERS, bounded

SHIPPED = Path(mobile.__file__).parent.parent / "suites/models/olmoe-tiny"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of several files, with a tokenizer."""
    tiny("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


@pytest.fixture
def shipped(tmp_path) -> Path:
    """A checkpoint of one file, with a tokenizer."""
    shutil.copytree(SHIPPED, tmp_path / "shipped")
    return tmp_path / "shipped"


def refused(call: Callable[[], object]) -> str:
    """The sentence with which a call is refused, or nothing where it is not."""
    sentence = ""
    try:
        call()
    except mobile.Refused as error:
        sentence = str(error)
        sentence.encode()
    assert "\n" not in sentence
    assert len(sentence) < 1500
    return sentence


# --- the configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1,000,000,000, which no model has"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is .*, which no model has"),
        ({"num_hidden_layers": 9999}, r"has 9,999 layers, and its files hold \d+ weights"),
        ({"vision_config": {"depth": 10**9}}, "depth is .*, which no model has"),
        ({"num_labels": 10**9}, "num_labels is .*, which no model has"),
        ({"num_local_experts": 10**9}, r"makes a model of [\d,]+ numbers, and its files hold [\d,]+ bytes"),
        ({"moe_intermediate_size": 10**6}, r"makes a model of [\d,]+ numbers"),
        ({"vocab_size": 10**9}, r"makes a model of [\d,]+ numbers"),
        ({"hidden_size": 0}, "weights of size 0"),
        ({"moe_intermediate_size": 0}, "weights of size 0"),
        ({"num_experts_per_tok": 0}, "of which a token runs 0"),
        ({"num_experts_per_tok": -1}, "of which a token runs -1"),
        ({"num_experts_per_tok": 9}, "has 8 experts in .*, of which a token runs 9"),
        ({"hidden_act": "x" * 5000}, r"makes no model: .* \.\.\. x+"),
        ({"is_encoder_decoder": True}, "has is_encoder_decoder, and its model has no encoder"),
        ({"sub_configs": 1}, "sets sub_configs, which is no setting but a part of Transformers"),
        ({"get_text_config": 1}, "sets get_text_config, which is no setting"),
        ({"__class__": "x"}, "sets __class__, which is no setting"),
        ({"quantization_config": {"quant_method": ["fp8"]}}, "is quantised with .*, which cannot be offloaded"),
        ({"transformers_weights": "x" * 5000 + ".safetensors"}, r"lacks x+ \.\.\. x"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_absurd_configuration_is_one_sentence_before_memory_is_taken(folder, changes, says, monkeypatch):
    """`num_experts` of 10**9 was allocated before it was checked, and `num_hidden_layers` ran on."""
    from mobile.checkpoints import loading

    monkeypatch.setattr(loading, "HostStore", None)  # nothing comes so far
    edit(folder / "config.json", **changes)
    with pytest.raises(mobile.Refused, match=says):
        load(folder)
    assert main(["plan", str(folder), "--memory", "3GiB"]) == 2


def test_a_configuration_without_weights_is_bounded_by_the_modules_of_its_model(tmp_path, monkeypatch):
    tiny("qwen3_moe").config.save_pretrained(tmp_path)
    assert examine.skeleton(tmp_path) is not None
    monkeypatch.setattr(examine, "MOST_MODULES", 30)
    with pytest.raises(mobile.Refused, match=r"makes no model: it has more than 30 modules"):
        examine.skeleton(tmp_path)
    torch.nn.Sequential(*[torch.nn.Identity() for _ in range(50)])  # the bound ends with the model


def test_a_file_that_is_no_file_is_passed_over_or_refused(folder):
    """Reading from a named pipe would wait for ever, and from a device would never end."""
    for name in ("config.json", INDEX, first_file(folder).name, "generation_config.json"):
        original = (folder / name).read_bytes()
        for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda p: p.symlink_to(p.name)):
            (folder / name).unlink()
            make(folder / name)
            assert bool(refused(lambda: load(folder))) is (name != "generation_config.json"), name
            os.rmdir(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
            (folder / name).write_bytes(original)
    assert load(folder).mobile.slots == 8


def test_a_folder_that_may_not_be_listed_is_one_sentence(folder, monkeypatch):
    def denied(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(mobile.Refused, match=r"cannot be read \(Permission denied\)"):
        examine.skeleton(folder)


def test_links_are_followed_as_in_the_hubs_cache(folder):
    blobs = folder.parent / "blobs"
    folder.rename(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("..") / "blobs" / path.name)
    assert load(folder).mobile.slots == 8


def test_a_file_of_settings_has_a_largest_size(folder):
    with (folder / "config.json").open("ab") as file:
        file.truncate(2**33)  # a hole on most disks
    with pytest.raises(mobile.Refused, match=r"has 8,589,934,592 bytes, and such a file has [\d,]+ at most"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        (
            "embed_tokens",
            lambda weight: weight.T.contiguous(),
            r"embed_tokens.weight of shape \(32, 64\), and its .*64, 32",
        ),
        ("embed_tokens", lambda weight: weight.to(torch.int8), "embed_tokens.weight in torch.int8 and nothing to deq"),
        ("q_norm", lambda weight: weight[:1].clone(), r"q_norm.weight of shape \(1,\), and its configuration \(8,\)"),
        ("down_proj", lambda weight: weight[:1].clone(), r"down_proj of shape \(8, 1, 16\), and its .*\(8, 32, 16\)"),
        ("down_proj", lambda weight: weight.to(torch.float8_e4m3fn), "down_proj in torch.float8_e4m3fn and nothing"),
    ],
)
def test_a_quantised_checkpoint_has_the_weights_of_its_configuration(folder, key, change, says):
    """Transformers checks them in other checkpoints only; a copy of one of size 1 would be repeated in silence."""
    pytest.importorskip("accelerate")
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert load(folder).mobile.slots == 8
    change_weights(folder, lambda name, weight: change(weight) if key in name else weight)
    with pytest.raises(mobile.Refused, match=says):
        load(folder)


def test_a_part_of_a_configuration_that_transformers_has_no_names_for_is_one_sentence(tmp_path):
    families.tiny("qwen3_vl_moe").save_pretrained(tmp_path)
    assert load(tmp_path).mobile.slots == 8
    whole = json.loads((tmp_path / "config.json").read_text())
    whole["vision_config"]["model_type"] = ["x"]
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(mobile.Refused, match=r"is not sound: .*'list'"):
        load(tmp_path)


# --- files that are cut -----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["experts", "others"])
def test_a_file_that_is_cut_while_it_is_read_is_one_sentence(folder, which, monkeypatch):
    """A map of such a file ends the process."""
    name = "read_directly" if which == "experts" else "_keep_experts_out"
    original, files = getattr(reading, name), sorted(folder.glob("*.safetensors"))

    def cut_first(*arguments: Any) -> Any:
        for file in files:
            os.truncate(file, 100)
        return original(*arguments)

    from mobile.checkpoints import loading

    monkeypatch.setattr(loading if which == "experts" else reading, name, cut_first)
    with pytest.raises(mobile.Refused, match="was cut short while it was read; copy it again"):
        load(folder)


# --- the settings of generate() -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 10**6),
        ("num_return_sequences", [1]),
        ("eos_token_id", [2, "x"]),
        ("pad_token_id", 10**30),
        ("max_new_tokens", "many"),
        ("temperature", nan),
        ("suppress_tokens", 64),  # of a vocabulary of 64
        ("bad_words_ids", []),
        ("sequence_bias", {"a": 1}),
        ("stop_strings", 5),
        ("output_hidden_states", [[]]),
        ("assistant_early_exit", 10**9),
    ],
)
def test_a_setting_of_generate_that_is_none_is_refused_before_weights_are_read(folder, name, value):
    edit(folder / "generation_config.json", **{name: value})
    with pytest.raises(mobile.Refused, match=rf"generation_config.json says that {name} is .*; mend it there\.$"):
        load(folder)


def test_settings_of_generate_that_are_some_are_kept(folder):
    settings = {"eos_token_id": [2, 3], "num_beams": 2, "temperature": 1, "bad_words_ids": [[5]], "stop_strings": "x"}
    settings |= {"sequence_bias": [[[4], -1.5]], "suppress_tokens": [], "pad_token_id": 0, "of_another_program": nan}
    edit(folder / "generation_config.json", **settings)
    kept = load(folder).generation_config.to_dict()
    assert all(kept[name] == value for name, value in settings.items() if value == value)


def test_what_generate_refuses_is_one_sentence_of_a_command(shipped, capsys):
    """Prompt lookup wants a number above 0, which generate() says before the model has run."""
    edit(shipped / "generation_config.json", prompt_lookup_num_tokens=0, constraints=["x"])
    assert main(["generate", str(shipped), "Hello", "--slots", "64", "--max-new-tokens", "2"]) == 2
    assert "generate() cannot begin with the settings of" in capsys.readouterr().err


def test_stop_strings_and_an_output_of_its_own_are_no_harm_to_a_command(shipped, capsys):
    edit(shipped / "generation_config.json", stop_strings=["Zz"], return_dict_in_generate=True)
    assert main(["generate", str(shipped), "Hello", "--slots", "64", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 2


# --- tokenizers and templates -------------------------------------------------------------------------


def opened(folder: Path) -> Any:
    return readers.open_reader(argparse.Namespace(model=str(folder), trust_remote_code=False))


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
TEMPLATES = {
    "loops": (LOOPS, "does not come to an end"),
    "loops that write": (LOOPS.replace("{% endfor %}", "x" * 100_000 + "{% endfor %}", 1), "does not come to an end"),
    "a filter that runs on": ("{{ lipsum(n=1000000) }}", "does not come to an end"),
    "a constant": ("{{ ('x ' * 10**7) | wordwrap(1) | length }}", "does not come to an end"),
    "a range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "a recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
    "a recursion in two": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "end",
    ),
    "an attribute": ("{{ messages.__class__.__mro__ }}", "is unsafe"),
    "no template": ("{% for %}", "Expected an expression"),
    "an exception": ("{{ raise_exception('not [/so]') }}", "not \\[/so\\]"),
    "nothing": ("", "makes no text"),
    "depth": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion depth"),
}


@pytest.mark.parametrize(("template", "says"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_runs_on_or_fails_is_one_sentence(shipped, template, says):
    (shipped / "chat_template.jinja").write_text(template)
    before = sys.gettrace()
    with pytest.raises(mobile.Refused, match=says):
        opened(shipped).encode([{"role": "user", "content": "Hello"}])
    assert sys.gettrace() is before


def test_a_long_conversation_is_within_the_bound_of_a_template(shipped):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}U{% else %}A{% endif %}{{ m.content | trim }}{% endfor %}"
    )
    (shipped / "chat_template.jinja").write_text(template)
    talk = [{"role": "user", "content": "a long talk, "}] * 2000
    assert "tokens long" in refused(lambda: opened(shipped).encode(talk))
    assert bounded(lambda: "x" * MOST_CHARACTERS * 2)  # only what a template writes is counted


@pytest.mark.parametrize("template", [5, [{"name": 1}], "x" * 2_000_000, [[]], {"a": "b"}])
def test_a_template_that_is_no_text_is_one_sentence(shipped, template):
    edit(shipped / "tokenizer_config.json", chat_template=template)
    assert "template" in refused(
        lambda: opened(shipped).encode([{"role": "user", "content": "Hello"}])
    ) or template == [{"name": 1}]


def test_a_panic_of_the_tokenizers_rust_is_one_sentence(shipped):
    content = json.loads((shipped / "tokenizer.json").read_text())
    content["model"]["vocab"] = dict.fromkeys(content["model"]["vocab"], 0)
    (shipped / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(mobile.Refused, match=r"Cannot load the tokenizer of .*; copy its files again"):
        opened(shipped)


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_an_answer_that_the_tokenizer_has_no_text_for_is_one_sentence(shipped, capsys, how):
    """A tokenizer of bytes beside a model of 1,024 tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (shipped / name).unlink()
    (shipped / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert main(["generate", str(shipped), "Hello", "--slots", "64", "--max-new-tokens", "9", *how]) == 2
    assert "has no text for tokens of the model" in capsys.readouterr().err


def test_no_code_of_a_checkpoint_runs_unasked(shipped, tmp_path):
    """In every place that Transformers takes a class of the checkpoint from."""
    (shipped / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A", "AutoTokenizer": ["evil.A", None]}
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        edit(shipped / file, auto_map=names, custom_generate="evil.py", model_type="evil", tokenizer_class="A")
        main(["generate", str(shipped), "Hello", "--slots", "64", "--max-new-tokens", "2"])
    assert not (tmp_path / "ran").exists()
