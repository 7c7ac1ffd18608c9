"""The division of a budget: what its parts are, and that they add up. The KV cache against Transformers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mobile.costs.geometry import GEOMETRIES, Geometry, slots_for
from mobile.costs.memory import (
    CONTEXT_NBYTES,
    CONTEXT_TOKENS,
    WORKSPACE_NBYTES,
    KvCache,
    KvLayer,
    Reserve,
    divide,
    prefill_nbytes,
    reserve_for,
)
from mobile.errors import Refused

GIB = 2**30
OLMOE = GEOMETRIES["olmoe-1b-7b"]


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("olmoe-1b-7b", 16 * 2 * 16 * 128 * 2),  # layers, keys and values, KV heads, head dimension, bytes of bf16
        ("qwen1.5-moe-a2.7b", 24 * 2 * 16 * 128 * 2),
        ("deepseek-v2-lite", 27 * (512 + 64) * 2),  # the latent and the rotated key, in the dense first layer, too
        ("qwen3-30b-a3b", 48 * 2 * 4 * 128 * 2),
    ],
)
def test_a_published_models_cache_takes_keys_and_values_of_every_layer(name, nbytes):
    geometry = GEOMETRIES[name]
    assert geometry.kv_nbytes_per_token == nbytes
    assert nbytes <= KvCache.of(geometry).nbytes(1) < nbytes + geometry.moe_layers


def test_records_without_the_cache_still_read_and_are_of_the_same_model():
    record = OLMOE.as_record()
    assert record.pop("kv_nbytes_per_token") == 131072
    earlier = Geometry.from_record(record)
    assert earlier == OLMOE
    assert "kv_nbytes_per_token" not in earlier.as_record()
    with pytest.raises(Refused, match="KV cache of olmoe-1b-7b"):
        KvCache.of(earlier)


def test_appending_to_a_cache_holds_one_layer_twice():
    cache = KvCache((KvLayer(100), KvLayer(40), KvLayer(0, fixed_nbytes=7)))
    assert [cache.nbytes(tokens) for tokens in (0, 1, 50)] == [7, 147, 7007]
    assert cache.peak_nbytes(50) == 7007 + 5000
    assert KvCache(()).peak_nbytes(50) == 0


def test_the_parts_of_a_budget_add_up_to_it():
    reserve = reserve_for(OLMOE, KvCache.of(OLMOE), 2000)
    division = divide(OLMOE, 8 * GIB, reserve, 2)
    assert reserve.context_nbytes == CONTEXT_NBYTES
    assert reserve.workspace_nbytes == WORKSPACE_NBYTES + prefill_nbytes(OLMOE, 2000) + OLMOE.expert_nbytes
    assert reserve.cache_nbytes == 2000 * 131072 * 17 // 16
    assert division.used_nbytes == OLMOE.resident_nbytes + reserve.nbytes + (division.slots + 2) * OLMOE.expert_nbytes
    assert division.used_nbytes <= 8 * GIB < division.used_nbytes + OLMOE.expert_nbytes


def test_more_tokens_leave_fewer_slots():
    slots = [
        divide(OLMOE, 8 * GIB, reserve_for(OLMOE, KvCache.of(OLMOE), tokens), 2).slots
        for tokens in (1, CONTEXT_TOKENS, 4 * CONTEXT_TOKENS)
    ]
    assert slots == sorted(set(slots), reverse=True)


def test_a_profiles_reserve_stands_as_it_is():
    division = divide(OLMOE, 8 * GIB, Reserve.of_profile(GIB), 2)
    assert division.slots == slots_for(OLMOE, 8 * GIB, GIB, 2)
    assert (division.reserve.nbytes, division.reserve.context_tokens) == (GIB, None)


def test_a_budget_that_is_too_small_is_refused_with_the_tokens_that_were_counted():
    with pytest.raises(Refused, match=r"\(of it 544 for the KV cache of 4,096 tokens\).* need 2,\d\d\d MiB"):
        divide(OLMOE, GIB, reserve_for(OLMOE, KvCache.of(OLMOE)), 2)
    with pytest.raises(Refused, match="cannot hold olmoe-1b-7b: its dense weights, the reserve of 1,024 MiB and 8"):
        divide(OLMOE, GIB, Reserve.of_profile(GIB), 2)


@pytest.mark.parametrize("tokens", [0, -1, True, 4096.0, "4096", None])
def test_no_tokens_are_refused(tokens):
    with pytest.raises(Refused, match="a token at least, and context_tokens is "):
        reserve_for(OLMOE, KvCache.of(OLMOE), tokens)


def test_packed_experts_need_room_to_decode_one():
    packed = OLMOE.with_rows("int8")
    more = (
        reserve_for(packed, KvCache.of(packed)).workspace_nbytes
        - reserve_for(OLMOE, KvCache.of(OLMOE)).workspace_nbytes
    )
    assert more == packed.expert_nbytes


def test_a_prompts_activations_hold_at_least_a_layers_widest_products():
    """OLMoE's by hand: hidden 2048, attention's 4 x 2048 outputs, an expert's 2 x 1024 + 2048, four hidden states."""
    by_hand = 1000 * 2 * (4 * 2048 + 64 + 2 * 1024 + 2048 + 4 * 2048) + 50304 * (2 + 8)
    assert prefill_nbytes(OLMOE, 1000) == by_hand
    assert prefill_nbytes(replace(OLMOE, expert_outputs=None), 1000) == by_hand + 1000 * 2 * (3 * 1024 - 4 * 1024)
