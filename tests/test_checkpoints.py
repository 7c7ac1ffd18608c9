"""A load takes the files and the dtype that Transformers would take; what is no checkpoint is refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny
from families import COMMON, LINEAR, NUM, VISION
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5MoeConfig, Qwen3MoeConfig

import mobile
from mobile.checkpoints import examine, loading

INDEX = "model.safetensors.index.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of several files."""
    tiny("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


@pytest.fixture(params=["direct", "converted"])
def way(request, monkeypatch) -> str:
    """Both ways of reading: our own, and Transformers' conversions, as for a format that we do not know."""
    if request.param == "converted":
        monkeypatch.setattr(loading, "plan_readings", lambda *_: None)
    return request.param


def load(source: object, **options: object) -> PreTrainedModel:
    return mobile.load(source, "lru", **{"slots": 8, "device": "cpu", "progress": False, **options})


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Write every weight of every file again as `change(key, weight)`; None leaves it out."""
    for file in folder.glob("*.safetensors"):
        changed = {key: change(key, weight) for key, weight in load_file(file).items()}
        save_file({key: weight for key, weight in changed.items() if weight is not None}, file, {"format": "pt"})


def other(folder: Path, name: str) -> None:
    """A second whole set of weights, other ones, in one file of that name."""
    tiny("qwen3_moe", seed=7).save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other/model.safetensors", folder / name)


def assert_same(loaded: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Every parameter and buffer bit for bit, its dtype, whether it asks for gradients, and both configurations."""
    ours = mobile.detach(loaded)
    assert type(ours) is type(stock)
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, stock))
        assert mine.keys() == theirs.keys()
        for name, weight in mine.items():
            assert weight.dtype == theirs[name].dtype, name
            assert torch.equal(weight, theirs[name]), name
            assert weight.requires_grad == theirs[name].requires_grad, name
    assert ours.config.to_dict() == stock.config.to_dict()
    assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
    assert ours.name_or_path == stock.name_or_path


# --- which files ------------------------------------------------------------------------------------


def stale_index(folder: Path) -> None:
    other(folder, "model.safetensors")
    edit(folder / INDEX, weight_map={"a": "model-00001-of-00002.safetensors"})


def broken_index(folder: Path) -> None:
    other(folder, "model.safetensors")
    (folder / INDEX).write_text("{")


def named(folder: Path) -> None:
    other(folder, "mine.safetensors")
    edit(folder / "config.json", transformers_weights="mine.safetensors")


def named_index(folder: Path) -> None:
    other(folder, "model.safetensors")
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    edit(folder / "config.json", transformers_weights="mine.safetensors.index.json")


def in_a_subfolder(folder: Path) -> None:
    (folder / "parts").mkdir()
    for file in folder.glob("model-*.safetensors"):
        file.rename(folder / "parts" / file.name)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={key: f"parts/{file}" for key, file in places.items()})


def key_twice(folder: Path) -> None:
    """In two files; of the index only the files' names count."""
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    stray = {key: torch.full_like(weight, 0.5) for key, weight in load_file(first).items()}
    save_file({**load_file(last), **stray}, last, {"format": "pt"})


def not_in_the_index(folder: Path) -> None:
    key = "model.layers.0.mlp.experts.0.up_proj.weight"
    save_file({key: torch.zeros(16, 32)}, folder / "model-00099-of-00099.safetensors", {"format": "pt"})


def names_of_nonsense(folder: Path) -> None:
    files = sorted(file.name for file in folder.glob("model-*.safetensors"))
    edit(folder / INDEX, weight_map={str(number): file for number, file in enumerate(files)})


def a_folder_of_that_name(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


def a_second_whole_set(folder: Path) -> None:
    other(folder, "model.safetensors")


def a_variant(folder: Path) -> None:
    other(folder, "model.fp16.safetensors")


def broken_settings_of_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


def no_settings_of_generation(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


CHOICES = [
    stale_index,
    broken_index,
    named,
    named_index,
    in_a_subfolder,
    key_twice,
    not_in_the_index,
    names_of_nonsense,
    a_folder_of_that_name,
    a_second_whole_set,
    a_variant,
    broken_settings_of_generation,
    no_settings_of_generation,
]


@pytest.mark.parametrize("prepare", CHOICES, ids=lambda prepare: prepare.__name__)
def test_of_several_weights_those_are_loaded_that_transformers_loads(folder, prepare, way):
    prepare(folder)
    assert_same(load(folder), AutoModelForCausalLM.from_pretrained(folder))


def test_weights_under_the_models_own_names_are_found(folder, way):
    """As state_dict() names them: experts stacked, and nothing to rename."""
    model = tiny("qwen3_moe", seed=7)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    assert_same(load(folder), AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_is_it_again(tmp_path, tied, way):
    config = Qwen3MoeConfig(**COMMON, **NUM, head_dim=8, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_part_of_a_larger_model_that_writes_is_loaded_from_the_whole(tmp_path, dtype, way):
    """A checkpoint with a vision tower, of which AutoModelForCausalLM makes the text model."""
    text = {**COMMON, **NUM, **LINEAR, "head_dim": 8, "shared_expert_intermediate_size": 16}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=VISION)
    transformers.Qwen3_5MoeForConditionalGeneration._from_config(config).save_pretrained(tmp_path)
    if dtype is not None:
        written = json.loads((tmp_path / "config.json").read_text())
        edit(tmp_path / "config.json", dtype="float32", text_config={**written["text_config"], "dtype": dtype})
    loaded = load(tmp_path)
    assert type(loaded).__name__ == "Qwen3_5MoeForCausalLM"
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_loaded_model_is_saved_as_transformers_saves_it(folder, tmp_path):
    """One expert a key, as it was."""
    mobile.detach(load(folder)).save_pretrained(tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "stock")
    ours, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in ours
    assert ours.keys() == stock.keys()
    assert all(torch.equal(weight, stock[key]) for key, weight in ours.items())


# --- which dtype ------------------------------------------------------------------------------------


def all_of(dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda _, weight: weight.to(dtype)


def first_of_8_bits(key: str, weight: torch.Tensor) -> torch.Tensor:
    """`lm_head` is the alphabet's first."""
    return weight.to(torch.float8_e4m3fn) if key.startswith("lm_head") else weight.bfloat16()


def first_of_16(key: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.half() if key.startswith("lm_head") else weight.float()


def experts_of_16(key: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16() if ".experts." in key else weight


@pytest.mark.parametrize(
    "change", [all_of(torch.bfloat16), all_of(torch.float64), first_of_8_bits, first_of_16, experts_of_16]
)
@pytest.mark.parametrize("index_says", [None, "float16"])
def test_where_the_configuration_has_no_dtype_the_files_say_it(folder, change, index_says, way):
    change_weights(folder, change)
    edit(folder / "config.json", dtype=None)
    if index_says is not None:
        edit(folder / INDEX, metadata={"dtype": index_says})
    stock = AutoModelForCausalLM.from_pretrained(folder)
    loaded = load(folder)
    assert loaded.mobile.store.layout.dtype == stock.dtype
    assert_same(loaded, stock)


@pytest.mark.parametrize("dtype", [None, "auto", torch.float16, "float16", "half", "bfloat16"])
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "ernie4_5_moe"])
def test_what_a_family_keeps_in_float32_is_kept_so(tmp_path, family, dtype):
    """gpt-oss its norms in fp16, Ernie its routers in both."""
    from families import tiny as of_any_family

    of_any_family(family).bfloat16().save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same(load(tmp_path, dtype=dtype), stock)


@pytest.mark.parametrize("dtype", ["fp16", "int8", torch.int8, torch.float8_e4m3fn, "", 16, {"": "float16"}, "nn"])
def test_a_dtype_that_is_none_is_one_sentence(folder, dtype):
    with pytest.raises(mobile.Refused, match=r"Unknown dtype .*; give bfloat16, float16 or float32\.$"):
        load(folder, dtype=dtype)


def test_weights_of_8_bits_alone_are_no_dtype_to_load_in(folder):
    change_weights(folder, all_of(torch.float8_e4m3fn))
    edit(folder / "config.json", dtype=None)
    with pytest.raises(mobile.Refused, match=r"weights are torch\.float8_e4m3fn; give bfloat16"):
        load(folder)
    assert load(folder, dtype="bfloat16").mobile.store.layout.dtype == torch.bfloat16


# --- what is no checkpoint ----------------------------------------------------------------------------


def index(**content: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder / INDEX, **content)


def text(name: str, content: str, encoding: str = "utf-8") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding=encoding)


def first_file(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def cut(nbytes: int) -> Callable[[Path], object]:
    return lambda folder: first_file(folder).write_bytes(first_file(folder).read_bytes()[:nbytes])


def only(name: str) -> Callable[[Path], object]:
    def leave(folder: Path) -> None:
        for file in folder.glob("*model*"):
            file.unlink()
        (folder / name).write_bytes(b"")

    return leave


def huge_header(folder: Path) -> None:
    first_file(folder).write_bytes(struct.pack("<Q", 2**60))


def an_expert_too_many(folder: Path) -> None:
    edit(folder / "config.json", num_local_experts=7)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "index of nothing": (text(INDEX, ""), "is no valid JSON"),
    "index cut short": (text(INDEX, '{"weight_map": {'), "is no valid JSON"),
    "index in another encoding": (text(INDEX, '{"weight_map": {"ü": "m"}}', "latin-1"), "is no valid JSON"),
    "index nested without end": (text(INDEX, "[" * 100_000), "is no valid JSON"),
    "index that is a list": (text(INDEX, "[]"), "holds list where a JSON object should be"),
    "index without a map": (index(weight_map=None), 'has a "weight_map"'),
    "index with an empty map": (index(weight_map={}), 'has a "weight_map"'),
    "index with a list for a map": (index(weight_map=["a"]), 'has a "weight_map"'),
    "index of numbers": (index(weight_map={"a": 1}), 'has a "weight_map"'),
    "index without metadata": (index(metadata=None), 'has no "metadata"'),
    "index of pickles": (index(weight_map={"a": "pytorch_model-00001-of-00002.bin"}), "is no .safetensors file"),
    "index that leads up": (index(weight_map={"a": "../other.safetensors"}), "lies outside"),
    "index that leads up later": (index(weight_map={"a": "x/../../other.safetensors"}), "lies outside"),
    "index that leads away": (index(weight_map={"a": "/tmp/other.safetensors"}), "lies outside"),
    "index of absent files": (index(weight_map={"a": "gone.safetensors"}), r"lacks gone\.safetensors; copy it again"),
    "index of fewer weights": (index(weight_map={"a": "model-00001-of-00003.safetensors"}), "lacks"),
    "index with a dtype of nonsense": (
        lambda folder: [edit(folder / INDEX, metadata={"dtype": "wide"}), edit(folder / "config.json", dtype=None)],
        "says that its dtype is 'wide'",
    ),
    "named weights outside": (
        lambda folder: edit(folder / "config.json", transformers_weights="../x.safetensors"),
        "lies outside",
    ),
    "named weights that are absent": (
        lambda folder: edit(folder / "config.json", transformers_weights="x.safetensors"),
        "lacks x.safetensors",
    ),
    "a named index that is absent": (
        lambda folder: edit(folder / "config.json", transformers_weights="x.safetensors.index.json"),
        "lacks x",
    ),
    "named weights of another kind": (
        lambda folder: edit(folder / "config.json", transformers_weights="adapter_model.bin"),
        "take it out",
    ),
    "named weights that are no name": (
        lambda folder: edit(folder / "config.json", transformers_weights=["x.safetensors"]),
        "take it out",
    ),
    "weights cut in the header": (cut(20), "damaged or cut short"),
    "weights cut at the end": (cut(-1), "damaged or cut short"),
    "empty weights": (cut(0), "damaged or cut short"),
    "weights whose header never ends": (huge_header, "damaged or cut short"),
    "weights that Git LFS has": (
        lambda folder: first_file(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer .* run: git lfs pull",
    ),
    "more experts than the configuration says": (an_expert_too_many, "has more weights of model.layers.0.mlp.experts"),
    "another vocabulary than the configuration says": (
        lambda folder: edit(folder / "config.json", vocab_size=63),
        "do not fit its configuration; copy it again",
    ),
    "pickles": (only("pytorch_model.bin"), "lacks model.safetensors; only .* are read, and pytorch_model.bin is not"),
    "GGUF": (only("model-Q4_K_M.gguf"), "and model-Q4_K_M.gguf is not; take the checkpoint"),
    "parts without an index": (
        lambda folder: (folder / INDEX).unlink(),
        "is one of several that model.safetensors.index.json should list",
    ),
    "weights under another name": (only("model.fp16.safetensors"), "if model.fp16.safetensors is the whole model"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a configuration cut short": (text("config.json", '{"model_type": '), "config.json is no valid JSON"),
    "a configuration with a byte order mark": (
        lambda folder: text("config.json", (folder / "config.json").read_text(), "utf-8-sig")(folder),
        "no valid JSON",
    ),
    "a configuration that is a list": (text("config.json", '["olmoe"]'), "holds list where a JSON object"),
    "a configuration that is a word": (text("config.json", '"olmoe"'), "holds str where a JSON object"),
    "a configuration of nothing": (text("config.json", "{}"), "model_type"),
    "a configuration without a type": (lambda folder: edit(folder / "config.json", model_type=None), "model_type"),
    "a type that is no word": (lambda folder: edit(folder / "config.json", model_type=["a"]), "configuration"),
    "a dtype that is none": (lambda folder: edit(folder / "config.json", dtype="bfloat17"), "bfloat17"),
    "a number that is a word": (lambda folder: edit(folder / "config.json", num_experts="many"), "num_experts"),
}


@pytest.mark.parametrize(("prepare", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_sentence(folder, prepare, says):
    prepare(folder)
    with pytest.raises(mobile.Refused, match=says) as refused:
        load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("source", ["", " ", None, 3, b"model", ["model"]])
def test_a_source_that_names_nothing_is_one_sentence(source, folder, monkeypatch):
    """An empty name is not the folder one happens to be in."""
    monkeypatch.chdir(folder)
    with pytest.raises(mobile.Refused, match="is no checkpoint; give its folder, or a hub id"):
        load(source)


def test_a_file_in_place_of_its_folder_is_one_sentence(folder):
    for name in ("config.json", first_file(folder).name):
        with pytest.raises(mobile.Refused, match="is a file; give the folder of a checkpoint"):
            load(folder / name)


def test_a_path_that_is_no_utf8_is_one_sentence(folder):
    odd = folder.parent / os.fsdecode(b"bad\xff")
    folder.rename(odd)
    with pytest.raises(mobile.Refused, match=r"bad\\udcff' is no valid UTF-8, which safetensors needs; rename it"):
        load(odd)


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for source in ("~/model", Path("~/model")):
        assert load(source).mobile.slots == 8
    with pytest.raises(mobile.Refused, match="There is no folder ~/gone"):
        load("~/gone")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "owner/name/more", "-x-", "a..b/c", "/gone", "owner/na me"])
def test_a_name_that_no_folder_and_no_model_can_have_is_one_sentence(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(mobile.Refused) as refused:
        load(name)
    assert "\n" not in str(refused.value)


# --- adapters -----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder) -> dict:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/base"}))
    return {}


@pytest.mark.usefixtures("adapter")
def test_an_adapter_beside_the_model_is_refused_where_transformers_would_apply_it(folder, monkeypatch):
    monkeypatch.setattr(examine, "is_peft_available", lambda: True)
    with pytest.raises(
        mobile.Refused, match=r"merge it \(merge_and_unload of peft\), or move adapter_config.json away"
    ):
        load(folder)


@pytest.mark.usefixtures("adapter")
def test_an_adapter_beside_the_model_is_nothing_where_there_is_no_peft(folder, monkeypatch, way):
    for module in (examine, transformers.models.auto.auto_factory, transformers.integrations.peft):
        monkeypatch.setattr(module, "is_peft_available", lambda: False)
    assert_same(load(folder), AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.usefixtures("adapter")
def test_an_adapter_alone_is_said_to_be_one(folder):
    (folder / "config.json").unlink()
    with pytest.raises(mobile.Refused, match="holds only an adapter of a/base; merge the two"):
        load(folder)


def test_what_a_quantised_checkpoint_needs_and_is_not_installed_is_said(folder, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: False)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(mobile.Refused, match=r"quantised with fp8, and Transformers says: .*pip install accelerate"):
        load(folder)


# --- devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device", ["gpu", "mps", "cuda:99", "", "meta", "cpu:x", 99, -1, True, 1.5, torch.device("meta")]
)
def test_a_device_that_is_not_here_is_one_sentence(folder, device):
    with pytest.raises(mobile.Refused, match=r"There is no device .* here; leave device out, or give cpu"):
        load(folder, device=device)


@pytest.mark.parametrize(
    ("device", "gpus", "found"),
    [
        (None, 0, "cpu"),
        ("auto", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("cpu:0", 2, "cpu"),
        (torch.device("cpu"), 2, "cpu"),
        (None, 2, "cuda"),
        ("auto", 2, "cuda"),
        ("cuda", 2, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        (0, 2, "cuda:0"),
        (1, 2, "cuda:1"),
        ("1", 2, "cuda:1"),
        (torch.device("cuda", 1), 2, "cuda:1"),
    ],
)
def test_a_device_is_a_name_a_number_or_left_to_what_is_here(device, gpus, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert loading._device(device) == torch.device(found)
    if gpus:
        with pytest.raises(mobile.Refused, match="There is no device 2 here; leave device out, or give cpu, cuda or"):
            loading._device(2)
