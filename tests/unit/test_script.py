"""Scripts: what they draw, how often they are unsure, and how a recorded run becomes one."""

from __future__ import annotations

import numpy as np
import pytest

from mobile.errors import Refused
from mobile.replay.trace import Step
from suites.synthetic.script import Script, ScriptLength, drawn, recorded, with_rate


def some(routing: str = "uniform", **more: int) -> Script:
    sizes = {"layers": 3, "experts": 16, "top_k": 4, "steps": 400, "warmup": 0, "seed": 7} | more
    length = ScriptLength(5, sizes.pop("steps"), sizes.pop("warmup"))
    return drawn(routing, length, **sizes)


def test_a_drawn_script_names_k_distinct_experts_for_each_token_of_each_layer():
    script = some("zipf 1.0")
    assert script.full.shape == (400, 3, 4)
    assert script.prompt.shape == (5, 3, 4)
    assert all(len(set(chosen)) == 4 for chosen in script.full.reshape(-1, 4).tolist())
    assert 0 <= script.full.min() < script.full.max() == 15
    assert script.little is script.full


def test_the_seed_fixes_a_script():
    assert some().sha256 == some().sha256
    assert len({some().sha256, some(seed=8).sha256, some("zipf 1.0").sha256}) == 3


def test_uniform_routing_uses_every_expert_alike_and_zipf_does_not():
    uniform, zipf = (np.bincount(some(routing).full[:, 0].ravel(), minlength=16) for routing in ("uniform", "zipf 1.2"))
    assert uniform.max() < 1.4 * uniform.min()
    assert zipf.max() > 5 * zipf.min()


@pytest.mark.parametrize("routing", ["", "zipf", "zipf much", "uniform 2", "recorded"])
def test_routing_that_nobody_knows_is_refused(routing):
    with pytest.raises(Refused, match="Unknown routing"):
        some(routing)


@pytest.mark.parametrize("rate", [0, 0.05, 0.1, 0.3, 0.5, 1])
def test_a_rate_is_kept_exactly_in_the_counted_steps(rate):
    script = with_rate(some(steps=43, warmup=3), rate, seed=1)
    assert (script.counted, script.fallbacks) == (40, round(40 * rate))
    assert script.sha256 == some(steps=43, warmup=3).sha256  # fallbacks are no part of what is chosen
    assert np.array_equal(script.unsure, with_rate(some(steps=43, warmup=3), rate, seed=1).unsure)


def test_a_rate_outside_of_its_range_is_refused():
    with pytest.raises(Refused, match="share of the decode steps"):
        with_rate(some(), 1.2, seed=0)


def test_a_recorded_run_keeps_what_both_passes_chose_and_how_sure_the_little_one_was():
    prompt = Step("prefill", 3, experts=((0, 2, 5), (1, 3)), counts=((1, 3, 2), (3, 3)))
    steps = [
        Step("little", 1, experts=((4,), (3,)), confidence=0.6),
        Step("big", 1, experts=((4, 5), (2, 3)), predicted=((1, 4), (2, 3))),
        Step("little", 1, experts=((0,), (1,)), confidence=0.9),
        Step("big", 1, experts=((0, 1), (0, 1)), predicted=((0, 1), (1, 5))),
    ]
    script = recorded(prompt, [steps[:2], steps[2:]], layers=5, gamma=0.7, warmup=0, source="a run")
    assert script.unsure.tolist() == [True, False]
    assert script.full[0].tolist() == [[4, 5]] * 3 + [[2, 3]] * 2  # two recorded layers stand for five
    assert script.little[0].tolist() == [[4, 1]] * 3 + [[3, 2]] * 2  # the little pass's own expert first
    for layer, counts in ((0, {0: 1, 2: 3, 5: 2}), (4, {1: 3, 3: 3})):
        told = script.prompt[:, layer].ravel().tolist()
        assert {expert: told.count(expert) for expert in told} == counts
        assert all(len(set(token)) == 2 for token in script.prompt[:, layer].tolist())
    assert script.first(1).steps == 1
