"""Statistics against reference implementations and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, gmean, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from reports.stats.intervals import Interval, Paired, expanded_tail, geometric_mean, paired, resampling_weights, wilson
from reports.stats.power import fewest_items, half_width, items_needed, power


def test_the_geometric_mean_is_scipys_and_so_is_the_interval_of_one_task():
    ratios = np.exp(np.random.default_rng(0).normal(0.5, 0.1, 40))
    drawn = geometric_mean([ratios])
    assert drawn.value == pytest.approx(gmean(ratios))
    assert geometric_mean([ratios[:15], ratios[15:]]).value == pytest.approx(gmean(ratios))
    level = 1 - 2 * expanded_tail(40)
    reference = bootstrap(
        (np.log(ratios),),
        np.mean,
        confidence_level=level,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (math.log(drawn.low), math.log(drawn.high)) == pytest.approx((reference.low, reference.high), abs=0.004)


def test_equal_ratios_have_no_spread_and_none_have_no_mean():
    assert geometric_mean([[2.0, 2.0], [2.0]]) == Interval(2.0, 2.0, 2.0)
    assert geometric_mean([[], [3.0]]).value == pytest.approx(3.0)
    with pytest.raises(ValueError, match="no ratio"):
        geometric_mean([[], []])


def test_a_resample_draws_whole_tasks_and_as_many_prompts_as_each_has():
    weights = resampling_weights((3, 5))
    assert weights.sum(axis=1) == pytest.approx(1)
    first = weights[:, :3].sum(axis=1)
    possible = (0, 3 / 8, 1)  # neither, one or both draws were the first task
    assert {min(possible, key=lambda p: abs(p - share)) for share in first} == set(possible)
    assert max(min(abs(p - share) for p in possible) for share in first) < 1e-12
    assert weights.mean(axis=0)[:3] == pytest.approx(weights[:, :3].mean(), abs=0.01), "no prompt is favoured"


def test_the_expanded_percentile_is_as_wide_as_students_interval():
    rng = np.random.default_rng(3)
    means = rng.normal(0, 0.05, 12)
    drawn = geometric_mean([[math.exp(mean)] * 2 for mean in means])
    half = t.ppf(0.975, 11) * means.std(ddof=1) / math.sqrt(12)
    assert (math.log(drawn.high) - math.log(drawn.low)) / 2 == pytest.approx(half, rel=0.12)


def test_the_two_level_interval_covers_where_tasks_differ():
    """Five tasks of twenty prompts; the plain percentile interval covers eight times in ten here."""
    rng, covered, plainly, rounds = np.random.default_rng(1), 0, 0, 120
    for _ in range(rounds):
        tasks = [rng.normal(0.5, 0.05) + rng.normal(0, 0.05, 20) for _ in range(5)]
        drawn = geometric_mean([np.exp(task) for task in tasks])
        covered += drawn.low <= math.exp(0.5) <= drawn.high
        low, high = np.quantile(resampling_weights((20,) * 5) @ np.concatenate(tasks), [0.025, 0.975])
        plainly += low <= 0.5 <= high
    assert covered / rounds >= 0.9
    assert covered > plainly


def test_paired_counts_the_discordant_items():
    counted = paired([True, True, False, False], [True, False, True, False])
    assert (counted.items, counted.lost, counted.gained) == (4, 1, 1)


@pytest.mark.parametrize(("lost", "gained"), [(10, 0), (3, 9), (1, 1), (40, 22), (0, 0)])
def test_mcnemar_is_statsmodels_exact_test(lost, gained):
    table = [[100, lost], [gained, 50]]
    assert Paired(150 + lost + gained, lost, gained).p_value == pytest.approx(mcnemar(table, exact=True).pvalue)


@pytest.mark.parametrize(("right", "items"), [(8, 10), (0, 40), (40, 40), (130, 250)])
def test_wilson_is_statsmodels(right, items):
    low, high = proportion_confint(right, items, method="wilson")
    drawn = wilson(right, items)
    assert (drawn.low, drawn.high) == pytest.approx((100 * low, 100 * high), abs=1e-9)


def test_the_paired_interval_covers_and_never_collapses():
    assert Paired(50, 0, 0).difference.low < 0 < Paired(50, 0, 0).difference.high
    rng, covered, rounds = np.random.default_rng(1), 0, 2000
    for both, lost, gained, _ in rng.multinomial(200, [0.6, 0.06, 0.03, 0.31], size=rounds):
        drawn = Paired(200, int(lost), int(gained)).difference
        covered += drawn.low <= -3.0 <= drawn.high
        assert both >= 0
    assert 0.94 <= covered / rounds <= 0.975


def test_negligible_needs_the_whole_interval_above_the_margin():
    assert Paired(10_000, 5, 5).within(1.0) == "yes"
    assert Paired(164, 0, 0).within(1.0) == "not shown", "HumanEval alone can never show one point"
    assert Paired(1000, 100, 0).within(1.0) == "no"


@pytest.mark.parametrize(("items", "walds"), [(164, 4.8), (200, 4.4), (1319, 1.7), (6511, 0.8)])
def test_the_half_width_is_walds_and_a_little_more_for_few_items(items, walds):
    """At ten percent discordant answers, for HumanEval, 200 items, GSM8K and BIG-Bench-Hard."""
    exact = 196 * math.sqrt(0.10 / items)
    assert exact == pytest.approx(walds, abs=0.05)
    assert exact < half_width(items, 0.10) < exact * (1 + 10 / items)


@pytest.mark.parametrize(("items", "discordant", "true_points"), [(164, 0.05, 0), (1319, 0.05, 0), (2000, 0.04, -0.5)])
def test_power_is_what_simulation_finds(items, discordant, true_points):
    gained = (discordant + true_points / 100) / 2
    rng = np.random.default_rng(7)
    drawn = rng.multinomial(items, [discordant - gained, gained, 1 - discordant], size=4000)
    shown = np.mean([Paired(items, int(lost), int(won)).within(1.0) == "yes" for lost, won, _ in drawn])
    assert power(items, discordant, 1.0, true_points) == pytest.approx(shown, abs=0.025)


def test_power_grows_to_what_was_asked_for():
    assert power(items_needed(0.05, 1.0), 0.05, 1.0) == pytest.approx(0.8, abs=0.03)
    assert power(fewest_items(1.0), 0.0, 1.0) == 1
    assert power(fewest_items(1.0) - 1, 0.0, 1.0) == 0
    with pytest.raises(ValueError, match="more than 1 %"):
        power(100, 0.01, 1.0, true_points=-3)
