"""The CUDA link: the same tokens as the stock model on the same GPU, in slots that copies really race for.

`python -m pytest tests/gpu` runs on a bare checkout with torch, transformers and pytest. Strategies are named by their
objects, since a package that is not installed has no entry points.
"""

from __future__ import annotations

import time

import pytest
import torch
from conftest import FAMILIES, greedy, prompt
from conftest import tiny as on_cpu
from transformers import AutoModelForCausalLM, OlmoeConfig

import mobile
from baselines.lru import LRU
from baselines.on_demand import ON_DEMAND, ON_DEMAND_OVERLAP
from baselines.resident import RESIDENT
from mobile.biglittle import MOBILE

LOSSLESS = [LRU, ON_DEMAND, ON_DEMAND_OVERLAP, RESIDENT]


def tiny(family: str):
    return on_cpu(family).cuda()


def ids(rows: int = 1) -> torch.Tensor:
    return prompt(rows).cuda()


def wide(layers: int = 4, dtype: torch.dtype = torch.bfloat16):
    """Rows of 6 MB, so that a copy takes longer than launching it."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, num_experts=32, num_experts_per_tok=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().cuda()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("strategy", LOSSLESS, ids=lambda s: s.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_strategies_equal_the_stock_model_bit_for_bit(family, strategy):
    model = tiny(family)
    tokens, logits = greedy(model, ids())
    for slots in (4, 9, 24):
        if strategy is RESIDENT and slots < 24:
            continue
        mobile.attach(model, strategy, slots=slots, poison=True)
        assert type(model.mobile.link).__name__ == "StreamLink"
        ours = greedy(model, ids())
        mobile.detach(model)
        assert torch.equal(ours[0], tokens), slots
        assert torch.equal(ours[1], logits), slots


@pytest.mark.parametrize("family", FAMILIES)
def test_always_falling_back_equals_the_stock_model(family):
    model = tiny(family)
    expected = greedy(model, ids())
    mobile.attach(model, MOBILE, slots=8, gamma=1.1, poison=True)
    ours = greedy(model, ids())
    assert torch.equal(ours[1], expected[1])
    assert model.mobile.stats()["fallbacks"] == 9


@pytest.mark.parametrize("link_gb_per_s", [None, 1.0])
@pytest.mark.parametrize("slots", [8, 12, 40])
def test_real_copies_that_race_with_compute_change_no_token(slots, link_gb_per_s):
    """Large rows, evictions at every step, prefetches that are cancelled and promoted, a link slow enough to lose."""
    model = wide()
    expected = greedy(model, ids(), 24)
    for strategy, gamma in ((LRU, None), (ON_DEMAND_OVERLAP, None), (MOBILE, 1.1)):
        mobile.attach(model, strategy, slots=slots, gamma=gamma, link_gb_per_s=link_gb_per_s, poison=True)
        ours = greedy(model, ids(), 24)
        stats = model.mobile.stats()
        mobile.detach(model)
        assert torch.equal(ours[0], expected[0]), strategy.name
        assert torch.equal(ours[1], expected[1]), strategy.name
        assert stats["loads"] > 0
        assert stats["stall_seconds"] > 0


def test_a_fallback_in_between_gives_the_virtual_links_tokens():
    model = wide()
    results = []
    for link in ("virtual", "cuda"):
        mobile.attach(model, MOBILE, slots=40, gamma=0.02, link=link)
        results.append((greedy(model, ids(), 24)[0].tolist(), model.mobile.stats()["fallbacks"]))
        mobile.detach(model)
    assert results[0] == results[1]


def test_the_store_is_registered_where_it_lies_and_given_back():
    model = mobile.attach(wide(), LRU, slots=40)
    rows = model.mobile.store.rows
    assert all(layer.is_pinned() for layer in rows)
    kept = rows[0]
    mobile.detach(model)
    assert not kept.is_pinned()


def test_no_device_memory_is_taken_after_the_first_tokens():
    model = mobile.attach(wide(), LRU, slots=40)
    greedy(model, ids(), 32)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    greedy(model, ids(), 32)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_no_more_than_two_copies_are_ever_begun():
    model = mobile.attach(wide(), LRU, slots=40, link_gb_per_s=2.0)
    link, seen = model.mobile.link, []
    begin = link.channel.begin
    link.channel.begin = lambda key, slot: (seen.append(len(link._begun)), begin(key, slot))
    greedy(model, ids(), 8)
    assert seen
    assert max(seen) <= 1, "a copy was begun behind two others"


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_throttled_link_is_as_slow_as_asked(share):
    model = mobile.attach(wide(), ON_DEMAND_OVERLAP, slots=8)
    native = model.mobile.link.channel.native_gb_per_s
    mobile.detach(model)
    mobile.attach(model, ON_DEMAND_OVERLAP, slots=8, link_gb_per_s=share * native)
    link, engine = model.mobile.link, model.mobile
    begun = time.perf_counter()
    for number in range(64):
        link.submit((number % 4, number % 32), number % 8, demand=True)
        link.channel.finish(number % 8)
    taken = time.perf_counter() - begun
    moved = 64 * engine.store.layout.nbytes / 1e9
    assert moved / taken == pytest.approx(share * native, rel=0.15)


def test_a_faster_link_than_there_is_is_refused():
    with pytest.raises(mobile.Refused, match="cannot be throttled"):
        mobile.attach(wide(layers=1), LRU, slots=8, link_gb_per_s=10_000)


def test_memory_caps_the_process():
    model = wide(layers=1)
    try:
        mobile.attach(model, LRU, memory="3GiB")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_exception_in_a_step_leaves_the_model_usable():
    model = wide()
    expected = greedy(model, ids(), 12)
    mobile.attach(model, MOBILE, slots=12, gamma=1.1, poison=True)
    run, calls = model.mobile.run_experts, 0

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return run(*arguments)

    model.mobile.run_experts = failing
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids(), 12)
    assert torch.equal(greedy(model, ids(), 12)[1], expected[1])


def test_a_checkpoint_loads_onto_the_gpu(tmp_path):
    model = wide(layers=2)
    expected = greedy(model, ids())
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    loaded = mobile.load(tmp_path, LRU, slots=40)
    assert loaded.device.type == "cuda"
    assert loaded.mobile.link.channel.native_gb_per_s > 1
    assert torch.equal(greedy(loaded, ids())[1], expected[1])


def test_the_ledger_knows_when_each_copy_ran():
    model = mobile.attach(wide(), LRU, slots=40)
    greedy(model, ids(), 8)
    loads = [event for event in model.mobile.ledger.events if event.what == "load"]
    assert len(loads) == model.mobile.stats()["loads"]
    nbytes = model.mobile.store.layout.nbytes
    speeds = sorted(nbytes / (event.end_ns - event.start_ns) for event in loads)
    assert 0.3 < speeds[len(speeds) // 2] / model.mobile.link.channel.native_gb_per_s < 1.7
