"""Every kernel equals the reference within its stated tolerance, and depends on nothing but its inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import greedy, prompt
from families import FAMILIES, tiny

import mobile
from mobile.kernels import group, kernel_named, loop
from mobile.kernels.grouped import GROUPS, _windows, grouped
from mobile.kernels.sum_dtype import sum_dtype
from mobile.live_model import compat
from mobile.store import layout_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest output
LAYOUTS = {
    "gated": "qwen2_moe",
    "transposed, biased": "gpt_oss",
    "ungated": "nemotron_h",
    "transposed": "aria",
    "normed": "muse_spark",
}
LAYOUTS = {layout: family for layout, family in LAYOUTS.items() if family in FAMILIES}
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in a process that interprets Triton: the test below"
)


def case(family: str, dtype: torch.dtype, tokens: int, seed: int = 0) -> tuple:
    """One layer of a tiny model, its experts in slots in another order, some slots empty and poisoned."""
    model = tiny(family).to(dtype)
    experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    weights = {name: getattr(experts, name) for name in compat.weight_names(experts)}
    layout = layout_of(weights)
    rows = torch.full((13, layout.numel), float("nan"), dtype=dtype)
    slots = [11, 2, 7, 0, 12, 5, 9, 3]
    views = layout.views(rows)
    for name, weight in weights.items():
        views[name][slots] = weight.data
    generator = torch.Generator().manual_seed(seed)
    width = weights["down_proj"].shape[2 if experts.is_transposed else 1]
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(tokens)])
    scores = torch.rand(tokens, 4, generator=generator).to(dtype)
    groups = group(index, 8)
    waves = [[(position, slots[expert])] for position, expert in enumerate(groups.experts)]
    return experts, hidden, index, scores, groups, waves, views


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((result - expected).abs().max() <= TOLERANCE[expected.dtype] * expected.abs().max())


@pytest.mark.parametrize(("dtype", "scored"), [(each, torch.float32) for each in TOLERANCE] + [(torch.bfloat16,) * 2])
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loop_is_the_stock_experts_bit_for_bit(layout, tokens, dtype, scored):
    experts, hidden, index, scores, groups, waves, views = case(LAYOUTS[layout], dtype, tokens)
    scores = scores.to(scored)
    expected = experts(hidden, index, scores)
    assert torch.equal(loop(experts, hidden, scores, groups, waves, views), expected.to(dtype))
    backwards = loop(experts, hidden, scores, groups, waves[::-1], views)
    assert torch.equal(backwards, expected.to(dtype)), "the order of the waves shows"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_token_that_chose_an_expert_twice_is_the_stock_experts_bit_for_bit(layout, dtype):
    experts, hidden, _, scores, _, _, views = case(LAYOUTS[layout], dtype, 1)
    index, slots = torch.tensor([[5, 2, 5, 1]]), [11, 2, 7, 0, 12, 5, 9, 3]
    groups = group(index, 8)
    waves = [[(position, slots[expert])] for position, expert in enumerate(groups.experts)]
    expected = experts(hidden, index, scores)
    assert torch.equal(loop(experts, hidden, scores, groups, waves[::-1], views), expected.to(dtype))


def test_a_class_whose_forward_cannot_be_tried_is_taken_to_sum_as_most_do():
    experts = case("nemotron_h", torch.bfloat16, 1)[0]

    class Picky(type(experts)):
        def forward(self, hidden, index, weights):
            raise ValueError("this forward knows one width only")

    assert sum_dtype(experts, torch.bfloat16, torch.float32) == torch.float32
    experts.__class__ = Picky
    assert sum_dtype(experts, torch.bfloat16, torch.float32) == torch.bfloat16


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_grouped_product_is_the_loop_up_to_rounding(layout, tokens, dtype):
    experts, hidden, _, scores, groups, waves, views = case(LAYOUTS[layout], dtype, tokens)
    pairs = [pair for wave in waves for pair in wave]
    for some in (waves, [pairs], [pairs[:2], pairs[2:]]):
        result = grouped(experts, hidden, scores, groups, some, views)
        assert close(result, loop(experts, hidden, scores, groups, some, views))


def test_a_wave_over_more_slots_than_one_product_takes_is_cut():
    wave = [(0, 3), (1, 2 * GROUPS + 5), (2, GROUPS - 1), (3, GROUPS + 3)]
    windows = _windows(wave)
    assert sorted(pair for window in windows for pair in window) == sorted(wave)
    assert all(window[-1][1] - window[0][1] < GROUPS for window in windows)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_decode_kernel_is_the_loop_up_to_rounding(layout, tokens, dtype):
    from mobile.kernels.triton_gemv import triton_gemv

    experts, hidden, _, scores, groups, waves, views = case(LAYOUTS[layout], dtype, tokens)
    whole = [[pair for wave in waves for pair in wave]]
    expected = loop(experts, hidden, scores, groups, waves, views)
    results = [triton_gemv(experts, hidden, scores, groups, some, views) for some in (waves, whole, waves[::-1])]
    assert all(close(result, expected) for result in results)
    assert all(torch.equal(result, results[0]) for result in results), "what was resident shows in the output"


@interpreted
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_model_on_the_decode_kernel_writes_the_same_tokens(family):
    model, ids = tiny(family), prompt()
    expected = greedy(model, ids, 4)
    mobile.attach(model, "mobile", slots=6, gamma=1.1, kernel="triton", poison=True)
    tokens, logits = greedy(model, ids, 4)
    assert torch.equal(tokens, expected[0])
    assert torch.allclose(logits, expected[1], atol=1e-3)


def test_the_decode_kernel_under_tritons_interpreter():
    """Triton runs on a CPU only if interpreted, which must be said before it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", Path(__file__), "-q", "-k", "decode_kernel_is or on_the_decode_kernel"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


def test_a_model_on_the_grouped_kernel_writes_the_same_tokens(family):
    from conftest import tiny as plain

    model, ids = plain(family), prompt()
    expected = greedy(model, ids)
    mobile.attach(model, "mobile", slots=6, gamma=1.1, kernel="grouped", poison=True)
    tokens, logits = greedy(model, ids)
    assert torch.equal(tokens, expected[0])
    assert torch.allclose(logits, expected[1], atol=1e-3)


def test_a_kernel_nobody_knows_is_refused():
    with pytest.raises(mobile.Refused, match="choose auto, loop, grouped or triton"):
        kernel_named("magic", torch.device("cpu"), torch.float32)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, it runs anywhere")
def test_a_kernel_that_cannot_run_on_the_device_is_refused_and_nothing_is_changed():
    pytest.importorskip("triton")
    model, ids = tiny("olmoe"), prompt()
    expected = greedy(model, ids)
    with pytest.raises(mobile.Refused, match=r"Kernel triton cannot run on cpu: .*; use the kernel loop\.$"):
        mobile.attach(model, "lru", slots=6, kernel="triton")
    assert not hasattr(model, "mobile")
    assert torch.equal(greedy(model, ids)[1], expected[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a driver")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, it needs none")
def test_the_decode_kernel_is_refused_on_a_gpu_where_triton_finds_no_driver():
    pytest.importorskip("triton")
    with pytest.raises(mobile.Refused, match=r"cannot run on cuda:0: Triton has no working driver \(.*\); use"):
        kernel_named("triton", torch.device("cuda:0"), torch.bfloat16)
