"""Composed strategies: each part from the name that brings it, every invariant, and a sentence for what cannot be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import greedy, live_and_replayed, prompt, tiny

import mobile
from baselines.next_gate import NEXT_GATE
from mobile.costs.geometry import GEOMETRIES
from mobile.errors import Refused
from mobile.policies import MOBILE
from mobile.policies.strategy import compose, resolve
from mobile.replay.replay import ReplaySetup, time_requests, why_not_replayable
from mobile.replay.trace import Step, replay
from tests.toy import CARD, EXPERTS, GEOMETRY, LAYERS, STANDS_FOR, TOP_K

AHEAD = np.zeros((LAYERS - 1, EXPERTS), np.float16)
LOSSLESS = [
    "next-gate+lfu",
    "lfu+cpu-hybrid",
    "next-gate+cpu-hybrid",
    "next-gate+lfu+cpu-hybrid",
    "fate+cpu-hybrid",
    "activation-trace+cpu-hybrid",
    "trained-predictor+lfu",
    "speculating-experts-verify+lfu",
]
TWO_PASS = [
    "mobile+lfu",
    "mobile+cpu-hybrid",
    "mobile+lfu+cpu-hybrid",
    "mobile+next-gate",
    "mobile+next-gate+lfu",
    "mobile+fate",
    "mobile+activation-trace",
    "mobile+trained-predictor",
    "mobile+speculating-experts-verify+cpu-hybrid",
]
OTHER_ROUTING = ["static-half+lfu", "static-half+next-gate", "static-half+fate", "ser+lfu+cpu-hybrid", "pre-gated+lfu"]
FUTURE = ["static-half+belady", "mobile+belady", "next-gate+belady", "belady+cpu-hybrid", "oracle-prefetch+cpu-hybrid"]


# --- the invariants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS + TWO_PASS)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_tokens_and_logits_equal_the_stock_model_at_every_pool_size(family, name):
    """Lossless ones as they are, those of MoBiLE's gating with a gamma above 1, which always falls back."""
    model, ids = tiny(family), prompt()
    sequences, logits = greedy(model, ids)
    gamma = 1.1 if name in TWO_PASS else None
    for slots in (4, 5, 12, 24):
        mobile.attach(model, name, slots=slots, gamma=gamma, poison=True)
        found, found_logits = greedy(model, ids)
        stats = model.mobile.stats()
        mobile.detach(model)
        assert torch.equal(found, sequences), slots
        assert torch.equal(found_logits, logits), slots
        assert stats["fallbacks"] == (stats["tokens"] if gamma else 0)


@pytest.mark.parametrize("name", TWO_PASS + OTHER_ROUTING)
def test_tokens_are_those_of_the_gating_alone(name):
    model, ids = tiny("olmoe"), prompt(rows=3)
    gamma = 0.25 if name in TWO_PASS else None
    mobile.attach(model, name.split("+")[0], slots=24, gamma=gamma)
    sequences, logits = greedy(model, ids)
    fallbacks = model.mobile.stats()["fallbacks"]
    mobile.detach(model)
    assert fallbacks > 0 or gamma is None
    for slots in (4, 9, 24):
        mobile.attach(model, name, slots=slots, gamma=gamma, poison=True)
        found, found_logits = greedy(model, ids)
        assert model.mobile.stats()["fallbacks"] == fallbacks
        mobile.detach(model)
        assert torch.equal(found, sequences), slots
        assert torch.equal(found_logits, logits), slots


@pytest.mark.parametrize("name", LOSSLESS + TWO_PASS + OTHER_ROUTING)
def test_a_replayed_trace_gives_the_live_ledger_event_for_event(name, tmp_path):
    strategy = resolve(name, 0.25 if name in TWO_PASS else None)
    model = tiny("olmoe")
    for slots in (4, 7, 16):
        live, again = live_and_replayed(model, strategy, slots, tmp_path / "t.npz")
        assert again.counters == live.counters, slots
        assert again.events == live.events, slots
        assert 0 < live.counters.fallbacks < live.counters.tokens or name not in TWO_PASS


@pytest.mark.parametrize("name", FUTURE)
def test_one_that_needs_the_future_is_replayed_and_never_attached(name):
    strategy = resolve(name)
    assert strategy.needs_future
    assert time_requests(ReplaySetup(strategy, GEOMETRY, STANDS_FOR, CARD, 8), [two_passes(4)])[1].counters.tokens == 4
    with pytest.raises(Refused, match=f"Strategy {name.replace('+', '.')} needs to know the future"):
        mobile.attach(tiny("olmoe"), name, slots=8)


# --- a lookahead beside two passes ------------------------------------------------------------------


def two_passes(tokens: int, *, falls: bool = True) -> list[Step]:
    """Tokens that run experts 0 and 1 of each layer, and then 0 to 3, as their fallback has predicted."""
    little, big = ((0, 1),) * LAYERS, ((0, 1, 2, 3),) * LAYERS
    one = [Step("little", 1, little, confidence=0.0), Step("big", 1, big, confidence=0.0, predicted=big)]
    return one[: 1 + falls] * tokens


class Asked:
    """A lookahead that keeps what it was given and asked, and names the highest experts."""

    def __init__(self, context):
        self.top_k, self.kind, self.kinds = context.geometry.top_k, "", []

    def begin(self, kind):
        self.kind = kind

    def streamed(self, layer, experts, counts):
        pass

    def routed(self, layer, experts, ahead):
        self.kinds.append(self.kind)
        return [(layer + 1, expert) for expert in range(11, 11 - self.top_k, -1)] if layer + 1 < LAYERS else ()


ASKED = replace(NEXT_GATE, name="asked", lookahead=Asked)


def test_a_lookahead_guesses_for_the_little_pass_and_leaves_the_big_pass_to_the_fallback():
    """It is given K/2, and asked in little passes only: in a big one it could but push out what is known to come."""
    for fast in (True, False):
        on = ReplaySetup(compose([MOBILE, ASKED]), GEOMETRY, STANDS_FOR, CARD, 40)
        residency = on.residency(events=0 if fast else 10_000)
        replay([two_passes(3)], residency, STANDS_FOR)
        assert residency.lookahead.top_k == TOP_K // 2
        assert residency.lookahead.kinds == ["little"] * 3 * LAYERS
    plain = ReplaySetup(ASKED, GEOMETRY, STANDS_FOR, CARD, 40).residency()
    assert plain.lookahead.top_k == TOP_K


def test_without_its_prefetch_a_fallback_asks_the_lookahead_in_both_passes():
    on = ReplaySetup(compose([replace(MOBILE, prefetch_on_fallback=False), ASKED]), GEOMETRY, STANDS_FOR, CARD, 40)
    residency = on.residency()
    replay([two_passes(2)], residency, STANDS_FOR)
    assert residency.lookahead.kinds == (["little"] * LAYERS + ["big"] * LAYERS) * 2


def test_a_fallback_prefetches_all_layers_whatever_guess_slots_there_are():
    residency = ReplaySetup(compose([MOBILE, ASKED]), GEOMETRY, STANDS_FOR, CARD, 40).residency()
    residency.begin("little", 1)
    residency.fallback([(layer, expert) for layer in range(LAYERS) for expert in range(TOP_K)])
    assert residency.ledger.counters.prefetch_loads == LAYERS * TOP_K > ASKED.guess_slots
    residency.begin("little", 1)
    residency.run_layer(0, (0, 1), ())
    assert len(residency.pool.unused_prefetches - residency.pool.ready) <= ASKED.guess_slots


# --- which name brings what -------------------------------------------------------------------------


def test_each_part_is_taken_from_the_name_that_brings_it():
    one = resolve("mobile+lfu+cpu-hybrid")
    from_lfu, from_hybrid = resolve("lfu"), resolve("cpu-hybrid")
    assert (one.gating, one.prefetch_on_fallback) == (MOBILE.gating, True)
    assert (one.evict, one.on_cpu, one.lookahead) == (from_lfu.evict, from_hybrid.on_cpu, None)
    assert (one.name, one.lossless, one.retain) == ("mobile+lfu+cpu-hybrid", False, "some")
    assert one.summary == "gating of mobile, eviction of lfu, placement of cpu-hybrid"
    assert one.source == f"mobile: {MOBILE.source}; lfu: {from_lfu.source}; cpu-hybrid: {from_hybrid.source}"
    guessing = resolve("next-gate+lfu")
    assert (guessing.lookahead, guessing.guess_slots) == (NEXT_GATE.lookahead, NEXT_GATE.guess_slots)
    assert guessing.lossless
    assert resolve("mobile+speculating-experts-verify").quasi
    assert resolve("mobile+lfu") == resolve("mobile+lfu"), "two of one name are one"


def test_one_object_serves_as_both_parts_of_a_name_that_brings_them_so():
    for name in ("mobile+fate", "fate+cpu-hybrid", "static-half+activation-trace"):
        residency = ReplaySetup(resolve(name), GEOMETRY, STANDS_FOR, CARD, 12).residency()
        assert residency.lookahead is residency._eviction


def test_gamma_is_that_of_the_gating():
    assert resolve("mobile+lfu", 0.9).gamma == 0.9
    with pytest.raises(Refused, match=r"Strategy next-gate.lfu has no gamma"):
        resolve("next-gate+lfu", 0.9)


def test_as_many_slots_are_needed_as_the_neediest_part_asks_for():
    """With half of the experts a token, a cache is served by half of the slots; the other half comes with a layer."""
    olmoe = GEOMETRIES["olmoe-1b-7b"]
    needs = {name: resolve(name).min_slots(olmoe) for name in ("mobile", "mobile+lfu", "mobile+next-gate", "ser+fate")}
    assert needs == {"mobile": 72, "mobile+lfu": 72, "mobile+next-gate": 72, "ser+fate": 138}
    assert resolve("pre-gated+lfu").min_slots(olmoe) == resolve("lfu").min_slots(olmoe) == 128


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mobile+static-half", "mobile and static-half both bring the gating; leave one of them out of "),
        ("lfu+belady", "lfu and belady both bring the eviction"),
        ("fate+lfu", "fate and lfu both bring the eviction"),
        ("fate+next-gate", "fate and next-gate both bring the lookahead"),
        ("mobile+next-gate+fate", "next-gate and fate both bring the lookahead"),
        ("lfu+cpu-hybrid+mobile", "mobile brings the gating, so it comes first: write 'mobile.lfu.cpu-hybrid'."),
        ("mobile+lru", "lru brings no gating, eviction, lookahead or placement of its own; leave it out of 'mobile"),
        ("mobile+on-demand", "on-demand brings no gating"),
        ("lru+lfu", "lru brings no gating"),
        ("mobile+mobile", "'mobile.mobile' names mobile twice; once is enough."),
        ("mobile+", "has a . with no name beside it; write a name on each side"),
        ("+lfu", "with no name beside it"),
        ("mobile++lfu", "with no name beside it"),
        ("mobile+ +lfu", "with no name beside it"),
        ("mobile+lfuu", "Unknown strategy 'lfuu' in 'mobile.lfuu'; did you mean lfu. Choose one of"),
        ("mobile + lfu", "Unknown strategy 'mobile ' in 'mobile . lfu'; did you mean mobile"),
        ("resident+lfu", "resident keeps every expert on the device, which leaves nothing to add"),
        ("mobile+resident", "resident keeps every expert on the device"),
        ("mobile+oracle-prefetch", "oracle-prefetch and mobile would both prefetch"),
        ("next-gate+oracle-prefetch", "oracle-prefetch and next-gate would both prefetch"),
        ("pre-gated+speculating-experts-verify", "both bring the lookahead"),
    ],
)
def test_what_cannot_be_composed_is_refused_in_a_sentence(name, says):
    with pytest.raises(Refused, match=says) as caught:
        resolve(name)
    told = str(caught.value)
    assert told.endswith(".")
    assert "\n" not in told


def test_strategies_without_a_registered_name_are_composed_too():
    numbered = replace(MOBILE, name="mine", gating=replace(MOBILE.gating, gamma=0.9))
    joined = compose([numbered, resolve("lfu"), resolve("cpu-hybrid")])
    assert (joined.name, joined.gamma, joined.routed_by) == ("mine+lfu+cpu-hybrid", 0.9, "mine")
    assert compose([compose([MOBILE, resolve("lfu")]), resolve("cpu-hybrid")]).evict is resolve("lfu").evict
    with pytest.raises(Refused, match="names mobile twice"):
        compose([MOBILE, MOBILE])


def test_a_lookahead_that_would_change_what_a_gating_foresees_is_refused():
    foresees = replace(resolve("pre-gated"), name="foresees", lookahead=None)
    assert compose([foresees, NEXT_GATE]).gating is foresees.gating
    with pytest.raises(Refused, match="speculating-experts-verify would change what foresees foresees"):
        compose([foresees, resolve("speculating-experts-verify")])


# --- one live run for all of one gating -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "routed_by"),
    [
        ("mobile", "mobile"),
        ("mobile+lfu", "mobile"),
        ("mobile+fate+cpu-hybrid", "mobile"),
        ("static-half+lfu", "static-half"),
        ("ser+cpu-hybrid", "ser"),
        ("speculating-experts+lfu", "speculating-experts"),
        ("speculating-experts-verify+lfu", "speculating-experts-verify"),
        ("mobile+speculating-experts-verify", "mobile+speculating-experts-verify"),
        ("mobile+cpu-hybrid+speculating-experts-verify", "mobile+speculating-experts-verify"),
    ],
)
def test_its_routing_is_that_of_the_name_that_decides_it(name, routed_by):
    strategy = resolve(name)
    assert strategy.routed_by == routed_by
    recorder = resolve(routed_by)
    told = [[replace(step, ahead=AHEAD) for step in two_passes(2)]]
    assert why_not_replayable(strategy, recorder, told) is None


def test_lossless_ones_of_full_k_are_replayed_from_one_run_of_full_k():
    assert resolve("next-gate+lfu+cpu-hybrid").routes_as_full_k
    assert not resolve("speculating-experts-verify+lfu").routes_as_full_k
    assert not resolve("mobile+lfu").routes_as_full_k


def test_a_part_that_changes_answers_has_a_live_run_of_its_own():
    lossy = replace(resolve("lfu"), name="lossy", lossless=False)
    assert compose([MOBILE, lossy]).routed_by == "mobile+lossy"


def test_a_trace_of_another_gating_or_without_what_a_lookahead_needs_is_not_replayed():
    told, bare = [[replace(step, ahead=AHEAD) for step in two_passes(2)]], [two_passes(2)]
    assert why_not_replayable(resolve("mobile+lfu"), MOBILE, bare) is None
    assert "lacks the router logits" in why_not_replayable(resolve("mobile+next-gate"), MOBILE, bare)
    in_big_alone = [[replace(step, ahead=AHEAD if step.kind == "big" else None) for step in two_passes(2)]]
    assert "lacks the router logits" in why_not_replayable(resolve("mobile+next-gate"), MOBILE, in_big_alone)
    assert "another foresight" in why_not_replayable(resolve("mobile+speculating-experts-verify"), MOBILE, told)
    assert "other experts" in why_not_replayable(resolve("static-half+lfu"), MOBILE, told)
    assert "2 fallbacks otherwise" in why_not_replayable(resolve("mobile+lfu", 0.0), MOBILE, told)
