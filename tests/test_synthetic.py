"""Synthetic models: the real sizes, made where they are kept, and playing a script as the script says."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mobile.costs.geometry import GEOMETRIES
from mobile.errors import Refused
from mobile.live_model.compat import geometry_of
from mobile.machine.host import host
from mobile.replay.replay import ReplaySetup, replay_requests
from mobile.replay.trace import Request
from suites.synthetic import models
from suites.synthetic.models import Synthetic, config_of, layers_that_fit, make
from suites.synthetic.script import Script, ScriptLength, drawn, with_rate
from suites.synthetic.script_player import play

WARMUP, COUNTED = 2, 12


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(GEOMETRIES))
def made(request) -> Synthetic:
    return make(request.param, layers=2, shrink=16, device="cpu", dtype=torch.float32)


def script_for(made: Synthetic, routing: str = "uniform", rate: float = 0.25) -> Script:
    sizes = made.geometry
    script = drawn(
        routing,
        ScriptLength(prompt_tokens=5, steps=WARMUP + COUNTED, warmup=WARMUP),
        layers=sizes.moe_layers,
        experts=sizes.experts,
        top_k=sizes.top_k,
        seed=3,
    )
    return with_rate(script, rate, seed=3)


def decoded(request: Request) -> list[tuple[str, list[set[int]]]]:
    return [(step.kind, [set(experts) for experts in step.experts]) for step in request if step.kind != "prefill"]


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_the_configurations_have_the_published_sizes(name):
    real = GEOMETRIES[name]
    empty, layers, layout = models._empty(config_of(name), torch.bfloat16)
    sizes = geometry_of(empty, layers, layout)
    for exact in ("moe_layers", "experts", "top_k", "expert_nbytes", "router_nbytes", "head_nbytes", "weight_nbytes"):
        assert getattr(sizes, exact) == getattr(real, exact), exact
    assert sizes.dense_nbytes == pytest.approx(real.dense_nbytes, rel=1e-3)  # norms and biases
    assert sizes.embedding_nbytes == real.embedding_nbytes


def test_a_shrunk_configuration_keeps_layers_experts_and_top_k(made):
    real = GEOMETRIES[made.geometry.name.split(" ")[0]]
    assert (made.geometry.experts, made.geometry.top_k) == (real.experts, real.top_k)
    assert (made.geometry.moe_layers, made.real_layers) == (2, real.moe_layers)
    assert made.geometry.expert_nbytes < real.expert_nbytes / 100


def test_experts_lie_in_the_store_and_nowhere_else_and_differ(made):
    assert all(weight.numel() == 0 for layer in made.layers for weight in layer.experts.parameters())
    rows = torch.cat(made.store.rows)
    assert made.store.nbytes == rows.nbytes == made.geometry.total_experts * made.geometry.expert_nbytes
    assert len({row.numpy().tobytes() for row in rows}) == made.geometry.total_experts
    assert 0.015 < rows.std() < 0.025


def test_as_many_layers_are_made_as_the_free_memory_holds(monkeypatch, tmp_path):
    def with_free(nbytes: int):
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: {2**40} kB\nMemAvailable: {nbytes // 1024} kB\n")
        monkeypatch.setattr(models, "host", lambda: host(tmp_path))

    layer = GEOMETRIES["qwen3-30b-a3b"].experts * GEOMETRIES["qwen3-30b-a3b"].expert_nbytes
    with_free(models.LEFT_FREE + 5 * layer + layer // 2)
    assert layers_that_fit("qwen3-30b-a3b") == 5
    with pytest.raises(Refused, match="holds 5 layers of qwen3-30b-a3b and not 6"):
        make("qwen3-30b-a3b", layers=6, device="cpu")
    with_free(2**50)
    assert layers_that_fit("qwen3-30b-a3b") == 48
    with_free(layer)
    with pytest.raises(Refused, match="One layer of qwen3-30b-a3b takes"):
        layers_that_fit("qwen3-30b-a3b")


def test_what_cannot_be_made_is_refused():
    with pytest.raises(Refused, match="Unknown geometry"):
        config_of("olmoe")
    with pytest.raises(Refused, match="has 16 MoE layers"):
        config_of("olmoe-1b-7b", 17)


def test_every_strategy_is_given_the_scripts_own_selections(made):
    script = script_for(made)
    expected = [[set(layer) for layer in step] for step in script.full.tolist()]
    for strategy in ("on-demand", "on-demand-overlap", "lru"):
        with made.attached(strategy, slots=2 * made.geometry.top_k, poison=True) as engine, engine.recording() as seen:
            play(made, script)
        assert decoded(seen[0]) == [("full", step) for step in expected]
        assert [dict(zip(e, c, strict=True)) for e, c in zip(seen[0][0].experts, seen[0][0].counts, strict=True)] == [
            {e: int((script.prompt[:, n] == e).sum()) for e in sorted(set(script.prompt[:, n].ravel().tolist()))}
            for n in range(script.layers)
        ]


def test_mobile_falls_back_exactly_where_the_script_is_unsure(made):
    script = script_for(made)
    half = made.geometry.little_k
    expected = []
    for little, full, unsure in zip(script.little.tolist(), script.full.tolist(), script.unsure, strict=True):
        expected.append(("little", [set(layer[:half]) for layer in little]))
        expected += [("big", [set(layer) for layer in full])] if unsure else []
    with made.attached("mobile", slots=2 * made.geometry.top_k, poison=True) as engine, engine.recording() as seen:
        played = play(made, script)
        foreseen, right, needed = (sum(column) for column in zip(*engine.ledger.guesses.values(), strict=True))
    assert decoded(seen[0]) == expected
    assert played.fallbacks == script.fallbacks == round(0.25 * COUNTED)
    assert foreseen == right == needed > 0  # little equals full in a drawn script, so every prediction is right
    confidence = [step.confidence for step in seen[0] if step.kind == "little"]
    assert all(
        (sure < 0.01) if unsure else (sure > 0.99) for sure, unsure in zip(confidence, script.unsure, strict=True)
    )


def test_what_a_recorded_little_pass_predicted_is_what_is_prefetched(made):
    drawn_ = script_for(made, rate=1.0)
    other = script_for(made, "zipf 1.0", rate=1.0)
    script = Script("mixed", drawn_.prompt, drawn_.little, other.full, drawn_.unsure, WARMUP)
    with made.attached("mobile", slots=made.geometry.total_experts, poison=True) as engine, engine.recording() as seen:
        play(made, script)
    big = [step for step in seen[0] if step.kind == "big"]
    for step, little, full in zip(big, script.little.tolist(), script.full.tolist(), strict=True):
        assert [set(layer) for layer in step.predicted] == [set(layer) for layer in little]
        assert [set(layer) for layer in step.experts] == [set(layer) for layer in full]


def test_bytes_are_loads_times_the_row_and_loads_are_the_scripts(made):
    script, geometry = script_for(made), made.geometry
    with made.attached("on-demand", slots=geometry.top_k):
        played = play(made, script)
    assert played.counters.loads == COUNTED * geometry.moe_layers * geometry.top_k
    assert played.decode_bytes == played.counters.loads * geometry.expert_nbytes
    with made.attached(
        "static-half", slots=geometry.total_experts
    ) as engine:  # nothing is evicted: each expert is copied once
        play(made, script)
        stats = engine.stats()
    touched = {
        (layer, expert)
        for choice in (script.prompt, script.little[..., : geometry.little_k])
        for token in choice.tolist()
        for layer, experts in enumerate(token)
        for expert in experts
    }
    assert stats["loads"] == len(touched)
    assert stats["bytes_loaded"] == len(touched) * geometry.expert_nbytes
    assert stats["fallbacks"] == 0


@pytest.mark.parametrize("strategy", ["on-demand", "on-demand-overlap", "lru", "static-half", "mobile", "resident"])
def test_virtual_time_equals_a_replay_to_the_nanosecond(made, strategy):
    scripts = [script_for(made), script_for(made, "zipf 1.0", 0.5)]
    geometry = made.geometry
    slots = geometry.total_experts if strategy == "resident" else 3 * geometry.top_k
    with made.attached(strategy, slots=slots, link="virtual", link_gb_per_s=12) as engine:
        with engine.recording() as seen:
            played = [play(made, script) for script in scripts]
        live = engine.ledger.counters
        on = ReplaySetup(engine.strategy, engine.geometry, engine.layer_map, engine.hardware, engine.slots)
    taken, ledger, _ = replay_requests(on, seen)
    assert ledger.counters == live
    for one, whole, request in zip(played, taken, seen, strict=True):
        assert one.prefill_ns == whole.prefill_ns
        warm = [n for n, step in enumerate(request) if step.kind in ("full", "little")][WARMUP]
        earlier = seen[: seen.index(request)]
        before = replay_requests(on, [*earlier, request[:warm]]).requests[-1]
        assert one.decode_ns == whole.decode_ns - before.decode_ns


def test_the_model_is_attached_again_and_again_and_gives_the_same(made):
    script, slots = script_for(made), 2 * made.geometry.top_k

    def once():
        with made.attached("mobile", slots=slots, link_gb_per_s=25):
            return play(made, script)

    assert once() == once()
    assert not hasattr(made.model, "mobile")


@pytest.mark.parametrize("link", ["virtual", "paced"])
def test_slots_are_given_back_when_the_engine_is_done_whoever_keeps_it(made, link):
    """As many again fit then: a real model's slots take most of a card, and its cell is played once more, predicted."""
    with made.attached("lru", slots=2 * made.geometry.top_k, link=link) as engine:
        play(made, script_for(made))
        held = StorageWeakRef(engine.slot_rows.untyped_storage())
        assert not held.expired()
    gc.collect()
    assert held.expired()
    assert engine.stats()["loads"] > 0


def test_over_a_paced_link_time_is_real_and_the_work_the_same(made):
    script, slots = script_for(made), 2 * made.geometry.top_k
    with made.attached("on-demand", slots=slots, link="virtual", link_gb_per_s=1):
        virtual = play(made, script)
    with made.attached("on-demand", slots=slots, link="paced", link_gb_per_s=1):
        paced = play(made, script)
    assert paced.decode_bytes == virtual.decode_bytes
    assert paced.decode_ns > 0.95 * paced.decode_bytes  # a byte a nanosecond at most


def test_a_script_of_another_shape_is_refused(made):
    sizes = {"layers": 3, "experts": made.geometry.experts, "top_k": made.geometry.top_k}
    script = drawn("uniform", ScriptLength(prompt_tokens=2, steps=2), **sizes, seed=0)
    with made.attached("on-demand", slots=8), pytest.raises(Refused, match="The script is for 3 layers"):
        play(made, script)


@pytest.mark.slow
def test_one_layer_of_a_real_geometry_plays():
    made = make("olmoe-1b-7b", layers=1, device="cpu")
    script = script_for(made)
    with made.attached("on-demand-overlap", slots=8):
        played = play(made, script)
    assert played.decode_bytes == COUNTED * 8 * GEOMETRIES["olmoe-1b-7b"].expert_nbytes
