"""The kernels as compiled for the GPU, against the loop on the same GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import greedy
from test_cuda_link import ids, wide

import mobile
from baselines.lru import LRU
from mobile.kernels import group, kernel_named, loop
from mobile.store import layout_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def kernel_or_skip(name: str, dtype: torch.dtype):
    try:
        return kernel_named(name, torch.device("cuda"), dtype)
    except mobile.Refused as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("name", ["grouped", "triton"])
def test_a_kernel_is_the_loop_up_to_rounding(name, tokens, dtype):
    kernel = kernel_or_skip(name, dtype)
    experts = next(module for module in wide(1, dtype).modules() if hasattr(module, "is_transposed"))
    weights = dict(experts.named_parameters())
    layout = layout_of(weights)
    rows = torch.full((40, layout.numel), float("nan"), dtype=dtype, device="cuda")
    views, slots = layout.views(rows), list(range(39, 7, -1))
    for label, weight in weights.items():
        views[label][slots] = weight.data
    torch.manual_seed(1)
    hidden = torch.randn(tokens, 1024, device="cuda", dtype=dtype)
    index = torch.stack([torch.randperm(32, device="cuda")[:8] for _ in range(tokens)])
    scores = torch.rand(tokens, 8, device="cuda", dtype=dtype)
    groups = group(index, 32)
    pairs = [(position, slots[expert]) for position, expert in enumerate(groups.experts)]
    previous = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        expected = loop(experts, hidden, scores, groups, [pairs], views)
        for waves in ([pairs], [[pair] for pair in pairs], [pairs[5:], pairs[:5]]):
            result = kernel(experts, hidden, scores, groups, waves, views)
            assert (result - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = previous


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_decode_kernel_runs_on_the_card_of_its_arguments_while_another_is_current():
    kernel_or_skip("triton", torch.bfloat16)
    model, asked = wide().to("cuda:1"), ids().to("cuda:1")
    reference = greedy(model, asked, 12)
    mobile.attach(model, LRU, slots=40, kernel="triton", poison=True)
    ours = greedy(model, asked, 12)
    assert (ours[1][0] - reference[1][0]).abs().max() <= 5e-2 * reference[1][0].abs().max()
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("slots", [12, 40, 128])
def test_a_model_on_the_decode_kernel_gives_the_same_logits_whatever_is_resident(slots):
    kernel_or_skip("triton", torch.bfloat16)
    model = wide()
    reference = greedy(model, ids(), 12)
    results = []
    for size in (slots, 128):
        mobile.attach(model, LRU, slots=size, kernel="triton", poison=True)
        results.append(greedy(model, ids(), 12)[1])
        mobile.detach(model)
    assert torch.equal(results[0], results[1])
    assert (results[0][0] - reference[1][0]).abs().max() <= 5e-2 * reference[1][0].abs().max()
