"""Strategies that foresee the next layers: invariants 1, 3, 4 and 6, and how often their guesses are right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import greedy, prompt, tiny

import mobile
from baselines.activation_trace import ACTIVATION_TRACE, ActivationTrace, Collection
from baselines.fate import FATE, Fate, guess_count
from baselines.lru import LRU
from baselines.signals.ridge import Examples, Predictor, recall
from baselines.trained_predictor import TRAINED_PREDICTOR, Trained, trained_predictor
from mobile.costs.geometry import GEOMETRIES, Geometry, project
from mobile.costs.hardware import profile
from mobile.errors import Refused
from mobile.ledger import Ledger
from mobile.policies.next_logits import of_one_layer
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import Strategy
from mobile.replay import trace
from mobile.replay.replay import ReplaySetup, outcome, replay_requests, time_requests
from mobile.replay.trace import Request, Step

ROOT = Path(__file__).parent.parent
TASKS = ("arithmetic", "boolean_expressions", "object_counting")


@pytest.fixture(params=["fate", "activation-trace", "trained-predictor"])
def strategy(request, monkeypatch) -> Strategy:
    """Each of the three; the trained one begins to learn early enough to do so in a test."""
    monkeypatch.setattr("baselines.trained_predictor.FITTED_AT", (6, 12))
    return {s.name: s for s in (FATE, ACTIVATION_TRACE, TRAINED_PREDICTOR)}[request.param]


def pools(model) -> list[int]:
    top_k = model.config.num_experts_per_tok
    return [top_k, top_k + 1, 12, 24]


# --- the engine's invariants ------------------------------------------------------------------------


def test_tokens_and_logits_equal_the_stock_model_at_every_pool_size(family, strategy):
    model, ids = tiny(family), [prompt(seed=seed) for seed in (1, 2, 1)]
    stock = [greedy(model, each) for each in ids]
    for slots in pools(model):
        mobile.attach(model, strategy, slots=slots, poison=True)
        for each, (sequences, logits) in zip(ids, stock, strict=True):
            offloaded = greedy(model, each)
            assert torch.equal(offloaded[0], sequences), slots
            assert torch.equal(offloaded[1], logits), slots
        stats = model.mobile.stats()
        mobile.detach(model)
        assert stats["prefetch_loads"] > 0 or slots != 12
        assert stats["fallbacks"] == 0


def test_a_batch_gives_the_stock_model_s_tokens(family, strategy):
    model, ids = tiny(family), prompt(rows=3)
    sequences, logits = greedy(model, ids)
    for slots in pools(model):
        mobile.attach(model, strategy, slots=slots, poison=True)
        offloaded = greedy(model, ids)
        mobile.detach(model)
        assert torch.equal(offloaded[0], sequences)
        assert torch.equal(offloaded[1], logits)


def test_prefetch_off_gives_the_same_tokens(family, strategy):
    model = tiny(family)
    told = []
    for lookahead in (strategy.lookahead, None):
        mobile.attach(model, replace(strategy, lookahead=lookahead), slots=12, poison=True)
        told.append([greedy(model, prompt(seed=seed)) for seed in (1, 2)])
        assert (model.mobile.stats()["prefetch_loads"] > 0) is (lookahead is not None)
        mobile.detach(model)
    for with_it, without in zip(*told, strict=True):
        assert torch.equal(with_it[0], without[0])
        assert torch.equal(with_it[1], without[1])


def test_a_replayed_trace_gives_the_live_ledger_event_for_event(family, strategy, tmp_path):
    model = tiny(family)
    for slots in pools(model):
        mobile.attach(model, strategy, slots=slots)
        with model.mobile.recording(ahead=True) as requests:
            for seed in (1, 2, 3):
                greedy(model, prompt(seed=seed))
        engine = model.mobile
        engine.residency.end_token()
        mobile.detach(model)
        trace.save(tmp_path / "t.npz", requests, len(engine.layers), {})
        bench = ReplaySetup(strategy, engine.geometry, engine.layer_map, engine.hardware, engine.slots)
        residency = bench.residency(events=200_000)
        trace.replay(trace.load(tmp_path / "t.npz")[0], residency, engine.layer_map)
        assert residency.ledger.counters == engine.ledger.counters
        assert residency.ledger.events == engine.ledger.events
        assert residency.ledger.guesses == engine.ledger.guesses
        assert engine.ledger.guesses


# --- fate -------------------------------------------------------------------------------------------


def test_fate_guesses_a_quarter_more_than_top_k():
    assert [guess_count(k) for k in (1, 2, 4, 6, 8)] == [2, 3, 5, 8, 10]


def test_fate_favours_the_first_layers_until_others_prove_harder_to_guess():
    fate = Fate(PolicyContext(GEOMETRIES["olmoe-1b-7b"], 512))
    assert fate._favoured == {0, 1}
    easy, hard = np.zeros((1, 64)), np.zeros((1, 64))
    easy[0, :8], hard[0, 40:48] = 1, 1
    for _ in range(3):
        for layer in range(16):
            fate.routed(layer, range(8), None if layer == 15 else of_one_layer(hard if layer == 6 else easy))
    assert fate._favoured == {0, 7}
    assert not Fate(PolicyContext(GEOMETRIES["olmoe-1b-7b"], 136))._favoured


# --- activation-trace -------------------------------------------------------------------------------


def test_the_nearest_matrix_is_the_cosine_s_choice_and_a_full_collection_stays_bounded():
    rng = np.random.default_rng(0)
    collection, stored = Collection(3, 8, most=4), []
    for number in range(9):
        sequence = [(layer, rng.choice(8, 2, replace=False).tolist()) for _ in range(6) for layer in range(3)]
        for layer, experts in sequence:
            collection.add(layer, experts)
        if stored:
            cosines = [
                sum(a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(collection.running, each, strict=True))
                for each in stored
            ]
            assert collection.nearest() == int(np.argmax(cosines))
        matrix = collection.running.copy()
        place = collection.close()
        stored[place : place + 1] = [matrix]
        assert len(stored) == collection.size == min(number + 1, 4)


def test_what_a_like_sequence_used_is_queued_by_share_and_nearness():
    geometry = replace(GEOMETRIES["olmoe-1b-7b"], moe_layers=3, experts=8, top_k=2)
    policy = ActivationTrace(PolicyContext(geometry, 24))
    policy.begin("prefill")
    for layer, experts, counts in ((0, [0, 1], [3, 1]), (1, [2, 3], [3, 1]), (2, [4, 5], [4, 4])):
        policy.streamed(layer, experts, counts)
    assert policy.routed(0, [0, 1], None) == ()
    policy.begin("prefill")
    policy.begin("full")
    assert policy.routed(0, [0, 1], None) == [(1, 2), (2, 4)]
    assert policy.routed(1, [2, 3], None) == [(2, 4), (2, 5)]
    assert policy.routed(2, [4, 5], None) == []


def test_the_expert_that_this_sequence_uses_least_and_latest_gives_way():
    from mobile.slots import SlotPool

    geometry = replace(GEOMETRIES["olmoe-1b-7b"], moe_layers=2, experts=8, top_k=2)
    policy, pool = ActivationTrace(PolicyContext(geometry, 4)), SlotPool(4)
    policy.begin("prefill")
    for layer, experts in ((0, [0, 1]), (1, [0, 1])):
        for expert in experts:
            pool.take_free((layer, expert))
            pool.arrived((layer, expert))
        policy.streamed(layer, experts, [9, 1])
    assert policy.victim(pool, (0, 5), protected=False) == (1, 1)
    pool.release((1, 1))
    pool.protected.add((0, 1))
    assert policy.victim(pool, (0, 5), protected=False) == (1, 0)
    pool.release((1, 0))
    pool.pinned = {(0, 0)}
    assert policy.victim(pool, (0, 5), protected=False) is None
    assert policy.victim(pool, (0, 5), protected=True) == (0, 1)


# --- trained-predictor ------------------------------------------------------------------------------


@cache
def recorded() -> tuple[list[Request], Geometry]:
    """Some prompts of each task, answered by the shipped model, in an order that mixes the tasks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from suites.scoring.lm_eval import first_tokens, generate

    folder = ROOT / "suites/models/olmoe-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mobile.attach(model, LRU, slots=256)
    requests = []
    for task in TASKS:
        lines = (ROOT / f"suites/tasks/data/{task}.jsonl").read_text().splitlines()[:24]
        prompts = [json.loads(line)["prompt"] for line in lines]
        with model.mobile.recording(ahead=True) as rows:
            answers = generate(model, tokenizer, prompts, {"max_gen_toks": 100, "until": ["\n\n"]})
        requests += [first_tokens(row, len(ids)) for row, (_, ids) in zip(rows, answers, strict=True)]
    Random(0).shuffle(requests)
    return requests, model.mobile.geometry


@cache
def split() -> tuple[Examples, Examples]:
    """Two thirds of the prompts to learn from, one third to be asked about."""
    requests, _ = recorded()
    return (
        Examples.of(request for number, request in enumerate(requests) if number % 3),
        Examples.of(requests[::3]),
    )


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_a_fitted_predictor_guesses_better_than_the_next_gate_on_prompts_it_never_saw(kind):
    learnt, held_out = split()
    experts, k = learnt.experts, 8
    gate = [recall(held_out.at(layer)[0][:, :experts], held_out.at(layer)[1], k) for layer in range(3)]
    fitted = Predictor.fit(learnt, kind).recall(held_out, k)
    assert all(better > plain + 0.05 for better, plain in zip(fitted, gate, strict=True)), (fitted, gate)
    assert all(k / experts < plain < better < 1 for better, plain in zip(fitted, gate, strict=True))


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_a_predictor_fitted_on_shuffled_labels_knows_no_more_than_what_is_popular(kind):
    learnt, held_out = split()
    popular = [learnt.at(layer)[1].mean(axis=0)[None].repeat(len(held_out), axis=0) for layer in range(3)]
    chance = [recall(popular[layer], held_out.at(layer)[1], 8) for layer in range(3)]
    control = Predictor.fit(learnt.shuffled(), kind).recall(held_out, 8)
    assert all(control[layer] < chance[layer] + 0.02 for layer in range(3)), (control, chance)
    assert all(control[layer] < Predictor.fit(learnt, kind).recall(held_out, 8)[layer] - 0.2 for layer in range(3))


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_a_saved_predictor_guesses_the_same_and_says_what_it_took(kind, tmp_path):
    learnt, held_out = split()
    fitted = Predictor.fit(learnt, kind)
    fitted.save(tmp_path / "p.npz")
    loaded = Predictor.load(tmp_path / "p.npz")
    assert loaded.about == fitted.about
    assert loaded.recall(held_out, 8) == fitted.recall(held_out, 8)
    assert loaded.about["tokens"] == len(learnt)
    assert loaded.about["seconds"] > 0
    assert loaded.about["nbytes"] == 2 * loaded.about["parameters"]
    layers, experts = learnt.layers - 1, learnt.experts
    hidden = 64
    expected = {"ridge": (2 * experts + 1) * experts, "mlp": (2 * experts + 1) * hidden + (hidden + 1) * experts}
    assert loaded.about["parameters"] == layers * expected[kind]
    assert Predictor.fit(learnt, kind).recall(held_out, 8) == fitted.recall(held_out, 8), "a fit is repeatable"


def test_the_strategy_guesses_what_its_predictor_says_alone_or_dressed(tmp_path):
    """In a dressed model too, a layer is foreseen as well as the recorded one it repeats, and no better."""
    requests, own = recorded()
    learnt, held_out = split()
    Predictor.fit(learnt).save(tmp_path / "p.npz")
    expected = Predictor.load(tmp_path / "p.npz").recall(held_out, 8)
    for geometry in (None, "olmoe-1b-7b"):
        charged, layer_map = project(own, geometry)
        bench = ReplaySetup(trained_predictor(tmp_path / "p.npz"), charged, layer_map, profile("auto"), 160)
        _, ledger = time_requests(bench, requests[::3])
        per_layer = ledger.guesses
        for mine, layers in enumerate(layer_map):
            for layer in layers:
                source = mine - 1
                if source < 0:
                    assert layer not in per_layer
                else:
                    guessed = per_layer[layer]
                    assert guessed[1] / guessed[2] == pytest.approx(expected[source], abs=1e-9)


def test_without_a_file_it_learns_as_it_goes_and_then_guesses_better(monkeypatch):
    requests, own = recorded()
    charged, layer_map = project(own, None)
    monkeypatch.setattr("baselines.trained_predictor.FITTED_AT", (512, 1024))

    def right(strategy, asked):
        _, ledger = time_requests(ReplaySetup(strategy, charged, layer_map, profile("auto"), 96), asked)
        return sum(value[1] for value in ledger.guesses.values()) / sum(value[2] for value in ledger.guesses.values())

    from baselines.next_gate import NEXT_GATE

    assert right(TRAINED_PREDICTOR, requests[:5]) == right(NEXT_GATE, requests[:5])
    assert right(TRAINED_PREDICTOR, requests) > right(NEXT_GATE, requests) + 0.03


def test_the_command_fits_and_says_what_it_took(tmp_path):
    requests, own = recorded()
    for name, some in (("a", requests[:12]), ("b", requests[12:24])):
        trace.save(tmp_path / f"{name}.npz", some, own.moe_layers, {})
    code = [sys.executable, "-m", "baselines.trained_predictor", "fit", "--trace", "a.npz", "b.npz", "--out", "p.npz"]
    done = subprocess.run(
        [*code, "--kind", "mlp"], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    about = Predictor.load(tmp_path / "p.npz").about
    assert about["tokens"] == len(Examples.of(requests[:24]))
    for said in (f"{about['tokens']:,} tokens", f"{about['parameters']:,} parameters", f"{about['nbytes']:,} bytes"):
        assert said in done.stdout
    trace.save(tmp_path / "a.npz", [[replace(requests[0][1], ahead=None)]], own.moe_layers, {})
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, "one of the two still has what it needs"
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "recording(ahead=True)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_predictor_of_another_model_or_kind_or_no_predictor_is_refused(tmp_path):
    learnt, _ = split()
    fitted = Predictor.fit(learnt)
    with pytest.raises(Refused, match="fitted for 4 layers of 64 experts"):
        mobile.attach(tiny("olmoe"), trained_predictor(fitted), slots=8)
    with pytest.raises(Refused, match="kind ridge, not mlp"):
        trained_predictor(fitted, "mlp")
    fitted.save(tmp_path / "p.npz")
    whole = (tmp_path / "p.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no"):
        (tmp_path / "p.npz").write_bytes(content)
        with pytest.raises(Refused, match=r"python -m baselines\.trained_predictor fit"):
            trained_predictor(tmp_path / "p.npz")
    assert Trained(PolicyContext(GEOMETRIES["olmoe-1b-7b"], 136)).predictor is None


def test_a_policy_that_follows_is_told_of_each_pass_once_and_of_its_prefill():
    told = []

    class Listener(Fate):
        def begin(self, kind):
            told.append(kind)

        def streamed(self, layer, experts, counts):
            told.append((layer, tuple(experts), tuple(counts)))

    geometry = replace(GEOMETRIES["olmoe-1b-7b"], moe_layers=2, experts=4, top_k=2)
    strategy = replace(FATE, evict=Listener, lookahead=Listener)
    steps = [Step("prefill", 3, ((0, 1), (2,)), ((2, 1), (3,))), Step("full", 1, ((0, 1), (2, 3)))]
    residency = ReplaySetup(strategy, geometry, ((0,), (1,)), profile("auto"), 4).residency()
    trace.replay([steps], residency, ((0,), (1,)))
    assert told == ["prefill", (0, (0, 1), (2, 1)), (1, (2,), (3,)), "full"]
    assert isinstance(residency.ledger, Ledger)


def test_what_a_predictor_took_stands_beside_its_results(monkeypatch):
    """Not in the ledger, which stays the same from run to run."""
    monkeypatch.setattr("baselines.trained_predictor.FITTED_AT", (64, 128))
    requests, own = recorded()
    charged, layer_map = project(own, "olmoe-1b-7b")
    online = ReplaySetup(TRAINED_PREDICTOR, charged, layer_map, profile("auto"), 200)
    first, again = replay_requests(online, requests), replay_requests(online, requests)
    assert (first.ledger.counters, first.ledger.guesses) == (again.ledger.counters, again.ledger.guesses)
    took = first.training
    assert (took.tokens, took.fits, took.online) == (128, 2, True)
    assert took.seconds > 0
    assert took.parameters == (own.moe_layers - 1) * (2 * own.experts + 1) * own.experts
    assert outcome(online, requests).training.tokens == 128
    fitted = Predictor.fit(Examples.of(requests[:12]))
    before = replay_requests(replace(online, strategy=trained_predictor(fitted)), requests).training
    assert (before.tokens, before.seconds, before.fits, before.online) == (
        fitted.about["tokens"],
        fitted.about["seconds"],
        1,
        False,
    )
    assert replay_requests(replace(online, strategy=FATE), requests).training is None
    assert replay_requests(online, requests[:1]).training is None, "nothing was fitted yet"
