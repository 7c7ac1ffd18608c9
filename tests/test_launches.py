"""A decode step waits for the device once a layer, once a little pass and once a fallback. Counted, not timed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, greedy, prompt
from conftest import tiny as plain
from families import FAMILIES
from families import tiny as any_family
from launches import Counts, counted, counting, decode_step, launches_of
from test_kernels import case

import mobile
from baselines.cache_prior import cache_prior
from baselines.drop_cold import drop_cold
from baselines.least_stale import LEAST_STALE
from baselines.on_demand import ON_DEMAND_OVERLAP
from mobile.costs.cost_model import DENSE_LAUNCHES, EXPERT_LAUNCHES, HEAD_LAUNCHES, ROUTER_LAUNCHES
from mobile.kernels import group, loop
from mobile.policies.big_little import MOBILE
from mobile.policies.mobile_cached import mobile_cached
from mobile.policies.signals import SIGNALS
from mobile.policies.strategy import BigLittle

ONE_PASS = ["on-demand", "on-demand-overlap", "lru", "lfu", "static-half", "ser", "cpu-hybrid", "resident"]
LOOKAHEADS = ["next-gate", "pre-gated", "adapmoe", "fate", "speculating-experts", "trained-predictor"]
CACHED = [cache_prior(), drop_cold(), LEAST_STALE]


def tiny(family: str) -> Any:
    return plain(family) if family in CONFIGS else any_family(family)


def step(family: str, strategy: Any, rows: int = 1, recording: bool = False, **options: Any) -> Counts:
    """The counts of one decode step of a tiny model, and the stock model's beside them as `.stock`."""
    model = tiny(family)
    stock, expected = decode_step(model, rows=rows)
    mobile.attach(model, strategy, slots=24, hardware="rtx4080-pcie4", **options)
    if recording:
        with model.mobile.recording(ahead=True):
            counts, output = decode_step(model, rows=rows)
    else:
        counts, output = decode_step(model, rows=rows)
    counts.stock, counts.layers = stock, len(model.mobile.layers)
    if model.mobile.strategy.lossless:
        assert torch.equal(output.logits, expected.logits), "counting changed something"
    return counts


def hold(counts: Counts, passes: int = 1, between: int = 0) -> None:
    """Hold a step to one wait a layer and pass, to so many between passes, and to the stock model's own elsewhere."""
    assert not counts.unready, "a value was read before its copy was waited for"
    assert counts.waits["experts"] <= counts.layers * passes, counts.causes
    assert counts.waits["between"] <= between, counts.causes
    assert counts.waits["replay"] == counts.waits["copies"] == 0, counts.causes
    for place in ("layer", "rest"):
        assert counts.waits[place] <= counts.stock.waits[place] * passes, counts.causes
        assert counts.launches[place] == counts.stock.launches[place] * passes


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("strategy", [*ONE_PASS, *LOOKAHEADS, *CACHED], ids=lambda value: getattr(value, "name", value))
def test_a_decode_step_waits_once_a_layer(strategy, rows):
    hold(step("olmoe", strategy, rows))


@pytest.mark.parametrize("name", sorted({*CONFIGS, *FAMILIES}))
def test_it_does_in_every_family(name):
    for strategy, passes, between in (("lru", 1, 0), ("next-gate", 1, 0), ("mobile", 2, 2)):
        try:
            counts = step(name, strategy, **({"gamma": 1.1} if strategy == "mobile" else {}))
        except (mobile.Refused, AttributeError, TypeError):  # refused, or no model that is given ids and a cache
            continue
        hold(counts, passes, between)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_little_pass_waits_once_more_and_a_fallback_once_more_again(signal, rows):
    for gamma, passes, between in ((0.0, 1, 1), (1.1, 2, 2)):
        strategy = replace(MOBILE, gating=BigLittle(gamma, signal))
        hold(step("olmoe", strategy, rows), passes=passes, between=between)


@pytest.mark.parametrize("signal", SIGNALS)
def test_rows_that_are_sure_beside_rows_that_fall_cost_no_wait(signal):
    """Their experts are kept, and their logits are put back, on the device."""
    model = tiny("olmoe")
    mobile.attach(model, "mobile", slots=24)
    with torch.no_grad():
        cache = model(prompt(rows=8), use_cache=True).past_key_values
        for gamma in [n / 50 for n in range(1, 50)]:
            with model.mobile.gated(BigLittle(gamma, signal)), counted(model) as counts:
                model(torch.full((8, 1), 7), past_key_values=cache, use_cache=True)
            cache.crop(-1)
            counts.layers, counts.stock = 3, counts
            assert not counts.unready
            assert counts.waits["experts"] <= 6
            assert counts.waits["between"] <= 2, counts.causes
            if counts.operators["between", "where"]:
                return
    pytest.fail("no gamma parted the rows")


def test_the_composition_with_cached_choices_waits_no_more():
    hold(step("olmoe", mobile_cached(gamma=1.1)), passes=2, between=2)


@pytest.mark.parametrize("strategy", ["lru", "next-gate"])
def test_a_recording_adds_no_wait_to_a_layer(strategy):
    hold(step("olmoe", strategy, recording=True))
    hold(step("olmoe", "mobile", recording=True, gamma=1.1), passes=2, between=2)


@pytest.mark.parametrize(("strategy", "passes", "between"), [("lru", 1, 0), ("mobile", 2, 2)])
def test_rows_that_generate_ends_are_known_without_a_wait(strategy, passes, between):
    """generate() itself has waited for its criteria when the next pass begins."""
    model, tokens = tiny("olmoe"), 6
    mobile.attach(model, strategy, slots=24, **({"gamma": 1.1} if strategy == "mobile" else {}))
    with counted(model) as counts:
        greedy(model, prompt(rows=3), tokens)
    assert not counts.unready
    assert counts.waits["between"] <= (tokens - 1) * between + 1, counts.causes  # the prompt's padding is counted
    assert counts.waits["experts"] <= 3 * (1 + (tokens - 1) * passes), counts.causes


def test_one_token_gathers_and_scatters_nothing(family):
    little, full = (step(family, name) for name in ("static-half", "lru"))
    for counts in (little, full):
        inside = {name for place, name in counts.operators if place == "experts"}
        assert not {name for name in inside if name.startswith("index") or name in ("gather", "sort")}
    layers, k = full.layers, tiny(family).config.num_experts_per_tok
    assert (full.launches["experts"] - little.launches["experts"]) / (layers * (k - k // 2)) == 6
    assert full.launches["experts"] == layers * (2 + 6 * k), "the ids are read, the sum begins at zero"


def test_counting_tells_the_stock_models_waits():
    """Otherwise a bound on ours would say nothing. Eager experts: one `nonzero` a layer, and four waits an expert."""
    stock, _ = decode_step(tiny("olmoe"))
    assert stock.waits["layer"] == stock.waits["rest"] == 0
    assert stock.waits["experts"] >= 3 * (1 + 4 * 4)


def test_a_value_that_is_read_while_it_is_under_way_is_told():
    from mobile.transfer import Reading

    model = mobile.attach(tiny("olmoe"), "lru", slots=24)
    with counted(model) as counts:
        reading = Reading([torch.arange(3)])
        reading._host[0].tolist()
        assert counts.unready.total() == 1
        reading.get()[0].tolist()
        assert counts.unready.total() == 1
        assert counts.waits.total() == 1
        torch.arange(3)[torch.arange(3) > 1]
        torch.arange(3).sum().item()
        bool(torch.arange(3).any())
        torch.arange(3).unique()
        torch.tensor([1, 2], device=torch.device("cpu"))
        assert counts.waits.total() == 6, counts.causes


# --- kernels that take index tensors -----------------------------------------------------------------


def test_the_grouped_kernel_sends_its_indices_once_a_layer_and_once_a_wave():
    """From page-locked memory, so that nothing waits; eager's indices wait for the device."""
    for rows in (1, 3):
        counts = step("olmoe", ON_DEMAND_OVERLAP, rows, kernel="grouped")
        assert counts.waits["experts"] == counts.layers, counts.causes
        waves = counts.launches["copies"]  # each expert is loaded, and is a wave of its own
        assert counts.operators["experts", "copy to the device"] == counts.layers + waves


def test_the_decode_kernel_sends_its_indices_once_a_wave(monkeypatch):
    pytest.importorskip("triton")
    from mobile.kernels import triton_gemv

    def products(weights: Any, slots: Any, x: Any, rows: Any, *, transposed: bool) -> torch.Tensor:
        chosen = weights[slots].transpose(1, 2) if transposed else weights[slots]
        return torch.einsum("pnk,pk->pn", chosen, x[rows])

    monkeypatch.setattr(triton_gemv, "products", products)
    experts, hidden, index, scores, groups, waves, views = case("olmoe", torch.float32, 3)
    expected = loop(experts, hidden, scores, groups, waves, views)
    waves, counts = [waves[0] + waves[1], waves[2] + waves[-1], *([wave] for (wave,) in waves[3:-1])], Counts()
    with counting(counts):
        result = triton_gemv._few(experts, hidden, scores, group(index, 8), waves, views)
    assert torch.allclose(result, expected, atol=1e-5)
    assert counts.operators["outside", "copy to the device"] == len(waves)
    assert not counts.waits, counts.causes


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton may have what it needs")
def test_the_decode_kernel_is_refused_where_a_kernel_cannot_be_compiled(monkeypatch):
    """Its launcher takes a C compiler, which a bare machine may lack though the driver's module was built before."""
    triton_gemv = pytest.importorskip("mobile.kernels.triton_gemv")
    target = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="cuda"))
    monkeypatch.setattr(triton_gemv, "driver", SimpleNamespace(active=target))
    reason = triton_gemv.why_not(torch.device("cuda:0"))
    assert reason is not None
    assert reason.startswith("Triton compiles no kernel here (")


def test_the_cost_model_charges_the_launches_that_are_counted():
    """The four families' mean: a layer of 46 to 57 launches is charged as one of 52."""
    counts = [launches_of(tiny(family), 24) for family in ("olmoe", "qwen2_moe", "deepseek_v2", "qwen3_moe")]

    def mean(*parts: str) -> float:
        return sum(each[part] for each in counts for part in parts) / len(counts)

    assert pytest.approx(mean("layer", "routing"), rel=0.03) == DENSE_LAUNCHES
    assert mean("expert") == EXPERT_LAUNCHES
    assert pytest.approx(mean("replay"), abs=0.5) == ROUTER_LAUNCHES
    olmoe = counts[0]  # one without leading dense layers or masks of its own
    assert olmoe["head"] + olmoe["confidence"] in (HEAD_LAUNCHES, HEAD_LAUNCHES - 1)  # by release of Transformers
