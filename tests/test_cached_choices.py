"""Choices that know the cache: with every expert there they are the router's own, else their rule and nothing more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import greedy, live_and_replayed, prompt, replayed, tiny
from families import tiny as tiny_of
from test_lossy_baselines import TOKENS, rerouted
from transformers import AutoModelForCausalLM

import mobile
from baselines.cache_prior import cache_prior
from baselines.drop_cold import drop_cold
from baselines.lfu import LFU
from baselines.lru import LRU
from mobile.live_model.compat import moe_layers
from mobile.policies.mobile_cached import mobile_cached
from mobile.policies.strategy import resolve
from mobile.replay.replay import why_not_replayable

OLMOE = Path(__file__).parent.parent / "suites" / "models" / "olmoe-tiny"
STRATEGIES = [cache_prior(), drop_cold(), mobile_cached(), mobile_cached(strength=1.0, beyond=False)]
BOTH = pytest.mark.parametrize("strategy", STRATEGIES, ids=["cache-prior", "drop-cold", "mobile-cached", "within-k"])


def own(strategy):
    """The strategy that runs the routers' own choice where this one prefers what is there."""
    return "mobile" if strategy.gamma is not None else "lru"


@BOTH
def test_with_every_expert_resident_the_choice_is_the_routers_own_bit_for_bit(family, strategy):
    model = tiny(family)
    for rows in (1, 3):
        ids = prompt(rows=rows)
        gamma = None if strategy.gamma is None else 0.3
        mobile.attach(model, own(strategy), slots=24, gamma=gamma)
        expected, fallbacks = greedy(model, ids)[1], model.mobile.stats()["fallbacks"]
        mobile.detach(model)
        mobile.attach(model, replace(strategy, retain="everything"), gamma=gamma)
        assert torch.equal(greedy(model, ids)[1], expected)
        assert model.mobile.stats()["fallbacks"] == fallbacks
        mobile.detach(model)


@BOTH
def test_of_equal_scores_the_routers_own_choice_comes_first(family, strategy):
    """Logits that differ in their last bits are equal as probabilities, of which a router takes the first."""
    model, ids = tiny(family), prompt()
    expected = None
    for one in (resolve(own(strategy)), replace(strategy, retain="everything")):
        mobile.attach(model, one, slots=24)
        before = [layer.router.weight.detach().clone() for layer in moe_layers(model)]
        for layer in moe_layers(model):
            weight = layer.router.weight.data
            weight[:] = weight[:1] * (1 + 2.0**-23 * torch.arange(len(weight))[:, None])
        logits = greedy(model, ids)[1]
        assert expected is None or torch.equal(logits, expected)
        expected = logits
        for layer, weight in zip(moe_layers(model), before, strict=True):
            layer.router.weight.data[:] = weight
        mobile.detach(model)


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "cohere2_moe", "flex_olmo", "hunyuan_v1_moe"])
def test_routers_that_weigh_otherwise_keep_their_own_weights_too(name):
    model, ids = tiny_of(name), prompt()
    for strategy in STRATEGIES:
        mobile.attach(model, own(strategy), slots=24)
        expected = greedy(model, ids)[1]
        mobile.detach(model)
        mobile.attach(model, replace(strategy, retain="everything"))
        assert torch.equal(greedy(model, ids)[1], expected)
        mobile.detach(model)


# --- each rule, applied to a stock model by what the engine had in its slots ------------------------


def weights_of(model, logits, chosen):
    """Weights of these experts as the family's routers give them, and those of its own choice, by id."""
    shares = logits.softmax(-1)
    config = model.config
    normalises = getattr(config, "norm_topk_prob", config.model_type == "mixtral")
    scale = getattr(config, "routed_scaling_factor", 1.0)
    total = shares[chosen].sum() if normalises else 1.0
    return scale * shares[chosen] / total


def lived(model, strategy, slots, ids):
    """What a run under the strategy wrote, and by visit of a layer in decode, what was in slots."""
    mobile.attach(model, strategy, slots=slots, poison=True)
    seen, asked = [], model.mobile.residency.in_slots

    def noted(layers):
        seen.append(asked(layers))
        return seen[-1]

    model.mobile.residency.in_slots = noted
    written = greedy(model, ids, TOKENS)[0][0, ids.shape[1] :].tolist()
    mobile.detach(model)
    return written, seen


def by_rule(model, seen, choose):
    """The rule for a stock model: `choose(layer, logits, own ids, own weights, in slots)` gives ids and weights."""
    visits = iter(seen)

    def rule(number, router, args, output):
        logits, weights, index = output
        there = next(visits, None)
        if there is None:  # the stock loop runs one step more, whose token is not written
            return output
        there = torch.tensor(there)
        ids, new = choose(number, logits[0].float(), index[0], weights[0], there)
        fill = index.shape[1] - len(ids)  # an expert that is not run has weight 0
        ids, new = torch.cat([ids, index[0, :fill]]), torch.cat([new, weights.new_zeros(fill)])
        return logits, new[None].to(weights.dtype), ids[None]

    return rule


@pytest.mark.parametrize("slots", [14, 18])
def test_cache_prior_raises_cached_experts_by_a_share_of_the_mean_logit_range(family, slots):
    model, ids = tiny(family), prompt()
    written, seen = lived(model, cache_prior(0.4, keep=1), slots, ids)
    ranges: dict[int, list[float]] = {}
    changed = 0

    def choose(layer, logits, index, weights, there):
        nonlocal changed
        spans = ranges.setdefault(layer, [])
        spans.append(float(logits.max() - logits.min()))
        raised = logits + 0.4 * sum(spans) / len(spans) * there
        raised[logits.argmax()] = torch.inf
        chosen = raised.topk(len(index)).indices
        changed += set(chosen.tolist()) != set(index.tolist())
        return chosen, weights_of(model, logits, chosen)

    assert rerouted(model, ids, by_rule(model, seen, choose)) == written
    assert changed > 0


@pytest.mark.parametrize("threshold", [0.7, 1.0])
def test_drop_cold_skips_missing_experts_of_small_weight_and_nothing_else(family, threshold):
    model, ids = tiny(family), prompt()
    written, seen = lived(model, drop_cold(threshold), 8, ids)
    dropped = 0

    def choose(_layer, _logits, index, weights, there):
        nonlocal dropped
        share = weights / weights.sum()
        runs = [
            number
            for number, expert in enumerate(index.tolist())
            if there[expert] or share[number] >= threshold / len(index) or share[number] == share.max()
        ]
        dropped += len(index) - len(runs)
        return index[runs], weights[runs] * weights.sum() / weights[runs].sum()

    assert rerouted(model, ids, by_rule(model, seen, choose)) == written
    assert dropped > 0


@pytest.mark.parametrize("beyond", [False, True])
def test_the_little_pass_prefers_what_is_there(family, beyond):
    model, ids = tiny(family), prompt()
    written, seen = lived(model, mobile_cached(keep=1, strength=1.0, beyond=beyond, gamma=0.0), 8, ids)
    little, changed = model.config.num_experts_per_tok // 2, 0

    def choose(_layer, logits, index, weights, there):
        nonlocal changed
        ranked = logits.argsort(descending=True).tolist()
        offered = ranked if beyond else ranked[: len(index)]
        chosen = sorted(offered, key=lambda e: (e != ranked[0], not bool(there[e]), ranked.index(e)))[:little]
        changed += set(chosen) != set(ranked[:little])
        chosen = torch.tensor(chosen)
        return chosen, weights_of(model, logits, chosen)

    assert rerouted(model, ids, by_rule(model, seen, choose)) == written
    assert changed > 0 or little == 1  # of one expert the first is kept


# --- bounds of their knobs --------------------------------------------------------------------------


def test_always_falling_back_is_full_k_whatever_the_little_pass_preferred(family):
    model, ids = tiny(family), prompt()
    expected = greedy(model, ids)[1]
    for beyond in (False, True):
        for slots in (4, 9, 24):
            mobile.attach(model, mobile_cached(gamma=1.1, beyond=beyond), slots=slots, poison=True)
            assert torch.equal(greedy(model, ids)[1], expected)
            mobile.detach(model)


@pytest.mark.parametrize("strategy", [cache_prior(0.0), drop_cold(0.0)], ids=lambda s: s.name)
def test_at_strength_or_threshold_0_they_are_full_k(family, strategy):
    model, ids = tiny(family), prompt(rows=2)
    expected = greedy(model, ids)[1]
    mobile.attach(model, strategy, slots=8, poison=True)
    assert torch.equal(greedy(model, ids)[1], expected)


@pytest.mark.parametrize(
    "strategy",
    [cache_prior(0.5), drop_cold(), mobile_cached(strength=1.0), mobile_cached(strength=1.0, beyond=False)],
    ids=["cache-prior", "drop-cold", "mobile-cached", "within-k"],
)
def test_fewer_bytes_are_what_it_is_for(strategy):
    model, ids = tiny("qwen3_moe"), prompt()
    loads = []
    for one in (own(strategy), strategy):
        mobile.attach(model, one, slots=14)
        greedy(model, ids)
        loads.append(model.mobile.stats()["demand_loads"])
        mobile.detach(model)
    assert loads[1] < loads[0]


# --- determinism, replay, composition ---------------------------------------------------------------


@BOTH
def test_the_same_requests_give_the_same_tokens_and_ledger(strategy):
    def run():
        tokens = [greedy(model, prompt(rows=rows, seed=rows))[0].tolist() for rows in (1, 2)]
        return tokens, list(model.mobile.ledger.events)

    model = mobile.attach(tiny("olmoe"), strategy, slots=14)
    first = run()
    for layer in moe_layers(model):
        layer.router.weight.data.mul_(8)
    greedy(model, prompt(), 20)
    for layer in moe_layers(model):
        layer.router.weight.data.div_(8)
    model.mobile.restart()  # with cold slots, and a policy that has seen nothing
    assert run() == first
    mobile.detach(model)
    mobile.attach(model, strategy, slots=14)  # what one engine saw is not another's
    assert run() == first


@BOTH
@pytest.mark.parametrize("evict", [LRU.evict, LFU.evict])
def test_its_trace_replays_to_its_ledger_with_the_same_slots(family, strategy, evict, tmp_path):
    options = {"gamma": 0.3} if strategy.gamma is not None else {}
    for slots in (4, 9, 16):
        live, again = live_and_replayed(
            tiny(family), replace(strategy, evict=evict), slots, tmp_path / "t.npz", **options
        )
        assert again.counters == live.counters
        assert again.events == live.events


def test_no_other_strategy_replays_its_trace_and_it_replays_no_others():
    prior, lru = cache_prior(), resolve("lru")
    assert why_not_replayable(prior, cache_prior(), []) is None
    assert why_not_replayable(lru, prior, []) == (
        "cache-prior chose by what was in its slots, so its choices are right for that strategy alone"
    )
    for other in (cache_prior(0.1), replace(prior, evict=LFU.evict), drop_cold()):
        assert "for that strategy alone" in why_not_replayable(other, prior, [])
    assert why_not_replayable(prior, lru, []) == (
        "it chooses by what is in the slots, among experts that lru recorded no scores of"
    )
    ours = resolve("mobile-cached")
    for one, two in ((ours, resolve("mobile")), (resolve("mobile"), ours), (ours, resolve("mobile-cached", 0.9))):
        assert why_not_replayable(one, two, []) is not None
    assert why_not_replayable(ours, resolve("mobile-cached", 0.7), []) is None


def test_a_new_gamma_keeps_what_the_little_pass_chooses():
    ours = resolve("mobile-cached", 0.9)
    assert ours.gamma == 0.9
    assert ours.cached_routing == resolve("mobile-cached").cached_routing
    assert ours.knows_cache
    assert not resolve("mobile", 0.9).knows_cache


def test_an_expert_is_resident_only_in_all_layers_that_a_layer_stands_for():
    model = mobile.attach(tiny("olmoe"), "lru", slots=24)
    residency = model.mobile.residency
    for key in [(0, 1), (0, 2), (1, 2)]:
        residency.pool.take_free(key)
    residency.pool.arrived((0, 1))  # the others are on their way
    assert [e for e, there in enumerate(residency.in_slots([0])) if there] == [1, 2]
    assert [e for e, there in enumerate(residency.in_slots([0, 1])) if there] == [2]
    assert not any(residency.in_slots([0, 2]))


def test_a_dressed_run_replays_to_its_ledger():
    model = AutoModelForCausalLM.from_pretrained(OLMOE, dtype=torch.float32)
    for strategy in STRATEGIES:
        mobile.attach(model, strategy, slots=150, geometry="olmoe-1b-7b")
        with model.mobile.recording() as requests:
            greedy(model, prompt(), 6)
        engine = model.mobile
        engine.residency.end_token()
        assert replayed(engine, requests).counters == engine.ledger.counters
        assert engine.ledger.counters.hits > 0
        mobile.detach(model)


# --- refusals ---------------------------------------------------------------------------------------


def test_a_router_that_ranks_by_other_scores_is_refused_past_its_own_choice():
    model, ids = tiny_of("deepseek_v3"), prompt()
    expected = greedy(model, ids)[1]
    for strategy in (cache_prior(), mobile_cached()):
        with pytest.raises(mobile.Refused, match="chooses by other scores than it shows"):
            mobile.attach(model, strategy, slots=8)
        assert torch.equal(greedy(model, ids)[1], expected)
    for strategy in (drop_cold(0.0), mobile_cached(gamma=1.1, beyond=False)):  # these stay within its own choice
        mobile.attach(model, strategy, slots=8, poison=True)
        assert torch.equal(greedy(model, ids)[1], expected)
        mobile.detach(model)


def test_a_router_that_shows_no_weights_is_refused():
    with pytest.raises(mobile.Refused, match="does not give ids, weights and scores"):
        mobile.attach(tiny_of("jamba"), "cache-prior", slots=8)


def test_weights_that_depend_on_how_many_are_chosen_are_refused():
    model = tiny("olmoe")
    router = model.model.layers[1].mlp.gate

    def tempered(_module, _args, output):
        logits, weights, index = output
        return logits, weights**2, index

    router.register_forward_hook(tempered)
    with pytest.raises(mobile.Refused, match="weighs the experts it chooses"):
        mobile.attach(model, "cache-prior", slots=8)
