"""Invariant 1 with quantised rows: a stock model whose experts went through the same quantisation, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt
from families import FAMILIES, tiny
from transformers import AutoModelForCausalLM, OlmoeConfig

import mobile
from mobile.kernels import group, loop, packed
from mobile.live_model import compat
from mobile.runtime.engine import Engine
from mobile.store import ExpertLayout, PackedWeights, unpacked

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "suites/models/olmoe-tiny"
PACKED = ["int8", "int4"]
LAYOUTS = {
    "gated": "qwen2_moe",
    "transposed, biased": "gpt_oss",
    "ungated": "nemotron_h",
    "shared experts": "deepseek_v2",
    "normed": "muse_spark",
}
LAYOUTS = {layout: family for layout, family in LAYOUTS.items() if family in FAMILIES}
LOSSLESS = [
    strategy.name for strategy in mobile.strategies().values() if strategy.lossless and not strategy.needs_future
]


def packed_rows(model, rows: str) -> list[dict[str, torch.Tensor | PackedWeights]]:
    """Each layer's experts, packed into rows of their own."""
    layers = compat.moe_layers(model)
    layout = compat.packed_layout(compat.common_layout(layers), layers, rows)
    made = [layout.views(torch.zeros(layer.count, layout.numel, dtype=torch.uint8)) for layer in layers]
    for layer, views in zip(layers, made, strict=True):
        for name, weights in views.items():
            weights.copy_(getattr(layer.experts, name).data)
    return made


def quantised(model, rows: str):
    """The stock model with each of its experts' matrices packed and decoded."""
    for layer, views in zip(compat.moe_layers(model), packed_rows(model, rows), strict=True):
        for name, weights in views.items():
            getattr(layer.experts, name).data.copy_(unpacked(weights))
    return model


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_logits_equal_the_stock_model_with_the_same_quantisation(layout, rows, store, tmp_path):
    """Every lossless strategy, MoBiLE at a gamma that always falls back, the smallest pool and one of half the experts.

    Slots are poisoned when they are emptied, and the ledger's bytes are those of packed rows.
    """
    model, ids = tiny(LAYOUTS[layout]), prompt()
    model.set_experts_implementation("eager")
    stock = quantised(tiny(LAYOUTS[layout]), rows)
    stock.set_experts_implementation("eager")
    with torch.no_grad():
        prefill = stock(ids).logits
        as_it_was = model(ids).logits
    assert not torch.equal(prefill, as_it_was)
    sequences, logits = greedy(stock, ids)
    top_k = compat.moe_layers(model)[0].top_k
    for strategy in [*LOSSLESS, "mobile"]:
        if strategy == "resident" or (strategy, store) == ("cpu-hybrid", "disk"):
            continue
        if mobile.strategies()[strategy].quasi and layout in ("ungated", "normed"):
            continue  # refused: experts of another width than the layers around them
        for slots in (top_k, 12):
            mobile.attach(
                model,
                strategy,
                slots=slots,
                gamma=1.1 if strategy == "mobile" else None,
                rows=rows,
                store=tmp_path if store == "disk" else None,
                poison=True,
            )
            with torch.no_grad():
                assert torch.equal(model(ids).logits, prefill), strategy
            written, behind = greedy(model, ids)
            stats, row = model.mobile.stats(), model.mobile.store.layout
            mobile.detach(model)
            assert torch.equal(written, sequences), strategy
            assert torch.equal(behind, logits), strategy
            assert stats["bytes_loaded"] == stats["loads"] * row.nbytes > 0
            assert row.rows == rows
    with torch.no_grad():
        assert torch.equal(model(ids).logits, as_it_was)


@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_holds_within_other_dtypes(rows, dtype):
    for family in ("olmoe", "gpt_oss"):
        model, stock = tiny(family).to(dtype), quantised(tiny(family).to(dtype), rows)
        for each in (model, stock):
            each.set_experts_implementation("eager")
        expected = greedy(stock, prompt())
        mobile.attach(model, "lru", slots=6, rows=rows, poison=True)
        written = greedy(model, prompt())
        assert all(map(torch.equal, written, expected))


@pytest.mark.parametrize("rows", PACKED)
def test_poison_is_seen_in_packed_slots_that_are_emptied_too_early(rows, monkeypatch):
    """The tests above can fail: an engine that copies nothing computes with the poison."""
    monkeypatch.setattr(Engine, "fill", lambda self, key, slot: None)
    model = mobile.attach(tiny("olmoe"), "lru", slots=8, rows=rows, poison=True)
    assert model(prompt()).logits.isnan().any()


@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_attach_keeps_the_originals_so_that_detach_gives_back_every_bit(rows, store, tmp_path):
    model = tiny("olmoe")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = tmp_path if store == "disk" else None
    mobile.attach(model, "mobile", slots=8, rows=rows, store=folder)
    model(prompt())
    mobile.detach(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_an_attach_that_is_broken_off_while_it_packs_leaves_the_model_as_it_was(store, tmp_path, monkeypatch):
    model, ids = tiny("olmoe"), prompt()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    packs = []

    def interrupted(self, row, weight) -> None:
        packs.append(row)
        if len(packs) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(PackedWeights, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mobile.attach(model, "lru", slots=8, rows="int8", store=tmp_path if store == "disk" else None)
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert not hasattr(model, "mobile")
    assert not list(tmp_path.iterdir())
    model(ids)


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("link", ["virtual", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_quantised_as_it_is_read(rows, link, dtype, tmp_path):
    stock = quantised(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, experts_implementation="eager").eval(), rows
    )
    ids = torch.arange(3, 19)[None]
    where = {"link": link, "store": tmp_path} if link == "disk" else {"link": link}
    for time in range(2):  # with a disk, the second reads the file of the first
        model = mobile.load(MODEL, "lru", slots=64, dtype=dtype, rows=rows, progress=False, **where)
        assert all(map(torch.equal, greedy(model, ids, 6), greedy(stock, ids, 6))), time
        assert model.mobile.stats()["bytes_loaded"] == model.mobile.stats()["loads"] * model.mobile.store.layout.nbytes
        mobile.detach(model)
        weights = model.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in stock.state_dict().items())


def test_experts_that_a_file_holds_stacked_and_those_that_transformers_converts_are_packed_the_same(
    tmp_path, monkeypatch
):
    """Stacked in the file and transposed (gpt-oss in bf16), and through Transformers' conversions."""
    tiny("gpt_oss").bfloat16().save_pretrained(tmp_path / "stacked")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked", experts_implementation="eager").eval()
    quantised(stock, "int4")
    expected = greedy(stock, prompt())
    loaded = mobile.load(tmp_path / "stacked", "lru", slots=8, rows="int4", device="cpu", progress=False)
    assert all(map(torch.equal, greedy(loaded, prompt()), expected))
    from mobile.checkpoints import loading

    monkeypatch.setattr(loading, "plan_readings", lambda *_: None)
    loaded = mobile.load(tmp_path / "stacked", "lru", slots=8, rows="int4", device="cpu", progress=False)
    assert all(map(torch.equal, greedy(loaded, prompt()), expected))


def test_files_of_every_format_lie_beside_each_other(tmp_path):
    sizes = set()
    for rows in ("as-is", *PACKED):
        before = set(tmp_path.iterdir())
        mobile.load(MODEL, "lru", slots=64, link="disk", store=tmp_path, rows=rows, progress=False)
        [path] = set(tmp_path.iterdir()) - before
        sizes.add(path.stat().st_size)
    assert min(sizes) < 0.7 * max(sizes)  # a row of this small model takes one page more or less


def test_a_damaged_packed_row_is_refused(tmp_path):
    options = {"slots": 64, "link": "disk", "store": tmp_path, "rows": "int8", "progress": False}
    mobile.load(MODEL, "lru", **options)
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(mobile.Refused, match="damaged in layer 3, expert 63"):
        mobile.load(MODEL, "resident", **{**options, "slots": None})


MEASURE = """
import sys, threading, time
import torch, mobile, mobile.checkpoints.loading
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
model = mobile.load(sys.argv[1], "lru", slots=16, device="cpu", rows=sys.argv[2], progress=False)
done.set(); watcher.join()
print(peak - before, model.mobile.store.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("rows", PACKED)
def test_host_memory_peaks_at_the_packed_rows_and_a_layer(tmp_path, rows):
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 256}
    config = OlmoeConfig(**sizes, num_attention_heads=4, num_experts=32, num_experts_per_tok=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    dense = sum(w.nbytes for name, w in model.named_parameters() if ".experts." not in name)
    layer = compat.common_layout(compat.moe_layers(model)).nbytes * 32
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), rows], capture_output=True, text=True, check=True
    )
    peak, store = map(int, done.stdout.split())
    assert store < (0.55 if rows == "int8" else 0.3) * 8 * layer
    assert peak < store + dense + 1.5 * layer, f"{peak / 1e6:.0f} MB, of which the store has {store / 1e6:.0f}"


# --- kernels ----------------------------------------------------------------------------------------


def case(tokens: int, width: int = 32, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """A layer in int8, its experts in slots as they are numbered, and tokens for it."""
    model = tiny("olmoe", intermediate_size=width).to(dtype)
    [views, *_], [layer, *_] = packed_rows(model, "int8"), compat.moe_layers(model)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(tokens)])
    groups = group(index, 8)
    waves = [[(position, expert)] for position, expert in enumerate(groups.experts)]
    return layer.experts, hidden, torch.rand(tokens, 4, generator=generator).to(dtype), groups, waves, views


@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_products_in_place_are_those_of_decoded_weights_up_to_rounding(tokens, monkeypatch):
    given = case(tokens)
    expected = loop(*given)
    decoded = []
    monkeypatch.setattr(PackedWeights, "__getitem__", lambda *_: decoded.append(1))
    if tokens < 80:
        result = packed(*given)
        assert not torch.equal(result, expected)
        assert (result - expected).abs().max() <= 1e-2 * expected.abs().max()
        assert not decoded
    monkeypatch.undo()
    if tokens == 80:  # more than a few a matrix: decoded, so equal
        assert torch.equal(packed(*given), expected)


def test_matrices_whose_inputs_the_product_in_place_cannot_take_are_decoded():
    """PyTorch's product reads 16 inputs at once, past the end of a matrix of 24: it crashed, or was infinite."""
    given = case(1, width=24)
    expected = loop(*given)
    assert (packed(*given) - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_the_kernel_packed_runs_a_model_and_is_refused_where_it_is_none():
    model = tiny("olmoe").bfloat16()
    mobile.attach(model, "cpu-hybrid", slots=4, rows="int8", kernel="packed", poison=True)
    assert not greedy(model, prompt())[1].isnan().any()
    mobile.detach(model)
    with pytest.raises(mobile.Refused, match="and rows are int4 and not int8 or int4-cpu; use the kernel loop"):
        mobile.attach(model, "lru", slots=4, rows="int4", kernel="packed")
    with pytest.raises(mobile.Refused, match="and rows are as-is and not int8"):
        mobile.attach(model, "lru", slots=4, kernel="packed")
    with pytest.raises(mobile.Refused, match="in bfloat16 only, and weights are float32"):
        mobile.attach(tiny("olmoe"), "lru", slots=4, rows="int8", kernel="packed")
    with pytest.raises(mobile.Refused, match="Kernel grouped reads weights as they are, and rows are int8"):
        mobile.attach(model, "lru", slots=4, rows="int8", kernel="grouped")
    with pytest.raises(mobile.Refused, match="Unknown row format 'int9'; did you mean int8"):
        mobile.attach(model, "lru", slots=4, rows="int9")
    assert not hasattr(model, "mobile")


def test_a_strategy_that_asks_the_next_layers_router_ahead_works_with_packed_rows():
    """Mean outputs of the quasi-hidden state come from experts in the store."""
    model = mobile.attach(tiny("qwen3_moe"), "speculating-experts", slots=8, rows="int4", poison=True)
    assert not greedy(model, prompt())[1].isnan().any()


def test_a_larger_pool_fits_the_same_memory():
    """Budgets are divided by the packed rows."""
    pools = {}
    for rows in ("as-is", "int8", "int4"):
        model = mobile.attach(tiny("olmoe"), "lru", memory="3GiB", geometry=None, rows=rows, hardware="rtx4080-pcie4")
        layout: ExpertLayout = model.mobile.store.layout
        assert model.mobile.geometry.expert_nbytes == layout.nbytes
        pools[rows] = layout.nbytes
    assert pools["int4"] < pools["int8"] < pools["as-is"]


def test_the_commands_take_rows(tmp_path):
    """`trace` and `plan`, and a trace of small rows replayed as a real model with smaller ones."""

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mobile", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    (tmp_path / "prompts").write_text("Q: not True is\n")
    file = str(tmp_path / "t.npz")
    words = ["--prompts", str(tmp_path / "prompts"), "--out", file, "--slots", "64", "--max-new-tokens", "6"]
    assert run("trace", str(MODEL), *words, "--rows", "int8").returncode == 0
    replayed = run("replay", file, "--geometry", "olmoe-1b-7b", "--rows", "int4", "--slots", "64", "--json")
    sizes = json.loads(replayed.stdout)["geometry"]
    assert (sizes["rows"], sizes["expert_nbytes"]) == ("int4", 3 * 2048 * 1024 * 9 // 16)
    assert "lie in int8 already" in run("replay", file, "--rows", "int4").stderr
    plans = [
        json.loads(run("plan", "qwen3-30b-a3b", "--memory", "12GiB", "--rows", rows, "--json").stdout)
        for rows in ("as-is", "int4")
    ]
    assert plans[1]["slots"] > 3.5 * plans[0]["slots"]
    assert plans[1]["host_needed_nbytes"] * 32 == plans[0]["host_needed_nbytes"] * 9
    assert "did you mean int8" in run("plan", "qwen3-30b-a3b", "--rows", "int88").stderr
