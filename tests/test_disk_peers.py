"""What a user would run instead from a disk, on a CPU, small: each program runs in a process of its own, capped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mobile.errors import Refused
from mobile.live_model import compat
from suites.identity import Model
from suites.plan.preset import read_preset
from suites.record import RunFolder, load
from suites.synthetic import disk_checkpoint, disk_peers, models, reference
from suites.synthetic.disk_peer_process import allocated_nbytes, timed
from suites.synthetic.memory_cap import MemoryCap, capped
from suites.synthetic.reference_cells import (
    DISK_OFFLOAD,
    DISK_PEERS,
    LLAMA_CPP,
    MEMORY_MAPPED,
    ReferenceCell,
)
from tests import shapes as narrow

MIB = 2**20
PRESET = narrow.PRESET.replace(
    'link = "cuda"', 'link = "disk"\nbeside = ["disk_offload", "mmap", "llama.cpp"]\nbeside_memory = "2GiB"'
)
GREEDY = f"""
import pathlib, os
pathlib.Path({{members!r}}).write_text(str(os.getpid()))
held = bytearray({64 * MIB})
"""


def cell(what: str, memory: str = "2GiB", geometry: str = "olmoe-1b-7b") -> ReferenceCell:
    return ReferenceCell(
        Model("narrow", geometry, "synthetic", path="models/olmoe-tiny"), what, "disk", memory, 6, 3, 2, 0, 1, 16
    )


def can_cap() -> bool:
    with capped(64 * MIB, f"mobile-test-{os.getpid()}") as cap:
        return cap.is_kept


needs_group = pytest.mark.skipif(not can_cap(), reason="no memory cgroup can be made here")


def test_a_preset_asks_for_them_beside_the_disk_and_nowhere_else(tmp_path):
    path = tmp_path / "peers.toml"
    path.write_text(PRESET)
    cells = read_preset(str(path)).references
    assert [each.what for each in cells] == list(DISK_PEERS)
    assert {(each.budget, each.scope) for each in cells} == {("2GiB", "cpu+disk")}
    with pytest.raises(Refused, match="reads from disk, which the link paced does not"):
        read_preset(str(path), link="paced")


@pytest.mark.parametrize(
    ("what", "modules", "how"),
    [
        (DISK_OFFLOAD, ("accelerate",), " modules on disk; "),
        (MEMORY_MAPPED, (), "every weight in a memory-mapped file"),
        (LLAMA_CPP, ("llama_cpp", "gguf"), "every weight in a memory-mapped file"),
    ],
)
def test_each_program_runs_and_is_recorded(what, modules, how, tmp_path):
    for module in modules:
        pytest.importorskip(module)
    run = RunFolder(tmp_path)
    reference.measure(cell(what), None, run)
    record = load(cell(what).output(run))
    assert record.config["refused"] is None
    assert how in record.config["stock"]
    assert [item.decode_tokens for item in record.items] == [3, 3]
    assert all(item.ttft_ns > 0 and item.decode_ns > 0 for item in record.items)
    assert (record.scope, record.strategy, record.budget) == ("cpu+disk", what, "2GiB")
    config = record.config
    assert config["memory_nbytes"] == 2 * 2**30
    assert config["memory_cap"].startswith("memory cgroup v" if can_cap() else "not capped: ")
    assert config["checkpoint_nbytes"] > disk_checkpoint.nbytes_of(models.config_of("olmoe-1b-7b", 1, 16))
    assert config["routing"] == "random weights' own, near uniform"
    assert None not in config["versions"].values()
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize("geometry", ["qwen1.5-moe-a2.7b", "qwen3-30b-a3b"])
def test_llama_cpp_reads_other_families(geometry, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    assert disk_peers.measure_peer(cell(LLAMA_CPP, geometry=geometry), tmp_path).repeats


def test_a_family_that_gguf_has_otherwise_is_refused_and_nothing_is_left(tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    record = reference.record(cell(LLAMA_CPP, geometry="deepseek-v2-lite"), tmp_path)
    assert record.items == ()
    assert record.config["refused"].startswith("No GGUF file of deepseek_v2 is written here")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("what", "package"), [(DISK_OFFLOAD, "accelerate"), (LLAMA_CPP, "llama-cpp-python")])
def test_a_program_that_is_not_installed_is_no_failure(what, package, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_peers, "find_spec", lambda module: None)
    record = reference.record(cell(what), tmp_path)
    assert record.items == ()
    assert record.config["refused"] == f"{package} is not installed, and {what} needs it: pip install {package}."


@needs_group
def test_a_program_that_needs_more_than_the_cap_is_killed_and_the_record_says_so(tmp_path):
    record = reference.record(cell(MEMORY_MAPPED, "40MiB"), tmp_path)
    assert record.items == ()
    assert record.config["refused"].startswith("stock, memory-mapped was killed: it needs more than 40MiB of memory")


def test_a_program_that_fails_says_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_checkpoint, "write_stock", lambda folder, *_: (folder / "model.safetensors").touch())
    record = reference.record(cell(MEMORY_MAPPED), tmp_path)
    assert record.config["refused"].startswith("stock, memory-mapped ended without an answer, ")
    assert "Error" in record.config["refused"]


def test_a_disk_without_room_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_checkpoint, "LEFT_FREE", 2**60)
    record = reference.record(cell(MEMORY_MAPPED), tmp_path)
    assert "GB are free; name a folder with room." in record.config["refused"]
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_is_the_stock_models_and_the_same_for_the_same_seed(tmp_path):
    config = models.config_of("qwen1.5-moe-a2.7b", 1, 16)
    disk_checkpoint.write_stock(tmp_path, config, seed=3)
    written = load_file(tmp_path / "model.safetensors")
    assert {name: weight.shape for name, weight in written.items()} == disk_checkpoint.shapes_of(config)
    for name, weight in written.items():
        assert torch.equal(weight, disk_checkpoint.weight(name, weight.shape, 3))
    router = next(name for name in written if name.endswith("mlp.gate.weight"))
    assert not torch.equal(written[router], disk_checkpoint.weight(router, written[router].shape, 4))
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", output_loading_info=True)
    assert not any(found.values())
    assert model(torch.arange(4)[None]).logits.isfinite().all()


def test_routing_is_close_to_uniform_in_every_layer(tmp_path):
    """Two tokens in a row share 8 of 64 by chance alone, an eighth of their experts."""
    config = models.config_of("olmoe-1b-7b", 3, 4)
    disk_checkpoint.write_stock(tmp_path, config, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    layers = compat.moe_layers(model)
    chosen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(layers):
        layer.experts.register_forward_pre_hook(
            lambda _, args, number=number: chosen.update({number: args[1].reshape(-1, 8)})
        )
    with torch.no_grad():
        model(torch.arange(100, 164)[None])
    for number in range(len(layers)):
        tokens = [set(row.tolist()) for row in chosen[number]]
        again = sum(len(a & b) for a, b in pairwise(tokens)) / (8 * 63)
        assert 0.07 < again < 0.2
        assert len(set().union(*tokens)) == 64


def test_llama_cpp_is_given_the_same_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = models.config_of("olmoe-1b-7b", 1, 16)
    disk_checkpoint.write_gguf(tmp_path / "model.gguf", config, seed=3)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stacked = disk_checkpoint.weight(name, disk_checkpoint.shapes_of(config)[name], 3)
    half = stacked.shape[1] // 2
    for place, wanted in (("gate", stacked[:, :half]), ("up", stacked[:, half:])):
        tensor = tensors[f"blk.0.ffn_{place}_exps.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        assert bytes(tensor.data) == bytes(disk_checkpoint.bytes_of(wanted))
    assert sum(tensor.n_elements for tensor in tensors.values()) * 2 == disk_checkpoint.nbytes_of(config)


@needs_group
def test_a_group_bounds_its_process_and_is_gone_afterwards():
    with capped(32 * MIB, f"mobile-test-{os.getpid()}") as cap:
        assert cap.how == f"memory cgroup v{cap.how[15]} of {32 * MIB} bytes, page cache included"
        assert cap.kills() == 0
        ended = subprocess.run([sys.executable, "-c", GREEDY.format(members=cap.members)])
        assert ended.returncode < 0
        assert cap.kills() == 1
        assert cap.peak_nbytes() <= 32 * MIB
        group = cap.group
    assert not group.exists()


def test_where_no_group_can_be_made_the_cap_says_why(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    with capped(MIB, "ours", tmp_path) as cap:
        assert cap == MemoryCap(
            MIB, "not capped: no memory cgroup can be made here (this system counts no memory by groups)"
        )
        assert (cap.members, cap.peak_nbytes(), cap.kills()) == (None, None, None)


@pytest.mark.parametrize(
    ("line", "folder", "limit"),
    [
        ("4:memory:/box", "sys/fs/cgroup/memory/box", "memory.limit_in_bytes"),
        ("0::/slice/box", "sys/fs/cgroup/slice", "memory.max"),
    ],
)
def test_the_group_lies_where_the_version_lets_it(line, folder, limit, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    for name in ("box", "slice/box"):
        (tmp_path / "sys/fs/cgroup" / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "sys/fs/cgroup/memory/box").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/slice/cgroup.subtree_control").write_text("cpu memory\n")
    with capped(MIB, "ours", tmp_path) as cap:
        assert cap.group == tmp_path / folder / "ours"
        assert (cap.group / limit).read_text() == str(MIB)
        (cap.group / limit).unlink()  # a real group's files go with it


class Memory:
    """A player that notes what it reads."""

    how, vocabulary = "noted", 100

    def __init__(self) -> None:
        self.runs: list[list[list[int]]] = []

    def begin(self) -> None:
        self.runs.append([])

    def read(self, tokens) -> None:
        self.runs[-1].append(list(tokens))


def test_every_repeat_reads_tokens_of_its_own_and_one_step_is_not_counted():
    player = Memory()
    for repeat in range(2):
        assert timed(player, 3, 2, repeat).keys() >= {"prefill_ns", "decode_ns", "decode_read_nbytes"}
    assert player.runs == [[[0, 1, 2], [3], [4], [5]], [[6, 7, 8], [9], [10], [11]]]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_a_memory_mapped_weight_is_not_allocated(tmp_path):
    config = models.config_of("olmoe-1b-7b", 4, 4)
    disk_checkpoint.write_stock(tmp_path, config, 0)
    program = (
        "import json, sys; from suites.synthetic.disk_peer_process import *; before = allocated_nbytes(); "
        "import torch, transformers; from transformers import OlmoeForCausalLM; imported = allocated_nbytes(); "
        "player = memory_mapped({'folder': sys.argv[1], 'threads': 1}); player.read([1, 2, 3]); "
        "print(allocated_nbytes() - imported)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) < disk_checkpoint.nbytes_of(config) / 4
    assert allocated_nbytes() > 0


def test_every_program_names_its_packages_and_its_task():
    assert set(disk_peers.PACKAGES) == set(DISK_PEERS.values())
    for modules in disk_peers.PACKAGES.values():
        assert all(module.isidentifier() for module in modules)
    assert {cell(what).task for what in (DISK_OFFLOAD, MEMORY_MAPPED)} == {"plain Transformers"}
    assert cell(LLAMA_CPP).task == "llama.cpp"
