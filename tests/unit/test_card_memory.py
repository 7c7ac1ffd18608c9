"""Budgets on a card: what is free there, what others hold, the CUDA context, a KV cache of stated tokens, the cap."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mobile
from baselines.lru import LRU
from baselines.resident import RESIDENT
from mobile.costs.geometry import GEOMETRIES, slots_for
from mobile.costs.hardware import profile
from mobile.costs.memory import CONTEXT_NBYTES, KvCache, Reserve, divide, reserve_for
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.runtime.attach_plan import AttachOptions, AttachPlan, plan_attach
from mobile.runtime.device_memory import card_memory
from mobile.runtime.kv_cache import kv_cache
from suites.synthetic import models

GIB, MIB = 2**30, 2**20
SECOND = torch.device("cuda:1")
OLMOE = GEOMETRIES["olmoe-1b-7b"]


@dataclass
class Card:
    """The second card, of which everything is asked; the first must not be."""

    total: int = 16 * GIB
    free: int = 15 * GIB
    reserved: int = 0
    allocated: int = 0


@pytest.fixture
def card(monkeypatch):
    card = Card()

    def of_second(answer: Any) -> Any:
        def asked(device: Any = None) -> Any:
            assert device == SECOND, "the current device is another one"
            return answer()

        return asked

    for name, answer in {
        "mem_get_info": lambda: (card.free, card.total),
        "memory_reserved": lambda: card.reserved,
        "memory_allocated": lambda: card.allocated,
        "get_device_name": lambda: "a card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, of_second(answer))
    return card


@pytest.fixture(scope="module")
def olmoe() -> tuple[Any, ...]:
    """The published model without its weights."""
    return models._empty(models.config_of("olmoe-1b-7b"), torch.bfloat16)


def planned(olmoe: tuple[Any, ...], **options: Any) -> AttachPlan:
    return plan_attach(*olmoe, SECOND, AttachOptions(**{"strategy": LRU, **options}))


def in_slots(nbytes: int, context: int, tokens: int = 4096) -> int:
    return divide(OLMOE, nbytes, reserve_for(OLMOE, KvCache.of(OLMOE), tokens, context), PREFILL_BUFFERS).slots


def test_the_default_budget_is_what_is_free_and_not_the_cards_total(card, olmoe):
    card.free = 9 * GIB  # another process holds 6.5
    plan = planned(olmoe)
    assert plan.slots == in_slots(9 * GIB + CONTEXT_NBYTES, CONTEXT_NBYTES)
    assert plan.slots < slots_for(OLMOE, 16 * GIB, GIB, 2) - 400
    assert plan.division.used_nbytes <= 9 * GIB + CONTEXT_NBYTES
    assert (plan.budget_nbytes, plan.cap) == (None, None), "nobody asked for less than all"


def test_memory_that_the_allocator_holds_and_does_not_use_can_be_had(card, olmoe):
    card.free, card.reserved, card.allocated = 6 * GIB, 3 * GIB, GIB
    assert planned(olmoe).division.memory_nbytes == 6 * GIB + 2 * GIB + CONTEXT_NBYTES


def test_the_context_is_part_of_the_budget_and_no_part_of_the_cap(card, olmoe):
    """`memory` is about what nvidia-smi shows of the process, and the cap is of PyTorch's allocator alone."""
    card.free = card.total - 300 * MIB
    plan = planned(olmoe, memory="8GiB")
    assert plan.division.reserve.context_nbytes == 300 * MIB
    assert plan.slots == in_slots(8 * GIB, 300 * MIB)
    assert plan.cap == (8 * GIB - 300 * MIB) / card.total
    assert plan.budget_nbytes == 8 * GIB


def test_where_others_use_the_card_their_memory_is_not_taken_for_our_context(card, olmoe):
    card.free = 9 * GIB
    assert planned(olmoe, memory="8GiB").division.reserve.context_nbytes == CONTEXT_NBYTES


def test_other_tensors_of_the_process_are_beside_the_budget(card, olmoe):
    """So that a second model's budget, and its cap, leave the first one what it has."""
    card.free, card.reserved, card.allocated = 9 * GIB, 6 * GIB, 6 * GIB
    plan = planned(olmoe, memory="8GiB")
    assert plan.slots == in_slots(8 * GIB, CONTEXT_NBYTES)
    assert plan.cap == (8 * GIB - CONTEXT_NBYTES + 6 * GIB) / card.total


def test_a_model_on_the_card_may_have_what_it_takes_already(card, olmoe):
    """Its experts leave before slots are taken."""
    mine = sum(weight.nbytes for weight in olmoe[0].parameters())
    card.free, card.reserved, card.allocated = GIB, mine, mine
    with pytest.raises(mobile.Refused, match=r"more than the 1\.50 GiB that can be had"):
        planned(olmoe, memory="8GiB")
    found = card_memory(SECOND, OnCard(olmoe[0]))
    assert (found.model_nbytes, found.other_nbytes) == (mine, 0)
    assert found.available_nbytes == GIB + mine + CONTEXT_NBYTES


class OnCard:
    """A model's weights, each with a storage of its own."""

    def __init__(self, model: Any) -> None:
        self.weights = [Weight(weight.nbytes, number) for number, weight in enumerate(model.parameters())]

    def parameters(self) -> list[Any]:
        return [*self.weights, self.weights[0]]  # one is tied

    def buffers(self) -> list[Any]:
        return []


class Weight:
    device = SECOND

    def __init__(self, nbytes: int, number: int) -> None:
        self._nbytes, self._number = nbytes, number

    def untyped_storage(self) -> Weight:
        return self

    def nbytes(self) -> int:
        return self._nbytes

    def data_ptr(self) -> int:
        return self._number


# --- more than there is ----------------------------------------------------------------------------------


def test_a_budget_of_more_than_is_free_is_refused_in_a_sentence(card, olmoe):
    card.free = 9 * GIB
    with pytest.raises(mobile.Refused) as refused:
        planned(olmoe, memory="12GiB")
    assert str(refused.value) == (
        "A budget of 12.00 GiB is more than the 9.50 GiB that can be had on cuda:1, which shows 16.00; give less "
        "memory, or end what else uses it."
    )


@pytest.mark.parametrize("shows", [15.57, 15.7, 15.99, 16.0])
def test_a_card_that_just_misses_its_nominal_size_counts_as_all_of_it_and_says_so_once(card, olmoe, shows):
    card.total = int(shows * GIB)
    card.free = card.total - 400 * MIB
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        plans = [planned(olmoe, memory="16GiB") for _ in range(3)]
    shown = f"cuda:1 shows {shows:.2f} GiB, of which {shows:.2f} can be had: that is what a budget of 16.00"
    assert [str(each.message)[: len(shown)] for each in said] == ([] if shows == 16.0 else [shown])
    assert {plan.budget_nbytes for plan in plans} == {card.total}


def test_a_card_that_misses_it_by_more_does_not(card, olmoe):
    card.total, card.free = int(14.9 * GIB), 14 * GIB
    with pytest.raises(mobile.Refused, match="give less memory"):
        planned(olmoe, memory="16GiB")


def test_a_nominal_budget_beside_others_is_what_they_leave(card, olmoe):
    card.total, card.free = int(15.7 * GIB), 12 * GIB
    with pytest.warns(RuntimeWarning, match=r"of which 12\.50 can be had"):
        plan = planned(olmoe, memory="16GiB")
    assert plan.budget_nbytes == 12 * GIB + CONTEXT_NBYTES


# --- tokens that are counted for ---------------------------------------------------------------------------


def test_stated_tokens_are_counted_for(card, olmoe):
    few, many = (planned(olmoe, memory="8GiB", context_tokens=tokens) for tokens in (512, 32_000))
    assert few.division.reserve.context_tokens == 512
    assert few.slots == in_slots(8 * GIB, CONTEXT_NBYTES, 512)
    assert many.slots == in_slots(8 * GIB, CONTEXT_NBYTES, 32_000) < few.slots - 300


def test_by_default_no_more_tokens_are_counted_than_the_model_can_read(card):
    config = models.config_of("olmoe-1b-7b")
    config.max_position_embeddings = 1000
    plan = planned(models._empty(config, torch.bfloat16), memory="8GiB")
    assert plan.division.reserve.context_tokens == 1000


@pytest.mark.parametrize("tokens", [0, -5, 1.5, "many"])
def test_tokens_that_are_no_number_are_refused(card, olmoe, tokens):
    with pytest.raises(mobile.Refused, match="a token at least"):
        planned(olmoe, memory="8GiB", context_tokens=tokens)


def test_slots_and_tokens_are_not_both_given(card, olmoe):
    with pytest.raises(mobile.Refused, match="With slots no memory is divided; leave context_tokens out"):
        planned(olmoe, slots=100, context_tokens=100)


def test_a_profile_keeps_its_reserve_on_a_card_and_off_it(card, olmoe):
    """The presets of computed time give the slots that they gave before."""
    expected = slots_for(OLMOE, 8 * GIB, GIB, PREFILL_BUFFERS)
    assert planned(olmoe, memory="8GiB", hardware="rtx4080-pcie4").slots == expected
    on_cpu = AttachOptions(strategy=LRU, memory="8GiB")
    plan = plan_attach(*olmoe, torch.device("cpu"), on_cpu)
    assert (plan.slots, plan.division.reserve) == (expected, Reserve.of_profile(profile("auto").reserve_nbytes))
    assert plan.cap is None


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
@pytest.mark.parametrize("budget", [8, 12, 16])
def test_dressed_models_are_divided_as_before(name, budget):
    small = models._empty(models.config_of(name, 1, 16), torch.float32)
    options = AttachOptions(LRU, memory=budget * GIB, geometry=name)
    plan = plan_attach(*small, torch.device("cpu"), options)
    assert plan.slots == slots_for(GEOMETRIES[name], budget * GIB, GIB, PREFILL_BUFFERS)


def test_stated_tokens_count_in_computed_time_too(olmoe):
    plan = plan_attach(*olmoe, torch.device("cpu"), AttachOptions(LRU, memory="8GiB", context_tokens=2000))
    assert plan.slots == in_slots(8 * GIB, CONTEXT_NBYTES, 2000)


def test_a_strategy_that_keeps_all_needs_no_budget(card, olmoe):
    plan = planned(olmoe, strategy=RESIDENT)
    assert (plan.slots, plan.division, plan.cap) == (OLMOE.total_experts, None, None)


# --- the cache that is counted for ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_a_published_geometrys_cache_is_the_one_that_transformers_grows(name):
    model, layers, _ = models._empty(models.config_of(name), torch.bfloat16)
    assert (
        sum(layer.nbytes_per_token for layer in kv_cache(model, layers).layers) == GEOMETRIES[name].kv_nbytes_per_token
    )
