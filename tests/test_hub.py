"""From a hub: exactly what is needed is fetched, and what cannot work is refused before a weight is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny
from hub_server import serving
from huggingface_hub import constants
from packed_checkpoints import fp8, mxfp4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import mobile
from mobile.checkpoints import loading
from mobile.cli import main
from mobile.machine.host import host

NAME = "somebody/something"
SMALL = {"config.json", "generation_config.json", "model.safetensors.index.json"}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2_moe")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without any model yet, and an empty cache."""
    with serving(tmp_path / "hub") as running:
        files = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


@pytest.fixture
def folder(hub, model) -> Path:
    """The repository's own folder, with a checkpoint of three files in it."""
    model.save_pretrained(hub.root / NAME, max_shard_size="100KB")
    return hub.root / NAME


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("model-*.safetensors")}


def load(name: str = NAME, **options: object) -> torch.nn.Module:
    return mobile.load(name, "lru", **{"slots": 8, "device": "cpu", "progress": False, **options})


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def same(loaded: torch.nn.Module, stock: torch.nn.Module) -> bool:
    ours, theirs = mobile.detach(loaded).state_dict(), stock.state_dict()
    return ours.keys() == theirs.keys() and all(
        weight.dtype == theirs[key].dtype and torch.equal(weight, theirs[key]) for key, weight in ours.items()
    )


# --- what is fetched --------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["index", "single file beside it"])
def test_what_is_fetched_is_what_transformers_fetches_and_the_tokenizer(hub, folder, model, whole, tmp_path):
    """Beside it lie copies in other formats and precisions, a shard of an older upload, an adapter elsewhere."""
    for other in ("original/model", "consolidated", "model.fp16", "model-00009-of-00009", "lora/adapter_model"):
        (folder / other).parent.mkdir(exist_ok=True)
        save_file({"x": torch.zeros(3)}, folder / f"{other}.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text("{}")
    listed = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    if whole:
        model.save_pretrained(tmp_path / "whole")
        shutil.copy(tmp_path / "whole/model.safetensors", folder)
    loaded = load()
    ours = hub.fetched
    assert ours == (SMALL | {"tokenizer.json"} | ({"model.safetensors"} if whole else listed))
    assert not hub.parts
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.asked.clear()
    stock = AutoModelForCausalLM.from_pretrained(NAME)
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {
        name for name in ours if name.endswith(".safetensors")
    }
    assert same(loaded, stock)
    assert mobile.detach(load()).name_or_path == stock.name_or_path == NAME


def test_nothing_is_shown_of_a_download_when_progress_is_off(hub, folder, capfd):
    load()
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(constants.HF_HUB_CACHE)
    load(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching 3 files" in err


def test_the_file_that_the_configuration_names_is_the_one_fetched(hub, folder, model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole/model.safetensors", folder / "mine.safetensors")
    edit(folder / "config.json", transformers_weights="mine.safetensors")
    assert same(load(), AutoModelForCausalLM.from_pretrained(NAME))
    assert not hub.fetched & shards(folder)
    assert "mine.safetensors" in hub.fetched


def test_an_index_whose_names_are_nonsense_is_held_against_the_headers(hub, folder):
    """Transformers takes the files' names from it and nothing else."""
    edit(folder / INDEX, weight_map={str(number): name for number, name in enumerate(sorted(shards(folder)))})
    assert same(load(), AutoModelForCausalLM.from_pretrained(NAME))
    assert hub.parts == shards(folder)


def test_code_is_fetched_only_when_it_is_trusted(hub, folder):
    (folder / "mine.py").write_text("x = 1\n")
    load()
    assert "mine.py" not in hub.fetched
    load(trust_remote_code=True)
    assert "mine.py" in hub.fetched


def test_the_dtype_that_only_the_weights_know_is_read_from_a_header_by_a_range(hub, folder, monkeypatch):
    for name in shards(folder):
        weights = load_file(folder / name)
        save_file({key: weight.bfloat16() for key, weight in weights.items()}, folder / name, {"format": "pt"})
    edit(folder / "config.json", dtype=None)
    small = replace(host(), memory_available_nbytes=3 * 8 * 3 * 16 * 32 * 2 - 1, container_limit_nbytes=None)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "host", lambda: small)
        with pytest.raises(mobile.Refused, match="GiB of host memory"):
            load()
    assert hub.fetched == SMALL
    assert hub.parts == {min(shards(folder))}
    loaded = load()
    assert loaded.dtype == torch.bfloat16
    assert same(loaded, AutoModelForCausalLM.from_pretrained(NAME))


def test_a_plan_fetches_neither_weights_nor_tokenizer(hub, folder, capsys):
    (folder / "tokenizer.json").write_text("{}")
    assert main(["plan", NAME]) == 0
    assert capsys.readouterr().out.startswith(f"runs: {NAME} on ")
    assert hub.fetched == SMALL
    assert not hub.parts


# --- what is refused before --------------------------------------------------------------------------


def dense(folder: Path) -> None:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    config.save_pretrained(folder)


def outside(folder: Path) -> None:
    edit(folder / INDEX, weight_map={"a": "../../other/model.safetensors"})


def half_an_index(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={key: file for key, file in places.items() if ".experts." not in key})
    for name in shards(folder):
        weights = load_file(folder / name)
        save_file({key: weight for key, weight in weights.items() if ".experts." not in key}, folder / name)


def own_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})


CANNOT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no experts": (dense, "nothing to offload"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "awq"}), "with awq"),
    "quantised somehow": (
        lambda f: edit(f / "config.json", quantization_config={"load_in_4bit": True}),
        "a method that its configuration does not name",
    ),
    "code of its own": (own_code, "runs code of its own"),
    "no class that writes": (
        lambda f: edit(f / "config.json", model_type="bert", architectures=["BertForMaskedLM"]),
        "nothing to offload|generate",
    ),
    "unknown to Transformers": (lambda f: edit(f / "config.json", model_type="abacus"), "model type `abacus`"),
    "a configuration of nonsense": (lambda f: edit(f / "config.json", hidden_size="wide"), "configuration"),
    "sizes of nonsense": (lambda f: edit(f / "config.json", num_attention_heads=0), "configuration"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter beside the model"),
    "an index that leads outside": (outside, "lies outside"),
    "an index without experts": (half_an_index, "lacks weights of model.layers.0.mlp.experts"),
    "an index of absent files": (lambda f: min(f.glob("model-*")).unlink(), "has no model-00001"),
    "only weights that run code": (
        lambda f: [(f / INDEX).unlink(), torch.save({}, f / "pytorch_model.bin")],
        r"lacks model.safetensors; only complete safetensors",
    ),
    "a dtype of nonsense": (lambda f: edit(f / "config.json", dtype="int8"), "weights are torch.int8"),
}


@pytest.mark.parametrize(("change", "says"), CANNOT.values(), ids=CANNOT)
def test_what_cannot_work_is_refused_before_a_weight_is_fetched_and_by_plan_as_well(hub, folder, change, says, capsys):
    change(folder)
    with pytest.raises(mobile.Refused, match=says) as refused:
        load()
    assert "\n" not in str(refused.value)
    assert hub.fetched <= SMALL | {"adapter_config.json"}
    assert main(["plan", NAME]) == 2
    assert capsys.readouterr().err == f"error: {refused.value}\n"
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_budget_and_a_disk_that_are_too_small_are_refused_before_a_weight_is_fetched(
    hub, folder, monkeypatch, capsys
):
    with pytest.raises(mobile.Refused, match="cannot hold"):
        load(slots=None, memory="1GiB")
    free = sum((folder / name).stat().st_size for name in shards(folder)) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free))
    with pytest.raises(mobile.Refused, match=r"cannot be fetched: the weights take .* free some, or set HF_HOME"):
        load()
    assert main(["plan", NAME]) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith(f"does not run here: {NAME} on ")
    assert hub.fetched == SMALL
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free + 1))
    load()


@pytest.mark.parametrize(("make", "format"), [(fp8, "fp8"), (mxfp4, "mxfp4")])
def test_what_a_packed_checkpoint_takes_is_known_from_its_headers_alone(hub, make, format, monkeypatch, capsys):
    make(hub.root / NAME)
    nbytes = (hub.root / NAME / "model.safetensors").stat().st_size
    assert main(["plan", NAME, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["geometry"]["rows"] == format
    assert planned["checkpoint"] == {
        "nbytes": nbytes,
        "missing_nbytes": nbytes,
        "quantised": format,
        "unkept": None,
    }
    needed = planned["host_needed_nbytes"]
    assert main(["plan", NAME, "--host-memory", f"{needed}B"]) == 0
    assert main(["plan", NAME, "--host-memory", f"{needed - 1}B"]) == 1
    monkeypatch.setattr(loading, "host", lambda: replace(host(), memory_available_nbytes=needed))
    with pytest.raises(mobile.Refused, match=r"^The experts, the other weights and the slots take"):
        load()
    assert hub.fetched <= SMALL
    assert hub.parts == {"model.safetensors"}  # its header
    monkeypatch.undo()


def test_a_disk_needs_room_only_for_what_is_not_in_the_cache_yet(hub, folder, monkeypatch):
    load()
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    load()


# --- the cache, revisions, and a hub that is not there -------------------------------------------------


def test_offline_a_full_cache_is_enough(hub, folder, model, monkeypatch):
    load()
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load(), model)
    assert not hub.asked


def test_a_full_cache_is_enough_when_the_hub_does_not_answer(hub, folder, model, monkeypatch):
    load()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert same(load(), model)


def test_what_transformers_has_fetched_is_enough_offline(hub, folder, model, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    AutoModelForCausalLM.from_pretrained(NAME)
    main(["plan", NAME])  # remembers that there is a tokenizer, and does not fetch it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load(), model)


def test_a_download_that_breaks_off_is_one_sentence_and_goes_on_where_it_was(hub, folder, model, monkeypatch):
    last = hub.breaks_off = max(shards(folder))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(mobile.Refused, match=f"Fetching {NAME} stopped: .*; run it again") as refused:
        load()
    assert "\n" not in str(refused.value)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(mobile.Refused, match=f"in the cache without {last}, and the hub cannot be reached"):
            load()
    hub.breaks_off = None
    hub.asked.clear()
    assert same(load(), model)
    assert hub.fetched | hub.parts == {last}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, folder, model):
    assert same(load(revision="v1"), model)
    with pytest.raises(mobile.Refused, match="it has no revision v9; leave revision out"):
        load(revision="v9")
    with pytest.raises(mobile.Refused, match="a revision goes into revision="):
        load(f"{NAME}@v1")
    with pytest.raises(mobile.Refused, match="is a folder, which has no revisions"):
        load(str(folder), revision="v1")


def test_a_name_that_the_hub_does_not_know_is_one_sentence(hub):
    with pytest.raises(mobile.Refused, match="Cannot load nobody/nothing: the hub shows no such model; check the name"):
        load("nobody/nothing")
