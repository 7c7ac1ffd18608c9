"""Confidence signals: each decides as an independent loop over the stock model does, in a batch and in a replay."""

from __future__ import annotations

import copy
from dataclasses import replace

import families
import pytest
import torch
from conftest import greedy, live_and_replayed, prompt, tiny
from test_two_pass import between, routers

import mobile
from mobile.cli import main
from mobile.costs.cost_model import CostModel
from mobile.errors import Refused
from mobile.policies.big_little import MOBILE
from mobile.policies.signals import PROBABILITY, SIGNALS
from mobile.policies.strategy import BigLittle
from mobile.replay import trace
from mobile.replay.replay import why_not_replayable

COMPUTED = [name for name in SIGNALS if name != "random"]
ROUTERS_AGAIN = ["coverage", "product"]


def judging(signal: str, gamma: float, **changed):
    return replace(MOBILE, gating=BigLittle(gamma, signal), **changed)


def by_hand(signal: str, logits: torch.Tensor, shares: list[float]) -> float:
    """The signal from the logits (V,) of one token, and each layer's share of router weight on its K/2 heaviest."""
    p = sorted(logits.double().softmax(-1).tolist(), reverse=True)
    covered = sum(shares) / len(shares)
    entropy = -sum(each * torch.tensor(each).log().item() for each in p if each > 0)
    return {
        "probability": p[0],
        "margin": p[0] - p[1],
        "entropy": 1 - entropy / torch.tensor(float(len(p))).log().item(),
        "coverage": covered,
        "product": p[0] * covered,
    }[signal]


@torch.no_grad()
def reference(model, ids: torch.Tensor, signal: str, gamma: float) -> tuple[list[int], int, list[float]]:
    """Ten tokens, the fallbacks and the confidences, on a stock model whose cache is copied before a little step."""
    full, seen = model.config.num_experts_per_tok, []

    def step(last, cache, top_k):
        for router in routers(model):
            router.top_k = top_k
        return model(last, past_key_values=cache, use_cache=True)

    def share(router, given) -> float:
        router.top_k, watched = full, router._forward_pre_hooks.copy()
        router._forward_pre_hooks.clear()
        weights = min((part for part in router(*given) if part.is_floating_point()), key=lambda part: part.shape[-1])
        router._forward_pre_hooks.update(watched)
        ordered = sorted(weights.flatten().tolist(), reverse=True)
        return sum(ordered[: full // 2]) / sum(ordered)

    hooks = [router.register_forward_pre_hook(lambda r, given: seen.append((r, given))) for router in routers(model)]
    out = step(ids, None, full)
    written, fallbacks, found = [int(out.logits[0, -1].argmax())], 0, []
    while len(written) < 10:
        last, kept = torch.tensor([[written[-1]]]), copy.deepcopy(out.past_key_values)
        seen.clear()
        out = step(last, out.past_key_values, full // 2)
        found.append(by_hand(signal, out.logits[0, -1], [share(*each) for each in list(seen)]))
        if found[-1] < gamma:
            fallbacks += 1
            out = step(last, kept, full)
        written.append(int(out.logits[0, -1].argmax()))
    for router, hook in zip(routers(model), hooks, strict=True):
        hook.remove()
        router.top_k = full
    return written, fallbacks, found


@pytest.mark.parametrize("signal", COMPUTED)
def test_a_signal_falls_back_where_an_independent_loop_does(family, signal):
    model, ids = tiny(family), prompt()
    gamma = between(reference(model, ids, signal, 0.0)[2])
    written, fallbacks, found = reference(model, ids, signal, gamma)
    mobile.attach(model, judging(signal, gamma), slots=8, poison=True)
    with model.mobile.recording() as requests:
        assert greedy(model, ids)[0][0, ids.shape[1] :].tolist() == written
    assert model.mobile.stats()["fallbacks"] == fallbacks
    assert 0 < fallbacks < 9
    recorded = [step.confidence for step in requests[0] if step.kind == "little"]
    assert recorded == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("signal", SIGNALS)
def test_gamma_above_one_is_full_k_and_gamma_zero_never_falls_back(signal):
    model, ids = tiny("olmoe"), prompt()
    logits = greedy(model, ids)[1]
    mobile.attach(model, judging(signal, 1.01), slots=8, poison=True)
    assert torch.equal(greedy(model, ids)[1], logits)
    assert model.mobile.stats()["fallbacks"] == model.mobile.stats()["tokens"] == 9
    mobile.detach(model)
    mobile.attach(model, judging(signal, 0.0), slots=8, poison=True)
    greedy(model, ids)
    assert model.mobile.stats()["fallbacks"] == 0


@pytest.mark.parametrize("signal", ["margin", "product", "random"])
def test_no_rows_confidence_depends_on_its_batch(family, signal):
    model, ids = tiny(family), prompt(rows=4)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    mobile.attach(model, judging(signal, 0.0), slots=8)
    with model.mobile.recording() as requests:
        greedy(model, ids)
    gamma = between([step.confidence for request in requests for step in request if step.kind == "little"])
    mobile.detach(model)
    mobile.attach(model, judging(signal, gamma), slots=8, poison=True)
    with model.mobile.recording() as together:
        batch, _ = greedy(model, ids)
    assert len({tuple(step.kind for step in request) for request in together}) > 1
    for row in range(4):
        with model.mobile.recording() as alone:
            single, _ = greedy(model, ids[row : row + 1])
        assert batch[row].tolist() == single[0].tolist()
        assert [step.kind for step in alone[0]] == [step.kind for step in together[row]]


def test_random_falls_back_at_the_rate_of_gamma_whatever_the_probability_is():
    model = mobile.attach(tiny("olmoe"), judging("random", 0.3), slots=8)
    for seed in range(6):
        greedy(model, prompt(rows=8, seed=seed), tokens=12)
    stats = model.mobile.stats()
    assert 0.24 < stats["fallbacks"] / stats["tokens"] < 0.36  # three standard errors of 528 tokens


@pytest.mark.parametrize("signal", ROUTERS_AGAIN)
def test_asking_the_routers_again_is_charged_on_every_token_live_and_replayed(family, signal, tmp_path):
    model = tiny(family)
    strategy = judging(signal, 0.4)
    live, again = live_and_replayed(model, strategy, 12, tmp_path / "t.npz")
    assert again.counters == live.counters
    assert again.events == live.events
    charged = [event for event in live.events if "router replay" in map(str, event)]
    assert len(charged) == live.counters.tokens == 18


def test_the_replay_before_a_fallback_is_not_charged_twice(tmp_path):
    model = tiny("olmoe")
    counters = {}
    for signal in (PROBABILITY, "coverage"):
        ledger, _ = live_and_replayed(model, judging(signal, 1.01), 24, tmp_path / f"{signal}.npz")
        counters[signal] = ledger.counters
    assert counters["coverage"] == counters[PROBABILITY]  # every token falls back, so each has one replay
    quiet, _ = live_and_replayed(model, judging("coverage", 0.0), 24, tmp_path / "quiet.npz")
    plain, _ = live_and_replayed(model, judging(PROBABILITY, 0.0), 24, tmp_path / "plain.npz")
    mobile.attach(model, MOBILE, slots=24)
    cost = CostModel(model.mobile.hardware, model.mobile.geometry)
    assert (
        quiet.counters.decode_ns - plain.counters.decode_ns
        == 18 * max(cost.router_replay_ns, cost.host.router_replay)
        > 0
    )


def test_a_trace_of_another_signal_is_not_replayed(tmp_path):
    model = mobile.attach(tiny("olmoe"), judging("margin", 0.3), slots=8)
    with model.mobile.recording() as requests:
        greedy(model, prompt())
    assert why_not_replayable(judging("margin", 0.3), model.mobile.strategy, requests) is None
    assert "margin" in why_not_replayable(judging(PROBABILITY, 0.3), model.mobile.strategy, requests)
    assert "fallbacks otherwise" in why_not_replayable(judging("margin", 0.0), model.mobile.strategy, requests)


def test_mobile_replay_goes_by_the_signal_that_a_trace_names(tmp_path, capsys):
    model = mobile.attach(tiny("olmoe"), judging("margin", 0.3), slots=8)
    with model.mobile.recording() as requests:
        greedy(model, prompt())
    about = {"geometry": model.mobile.geometry.as_record(), "strategy": "mobile", "gamma": 0.3}
    for signal, code in (("margin", 0), ("mood", 2), (3, 2)):
        trace.save(tmp_path / "t.npz", requests, 3, {**about, "signal": signal})
        assert main(["replay", str(tmp_path / "t.npz"), "--strategy", "mobile", "--slots", "8"]) == code
    assert "mood" in capsys.readouterr().err


def test_a_router_that_gives_no_weights_has_no_coverage():
    model = families.tiny("jamba")
    with pytest.raises(Refused, match="coverage is made of"):
        mobile.attach(model, judging("coverage", 0.5), slots=8)
    assert not hasattr(model, "mobile")
    mobile.attach(model, judging("margin", 0.5), slots=8)


def test_an_unknown_signal_is_refused():
    with pytest.raises(Refused, match="did you mean margin"):
        BigLittle(0.5, "margn")
