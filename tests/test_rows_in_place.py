"""Rows of int4-cpu: the numbers of int4, multiplied as they lie, on the processor that they were packed for."""

import pytest
import torch
from conftest import greedy, prompt
from transformers import AutoModelForCausalLM, OlmoeConfig

import mobile
from mobile.kernels import kernel_named, loop, packed
from mobile.store.formats import FORMATS

WIDE = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in bfloat16 whose widths the product in place takes."""
    torch.manual_seed(0)
    config = OlmoeConfig(**WIDE, num_attention_heads=4, vocab_size=97, pad_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def packed_as(rows, weight):
    """A matrix packed into its parts, and the matrix that comes out of them."""
    format = FORMATS[rows]
    parts = {
        part.name: torch.zeros(part.shape, dtype=part.dtype) for part in format.parts(weight.shape, weight.dtype, 1)
    }
    format.pack(weight, parts, 1)
    work, decoded = torch.empty(format.work_nbytes(weight.shape), dtype=torch.uint8), torch.empty_like(weight)
    format.unpack(parts, decoded, 1, work)
    return format, parts, decoded


@pytest.mark.parametrize("shape", [(64, 32), (48, 96), (128, 256)])
def test_its_numbers_are_those_of_int4_bit_for_bit(shape):
    weight = torch.randn(shape).bfloat16()
    weight[0] = 0
    *_, plain = packed_as("int4", weight)
    format, parts, decoded = packed_as("int4-cpu", weight)
    assert torch.equal(decoded, plain)
    x = torch.randn(3, shape[1]).bfloat16()
    exact = x.float() @ decoded.float().T
    assert (format.multiply(x, parts).float() - exact).abs().max() < 1e-2 * exact.abs().max()


def test_poisoned_rows_decode_to_nan_and_multiply_to_nan():
    format, parts, _ = packed_as("int4-cpu", torch.randn(32, 64).bfloat16())
    for part in parts.values():
        part.view(torch.uint8).fill_(0xFF)
    assert format.multiply(torch.ones(1, 64).bfloat16(), parts).isnan().all()


@pytest.mark.parametrize("slots", [2, 16])
def test_a_loaded_model_computes_with_them_in_place_and_stays_near_the_decoded_one(folder, slots, monkeypatch):
    ids = prompt(length=5) % 97
    exact = mobile.load(folder, "lru", slots=slots, rows="int4", link="virtual", device="cpu")
    model = mobile.load(folder, "lru", slots=slots, rows="int4-cpu", link="virtual", device="cpu")
    assert (exact.mobile.plan.kernel, model.mobile.plan.kernel) == (loop, packed)
    monkeypatch.setattr(type(FORMATS["int4-cpu"]), "unpack", lambda *_: pytest.fail("a matrix was decoded"))
    ours, decoded = (each(ids).logits.float() for each in (model, exact))
    assert 0 < (ours - decoded).abs().max() < 3e-2 * decoded.abs().max()
    _, logits = greedy(model, ids)
    assert torch.isfinite(torch.stack(list(logits))).all()


def test_detach_gives_back_the_numbers_that_were_computed_with(folder):
    ids = prompt(length=5) % 97
    model = mobile.load(folder, "lru", slots=4, rows="int4-cpu", link="virtual", device="cpu")
    exact = mobile.load(folder, "lru", slots=4, rows="int4", link="virtual", device="cpu")
    with torch.no_grad():
        assert torch.equal(mobile.detach(model)(ids).logits, mobile.detach(exact)(ids).logits)


def test_a_file_made_for_other_instructions_is_not_read_as_if_made_for_these(folder, tmp_path, monkeypatch):
    options = {"slots": 4, "rows": "int4-cpu", "store": tmp_path / "rows", "device": "cpu"}
    first = mobile.load(folder, "lru", **options)
    made = first.mobile.store.file.path.stat().st_mtime_ns
    del first
    again = mobile.load(folder, "lru", **options)
    assert again.mobile.store.file.path.stat().st_mtime_ns == made
    path = again.mobile.store.file.path
    del again
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    mobile.load(folder, "lru", **options)
    assert path.stat().st_mtime_ns != made


def test_what_the_product_does_not_take_is_refused_in_a_sentence(folder):
    with pytest.raises(mobile.Refused, match=r"bfloat16 matrices .* float32; use int4"):
        mobile.load(folder, "lru", slots=4, rows="int4-cpu", dtype="float32", device="cpu")
    with pytest.raises(mobile.Refused, match="a processor's own order"):
        kernel_named("auto", torch.device("cuda"), torch.bfloat16, "int4-cpu")
    transposed = FORMATS["int4-cpu"]
    with pytest.raises(mobile.Refused, match="transposed; use int4"):
        transposed.parts((64, 64), torch.bfloat16, 0)


def test_the_ledger_counts_the_bytes_of_packed_rows(folder):
    model = mobile.load(folder, "on-demand", slots=4, rows="int4-cpu", link="virtual", device="cpu")
    greedy(model, prompt(length=5) % 97)
    stats, layout = model.mobile.stats(), model.mobile.store.layout
    assert stats["bytes_loaded"] == model.mobile.ledger.counters.loads * layout.nbytes
    weights = 3 * 64 * 32
    assert layout.nbytes == weights // 2 + weights // 32 * 4
