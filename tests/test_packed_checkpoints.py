"""Checkpoints packed in FP8 or MXFP4 stay packed in the store and on the link, and compute what Transformers does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import greedy, prompt
from packed_checkpoints import EXPERTS, LAYERS, PACKED, TOP_K, WEIGHTS, configure, fp8, mxfp4, rewrite, stock
from test_exactness import LOSSLESS

import mobile
from mobile.checkpoints.headers import read_header
from mobile.cli import main
from mobile.store import poison
from mobile.store.formats import Part
from mobile.store.formats.fp8 import Fp8
from mobile.store.formats.mxfp4 import Mxfp4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPERT_KEY = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    """Give the checkpoint of a kind, made once."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = PACKED[kind](tmp_path_factory.mktemp("packed"))
        return folders[kind]

    return of


def load(folder: Path, strategy: str = "lru", **options: Any) -> Any:
    options = {"slots": TOP_K, "device": "cpu", "progress": False} | options
    return mobile.load(folder, strategy, **options)


def expert_nbytes(folder: Path) -> int:
    """Bytes of the tensors of one expert in the checkpoint's file."""
    stored = read_header(folder / WEIGHTS)
    return sum(tensor.nbytes for key, tensor in stored.items() if ".experts." in key) // (LAYERS * EXPERTS)


# --- what is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", PACKED)
def test_logits_and_tokens_are_those_of_the_model_that_transformers_dequantises(made, kind, dtype):
    model = stock(made(kind), dtype)
    with torch.no_grad():
        prefill = model(prompt()).logits
    sequences, logits = greedy(model, prompt())
    assert logits.std() > 0.1
    for strategy in [*LOSSLESS, "mobile"]:
        options: dict[str, Any] = {"gamma": 1.1} if strategy == "mobile" else {}
        slots = LAYERS * EXPERTS if strategy == "resident" else TOP_K
        loaded = load(made(kind), strategy, slots=slots, dtype=dtype, **options)
        with torch.no_grad():
            assert torch.equal(loaded(prompt()).logits, prefill), strategy
        ours = greedy(loaded, prompt())
        assert torch.equal(ours[0], sequences), strategy
        assert torch.equal(ours[1], logits), strategy
        stats = loaded.mobile.stats()
        assert stats["bytes_loaded"] == stats["loads"] * loaded.mobile.store.layout.nbytes


@pytest.mark.parametrize("kind", PACKED)
def test_from_a_disk_as_well_whose_file_is_used_again(made, kind, tmp_path):
    logits = greedy(stock(made(kind), torch.bfloat16), prompt())[1]
    for _ in range(2):
        loaded = load(made(kind), "mobile", gamma=1.1, link="disk", store=tmp_path)
        assert torch.equal(greedy(loaded, prompt())[1], logits)
        assert loaded.mobile.store.layout.rows == kind.split(",")[0]
        [file] = tmp_path.glob("*.safetensors")
        assert loaded.mobile.store.nbytes < file.stat().st_size < loaded.mobile.store.nbytes + 2**16
        loaded.mobile.close()


@pytest.mark.parametrize("kind", PACKED)
def test_detach_gives_the_model_that_transformers_dequantises(made, kind):
    theirs = stock(made(kind), torch.bfloat16).state_dict()
    ours = mobile.detach(load(made(kind), "mobile")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_byte_and_every_scale_of_mxfp4_is_decoded_as_transformers_does(dtype):
    """The largest scale's byte too, which gives infinities."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    theirs = _convert_moe_packed_tensors(codes[None], scales[None])[0].to(dtype)
    ours = unpacked(Mxfp4(), {"codes": codes, "scales": scales}, theirs.shape, dtype, inputs=0)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours.signbit(), theirs.signbit())
    assert ours.isinf().any()
    turned = unpacked(Mxfp4(), {"codes": codes, "scales": scales}, theirs.T.shape, dtype, inputs=1)
    assert torch.equal(turned, theirs.T)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_byte_of_fp8_is_decoded_as_transformers_does(dtype, scale_dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(6, 2).view(12, 256)
    scales = (torch.rand(3, 2, generator=torch.Generator().manual_seed(0)) / 300).to(scale_dtype)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
    ours = unpacked(Fp8(scale_dtype, (((12, 256), (3, 2)),)), {"codes": codes, "scales": scales}, (12, 256), dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert ours.isnan().sum() == 24  # two of 256 bytes


def unpacked(format: Any, parts: dict, shape: Any, dtype: torch.dtype, inputs: int = 1) -> torch.Tensor:
    declared = format.parts(tuple(shape), dtype, inputs)
    assert declared == tuple(Part(name, part.dtype, tuple(part.shape)) for name, part in parts.items())
    weight = torch.empty(shape, dtype=dtype)
    format.unpack(parts, weight, inputs, torch.empty(format.work_nbytes(tuple(shape)), dtype=torch.uint8))
    return weight


@pytest.mark.parametrize("kind", PACKED)
def test_a_slot_that_nothing_was_copied_into_is_seen(made, kind, monkeypatch):
    """Bytes of 0xFF, with which tests fill empty slots, are NaN in these formats; in MXFP4 the biases are."""
    monkeypatch.setattr("mobile.runtime.engine.Engine.fill", lambda self, key, slot: None)
    loaded = load(made(kind))
    poison(loaded.mobile.slot_rows)
    assert loaded(prompt()).logits.isnan().any()


# --- bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKED)
def test_rows_hold_the_bytes_of_the_checkpoint_and_plan_says_so_before(made, kind, capsys):
    """Each part begins at a multiple of 128 bytes, so that rows are at most 6 x 127 bytes longer."""
    loaded = load(made(kind))
    row = loaded.mobile.store.layout.nbytes
    assert 0 <= row - expert_nbytes(made(kind)) < 6 * 128
    assert main(["plan", str(made(kind)), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["geometry"]["expert_nbytes"] == row
    assert planned["host_needed_nbytes"] == loaded.mobile.store.nbytes
    assert planned["geometry"]["rows"] == loaded.mobile.store.layout.rows == kind.split(",")[0]
    decoded = 2 * 3 * 128 * 64
    assert row < decoded * (0.6 if kind.startswith("fp8") else 0.35)


def test_the_parts_of_the_store_are_the_bytes_of_the_file(made):
    from safetensors.torch import load_file

    stored = load_file(made("fp8") / WEIGHTS)
    parts = load(made("fp8")).mobile.store.weights(1, "gate_up_proj").parts
    codes = parts["codes"][3, :64].view(torch.uint8)
    assert torch.equal(codes, stored[EXPERT_KEY].view(torch.uint8))
    assert torch.equal(parts["scales"][3, :2], stored[f"{EXPERT_KEY}_scale_inv"])


def test_a_file_that_is_cut_while_experts_or_the_rest_are_read_is_refused(made, monkeypatch, tmp_path):
    """Transformers maps the files into memory, where that would end the process; here they are read."""
    from mobile.checkpoints import loading, reading

    for name, module in (("own_packing", loading), ("_keep_experts_out", reading)):
        for make in (fp8, mxfp4):
            folder = make(tmp_path / f"{name}-{make.__name__}")
            original = getattr(module, name)

            def cut(*arguments: Any, folder: Path = folder, original: Any = original) -> Any:
                found = original(*arguments)
                os.truncate(folder / WEIGHTS, 100)
                return found

            with monkeypatch.context() as patch:
                patch.setattr(module, name, cut)
                with pytest.raises(mobile.Refused, match="cut short"):
                    load(folder)


# --- packings that are not kept -----------------------------------------------------------------------


def odd_blocks(weights: dict[str, torch.Tensor]) -> None:
    key = f"{EXPERT_KEY}_scale_inv"
    weights[key] = weights[key][:1].contiguous()  # other blocks than those of the other experts


def plain_layer(weights: dict[str, torch.Tensor]) -> None:
    for key in [key for key in weights if "layers.1.mlp.experts" in key and key.endswith("_proj.weight")]:
        weights[key] = weights[key].to(torch.bfloat16)
        del weights[f"{key}_scale_inv"]


UNKEPT = {
    "blocks of two sizes": (odd_blocks, "the scales of gate_up_proj differ in shape or dtype"),
    "a layer that is not packed": (plain_layer, "gate_up_proj has 8 matrices and 0 grids of scales, for 8 experts"),
}


@pytest.mark.parametrize(("change", "reason"), UNKEPT.values(), ids=UNKEPT)
def test_what_rows_cannot_keep_is_dequantised_and_said(change, reason, tmp_path, capsys):
    rewrite(fp8(tmp_path), change)
    logits = greedy(stock(tmp_path, torch.bfloat16), prompt())[1]
    with pytest.warns(UserWarning, match=rf"\({reason}\), so its experts were dequantised, to .* GiB\.$") as warned:
        loaded = load(tmp_path)
    assert len(warned) == 1
    assert torch.equal(greedy(loaded, prompt())[1], logits)
    assert loaded.mobile.store.layout.dtype == torch.bfloat16
    assert main(["plan", str(tmp_path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["host_needed_nbytes"] == loaded.mobile.store.nbytes
    assert planned["checkpoint"]["unkept"] == reason
    assert main(["plan", str(tmp_path)]) == 0
    assert reason in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rows", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_other_rows_are_made_of_the_dequantised_experts(made, kind, rows):
    model = stock(made(kind), torch.bfloat16)
    expected = greedy(mobile.attach(model, "lru", slots=TOP_K, rows=rows), prompt())
    loaded = load(made(kind), rows=rows)
    assert loaded.mobile.store.layout.rows == rows
    assert torch.equal(greedy(loaded, prompt())[1], expected[1])


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "torchao", "hqq", "quark"])
def test_other_methods_are_refused_with_what_to_do(method, tmp_path):
    configure(fp8(tmp_path), quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(mobile.Refused, match=rf"with {method}, which cannot be offloaded; use one in bf16 .*\.$"):
        load(tmp_path)
    assert main(["plan", str(tmp_path)]) == 2
