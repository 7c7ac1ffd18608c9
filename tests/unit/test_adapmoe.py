"""AdapMoE's three rules, each alone: which experts run, how large each layer's cache is, what is fetched ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from math import comb, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.adapmoe import ADAPMOE, Shares, adapmoe, adaptive, expected_loads, measured, shares
from baselines.lru import LRU
from baselines.signals.sensitivity import Measured, fisher_traces, guess_accuracy, relative
from mobile.errors import Refused
from mobile.live_model.compat import moe_layers
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import CustomRouting
from mobile.replay.trace import Step
from mobile.slots import SlotPool
from tests.unit.test_limits import GEOMETRY, clock

ROOT = Path(__file__).parent.parent.parent
some_weights = st.lists(st.floats(0.0078125, 1, width=32), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.9))
def test_at_k_2_the_second_expert_runs_unless_its_share_is_below_tau(first, tau):
    weights = torch.tensor([[1 - first, first]])
    alpha = weights.min() / weights.sum()
    index, kept = adaptive((torch.tensor([[5, 3]]), weights), tau)
    assert index.tolist() == [[5, 3]]
    assert int((kept > 0).sum()) == (1 if alpha < tau else 2)
    assert kept.argmax() == weights.argmax()


@settings(deadline=None)
@given(some_weights, st.floats(0.01, 0.99))
def test_what_is_left_out_is_the_most_that_stays_below_tau(weights, tau):
    given_weights = torch.tensor([weights])
    index = torch.arange(len(weights))[None]
    kept = adaptive((index, given_weights), tau)[1][0]
    out = given_weights[0][kept == 0].double()
    runs = given_weights[0][kept > 0].double()
    total = given_weights.double().sum()
    assert len(runs) >= 1
    assert out.sum() / total < tau + 1e-5
    assert len(runs) == 1 or (out.sum() + runs.min()) / total >= tau - 1e-5
    assert not len(out) or out.max() <= runs.min()
    assert float(kept.sum()) == pytest.approx(float(total), rel=1e-5)


def test_rows_are_apart_and_untouched_rows_keep_their_bits():
    weights = torch.tensor([[0.1, 0.6, 0.3], [0.01, 0.95, 0.04], [0.3, 0.3, 0.3]])
    _, kept = adaptive((torch.tensor([[0, 1, 2]] * 3), weights), 0.09)
    assert torch.equal(kept[0], weights[0])
    assert torch.equal(kept[2], weights[2])
    assert kept[1].tolist() == pytest.approx([0, 1.0, 0])
    half = weights.to(torch.bfloat16)
    assert adaptive((torch.tensor([[0, 1, 2]] * 3), half), 0.09)[1].dtype == torch.bfloat16


def test_tau_is_the_root_of_tolerance_over_sensitivity():
    weights = torch.tensor([[0.8, 0.2]])
    index = torch.tensor([[0, 1]])
    gating = adapmoe(tolerance=0.01, sensitivities=[1.0, 0.01]).gating
    assert isinstance(gating, CustomRouting)
    assert sqrt(0.01 / 1.0) < 0.2 < sqrt(0.01 / 0.01)
    assert gating.choose(0, (index, weights), None)[1].count_nonzero() == 2
    assert gating.choose(1, (index, weights), None)[1].count_nonzero() == 1


@pytest.mark.parametrize(("experts", "cached", "a"), [(8, 1, 0.0), (8, 3, 0.8), (8, 7, 0.5), (8, 8, 0.9), (6, 0, 0.3)])
def test_expected_loads_at_k_2_are_the_papers(experts, cached, a):
    left = experts - cached
    q2 = left * (left - 1) / (experts * (experts - 1))
    q1 = 2 * cached * left / (experts * (experts - 1))
    assert expected_loads(experts, cached, 2, a) == pytest.approx(2 * q2 * (1 - a) + q2 * a + q1 * (1 - a))


@pytest.mark.parametrize(("experts", "cached", "runs"), [(6, 2, 3), (7, 5, 4), (5, 5, 2), (6, 0, 4)])
def test_expected_loads_are_an_average_over_every_draw(experts, cached, runs):
    missing = [sum(expert >= cached for expert in draw) for draw in combinations(range(experts), runs)]
    loads = sum(m - 0.7 * (m > 0) for m in missing) / comb(experts, runs)
    assert expected_loads(experts, cached, runs, 0.7) == pytest.approx(loads)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 18), st.integers(1, 4), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_no_other_division_of_the_slots_expects_fewer_loads(slots, runs, accuracy):
    def expected(division):
        return sum(expected_loads(6, cached, runs, a) for cached, a in zip(division, accuracy, strict=True))

    found = shares(6, slots, runs, accuracy)
    assert sum(found) == slots
    assert min(found) >= 1
    best = min(expected(d) for d in product(range(1, 7), repeat=3) if sum(d) == slots)
    assert expected(found) == pytest.approx(best, abs=1e-6)


def test_equal_layers_get_equal_shares_and_the_unforeseen_first_one_more():
    assert shares(64, 4 * 20, 8, [0.8] * 4) == [20] * 4
    assert shares(8, 12, 2, [0.0, 0.8, 0.8])[0] == 8


def test_a_layer_at_its_share_drops_its_own_least_recent():
    setting = PolicyContext(GEOMETRY, 12)
    evict, pool = Shares(setting, accuracy=[0.5] * 3), SlotPool(12)
    assert evict.share == [4, 4, 4]
    for layer in (0, 1, 2):
        for expert in range(4):
            pool.take_free((layer, expert))
            pool.arrived((layer, expert))
    pool.touch([(1, 0)])
    assert evict.victim(pool, (1, 9), protected=False) == (1, 1)
    assert LRU.evict(setting).victim(pool, (1, 9), protected=False) == (0, 0)


def test_a_layer_below_its_share_takes_from_one_above():
    evict, pool = Shares(PolicyContext(GEOMETRY, 12), accuracy=[0.5] * 3), SlotPool(12)
    for layer, held in ((0, 3), (1, 6), (2, 3)):
        for expert in range(held):
            pool.take_free((layer, expert))
            pool.arrived((layer, expert))
    assert evict.victim(pool, (2, 9), protected=False) == (1, 0)


def test_only_the_first_guess_that_is_not_resident_is_fetched():
    """Layer 1 will need 0 to 3 and has 0; the guesses are right and in that order."""
    ahead = np.zeros((2, 12), np.float16)
    ahead[0, :4] = [4, 3, 2, 1]
    steps = [Step("full", 1, ((0,), (0,), (0,)))] * 3
    steps += [Step("full", 1, ((0,), (0, 1, 2, 3), (0,)), ahead=ahead)]
    quiet, counters = (clock(ADAPMOE, [s], 30) for s in (steps[:3], steps))
    assert counters.demand_loads - quiet.demand_loads == 2
    assert counters.prefetch_useful - quiet.prefetch_useful == 1


def test_a_guess_that_was_not_chosen_gives_way_first():
    evict, pool = Shares(PolicyContext(GEOMETRY, 6), accuracy=[0.5] * 3), SlotPool(6)
    for key in ((1, 5), (0, 0), (0, 1), (1, 0), (1, 7), (2, 0)):
        pool.take_free(key)
        pool.arrived(key)
    pool.unused_prefetches = {(1, 7), (2, 0)}
    evict.used(1, [(1, 0)])  # 7 was guessed for it; 0 of layer 2 may still be right
    assert evict.victim(pool, (2, 3), protected=False) == (1, 7)


# --- measured ---------------------------------------------------------------------------------------


def test_the_trace_is_the_mean_square_of_the_losss_slope_at_a_layers_output(family):
    """Against finite differences: the loss after a nudge of one layer's output, along that layer's own slope."""
    model = tiny(family)
    ids = [prompt(), prompt()[:, :3]]
    found, tokens = fisher_traces(model, ids)
    assert tokens == ids[0].shape[1] + 3
    assert all(weight.requires_grad for weight in model.parameters())
    layers = moe_layers(model)
    totals = [0.0] * len(layers)
    for one in ids:
        for number, layer in enumerate(layers):
            slope = _slope(model, layer, one)
            totals[number] += float(slope.square().sum())
            unit = slope / slope.norm()
            ahead, behind = (_loss(model, layer, one, step * unit) for step in (2e-3, -2e-3))
            assert float((ahead - behind).detach()) / 4e-3 == pytest.approx(float(slope.norm()), rel=0.02)
    assert found == pytest.approx([total / tokens for total in totals], rel=1e-4)


def _loss(model, layer, ids, nudge):
    hook = layer.experts.register_forward_hook(lambda _module, _args, output: output + nudge)
    logits = model(ids, use_cache=False).logits[0, :-1]
    hook.remove()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")


def _slope(model, layer, ids):
    """By another way: the slope at something added to the layer's output."""
    nudge = torch.zeros(ids.shape[1], model.config.hidden_size, requires_grad=True)
    return torch.autograd.grad(_loss(model, layer, ids, nudge), nudge)[0]


def test_sensitivities_are_compared_with_their_geometric_mean():
    assert relative([4.0, 1.0, 0.25]) == pytest.approx([4.0, 1.0, 0.25])
    assert relative([46.7, 0.02])[0] == pytest.approx(46.7 / 0.966, rel=1e-3)
    with pytest.raises(Refused, match="does not touch the loss"):
        relative([1.0, 0.0])


def test_guesses_are_held_against_what_the_next_layer_chose():
    ahead = np.zeros((2, 12), np.float16)
    ahead[0, [1, 2]], ahead[1, [5, 7]] = 1, 1
    steps = [
        Step("full", 1, ((0, 3), (1, 2), (7, 8)), ahead=ahead),
        Step("full", 1, ((0, 3), (1, 9), (7, 8)), ahead=ahead),
    ]
    assert guess_accuracy([steps]) == pytest.approx([0, 0.75, 0.5])
    assert guess_accuracy([[Step("full", 1, ((0,), (1,), (2,)))]]) is None


def test_what_was_measured_makes_the_strategy_and_other_files_are_refused(tmp_path):
    path = tmp_path / "adapmoe.json"
    Measured("a model", (4.0, 1.0, 0.25), (0.0, 0.5, 0.9), (8.0, 2.0, 0.5), 3, 20, 0.1).save(path)
    strategy = measured(path, tolerance=0.01)
    weights, index = torch.tensor([[0.85, 0.15]]), torch.tensor([[0, 1]])
    ran = [int(strategy.gating.choose(layer, (index, weights), None)[1].count_nonzero()) for layer in range(3)]
    assert ran == [2, 2, 1], "thresholds 0.05, 0.1 and 0.2"
    dressed = PolicyContext(replace(GEOMETRY, moe_layers=6), 40, layer_map=((0, 1), (2, 3), (4, 5)))
    assert strategy.evict(dressed).share == shares(12, 40, GEOMETRY.top_k, [0.0, 0.0, 0.5, 0.5, 0.9, 0.9])
    whole = path.read_text()
    for content in (
        whole[: len(whole) // 2],
        "",
        "[]",
        whole.replace("mobile-adapmoe-1", "x"),
        whole.replace("0.25", "0"),
    ):
        path.write_text(content)
        with pytest.raises(Refused, match=r"python -m baselines\.adapmoe fit"):
            measured(path)


def test_the_command_measures_and_says_what_it_made_of_it(tmp_path):
    (tmp_path / "p.txt").write_text("Question: what is 3 + 4?\nTwo words\n")
    code = [sys.executable, "-m", "baselines.adapmoe", "fit", "--prompts", "p.txt", "--out", "a.json", "--model"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    done = run([*code, str(ROOT / "suites/models/olmoe-tiny")])
    assert done.returncode == 0, done.stderr
    found = Measured.load(tmp_path / "a.json")
    assert (found.texts, found.accuracy) == (2, None)
    assert f"{found.tokens:,} tokens" in done.stdout
    assert len(done.stdout.splitlines()) == 2 + len(found.sensitivities)
    done = run([*code, str(tmp_path / "nowhere")])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
