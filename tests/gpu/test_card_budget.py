"""Budgets, caps and refusals on a real card: what is free there, the KV cache of stated tokens, out of memory."""

from __future__ import annotations

import gc
import os
import warnings

import pytest
import torch
from conftest import greedy
from test_cuda_link import CUDA, ids, wide

import mobile
from baselines.lru import LRU
from baselines.resident import RESIDENT
from mobile.costs.memory import CONTEXT_NBYTES
from mobile.live_model import compat
from mobile.runtime.device_memory import card_memory
from mobile.runtime.kv_cache import kv_cache

GIB, MIB = 2**30, 2**20


@pytest.fixture(autouse=True)
def no_cap_is_left():
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


def on_card(layers: int = 8):
    with CUDA:
        return wide(layers)


def test_the_default_budget_is_what_is_free_now():
    model = on_card()
    taken = torch.empty(2 * GIB, dtype=torch.uint8, device=CUDA)
    card = card_memory(CUDA, model)
    assert card.other_nbytes >= taken.nbytes
    assert card.model_nbytes == sum(weight.nbytes for weight in model.parameters())
    assert card.available_nbytes <= card.total_nbytes - 2 * GIB
    mobile.attach(model, LRU)
    assert model.mobile.plan.division.memory_nbytes <= card.total_nbytes - 2 * GIB
    mobile.detach(model)


def test_the_context_is_not_much_larger_than_is_assumed():
    """Only where nobody else uses the card does what is neither free nor PyTorch's belong to this process."""
    torch.zeros(1, device=CUDA)
    free, total = torch.cuda.mem_get_info(CUDA)
    context = total - free - torch.cuda.memory_reserved(CUDA)
    if context > 2 * GIB:
        pytest.skip("somebody else uses this card")
    warnings.warn(
        f"context: {context / MIB:.0f} MiB, counted as {min(context, CONTEXT_NBYTES) / MIB:.0f}", stacklevel=1
    )
    assert context <= CONTEXT_NBYTES + 256 * MIB


def test_a_budget_is_about_what_the_driver_shows_of_this_process():
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    model = on_card()
    mobile.attach(model, LRU, memory="2GiB")
    greedy(model, ids(), 64)
    properties = torch.cuda.get_device_properties(CUDA)
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}".encode())
    shown = [
        one.usedGpuMemory
        for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if one.pid == os.getpid() and one.usedGpuMemory
    ]
    mobile.detach(model)
    if not shown:
        pytest.skip("the driver does not tell of this process, as in a container")
    assert shown[0] <= 2 * GIB + 128 * MIB


def test_more_than_is_free_is_refused_and_the_nominal_size_is_not():
    model = on_card(2)
    total = torch.cuda.mem_get_info(CUDA)[1]
    with pytest.raises(mobile.Refused, match=r"more than the .* that can be had"):
        mobile.attach(model, LRU, memory=2 * total)
    with pytest.warns(RuntimeWarning, match=r"can be had: that is what a budget"):
        mobile.attach(model, LRU, memory=int(total * 1.02))
    mobile.detach(model)


def test_the_cache_that_is_counted_is_the_one_that_is_kept_and_fits_beside_the_slots():
    model = on_card()
    counted = kv_cache(model, compat.moe_layers(model))
    mobile.attach(model, LRU, memory="3GiB", context_tokens=2048)
    prompt = torch.randint(512, (1, 2000), device=CUDA)
    with torch.no_grad():
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == counted.nbytes(2000)
    del cache
    out = model.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert out.shape == (1, 2040)
    assert torch.cuda.max_memory_reserved(CUDA) > 0
    mobile.detach(model)


def test_a_step_without_memory_says_what_to_do_and_the_next_one_is_whole():
    model = on_card(2)
    expected = greedy(model, ids(), 12)
    mobile.attach(model, LRU, memory="1.25GiB", context_tokens=64)
    with pytest.raises(torch.OutOfMemoryError) as caught, torch.no_grad():
        model(torch.randint(512, (64, 16_000), device=CUDA), use_cache=True)
    assert "larger context_tokens or fewer slots" in "".join(caught.value.__notes__)
    gc.collect()
    assert torch.equal(greedy(model, ids(), 12)[1], expected[1])
    mobile.detach(model)


def test_slots_that_do_not_fit_are_refused_and_the_model_is_on_the_card_as_it_was():
    """A card that is full but for a few MB: the slots need two experts more than the model's leave."""
    model = on_card()
    expected, before = greedy(model, ids(), 12), torch.cuda.memory_allocated(CUDA)
    torch.cuda.empty_cache()
    rest = torch.empty(torch.cuda.mem_get_info(CUDA)[0] - 6 * MIB, dtype=torch.uint8, device=CUDA)
    with pytest.raises(mobile.Refused, match=r"give fewer slots"):
        mobile.attach(model, RESIDENT)
    del rest
    torch.cuda.empty_cache()
    assert torch.equal(greedy(model, ids(), 12)[1], expected[1])
    assert torch.cuda.memory_allocated(CUDA) <= before + MIB
    assert torch.cuda.get_per_process_memory_fraction(CUDA) == 1.0
