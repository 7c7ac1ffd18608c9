"""Statistics against reference formulas and simulated coverage, and the verdict rule."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import gmean

from reports.stats import Interval, geometric_mean, paired, wilson
from reports.verdict import verdict


def test_the_geometric_mean_is_scipys_and_its_interval_covers():
    rng = np.random.default_rng(0)
    ratios = np.exp(rng.normal(0.5, 0.1, 40))
    assert geometric_mean(ratios).value == pytest.approx(gmean(ratios))
    covered = 0
    for _ in range(60):
        drawn = geometric_mean(np.exp(rng.normal(0.5, 0.1, 40)))
        covered += drawn.low <= math.exp(0.5) <= drawn.high
    assert covered >= 50


def test_equal_ratios_have_no_spread():
    assert geometric_mean([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    assert geometric_mean([3.0]).value == pytest.approx(3.0)


def test_paired_counts_the_discordant_items():
    counted = paired([True, True, False, False], [True, False, True, False])
    assert (counted.items, counted.lost, counted.gained) == (4, 1, 1)


def test_mcnemar_is_the_exact_binomial_test():
    lost_only = paired([True] * 10, [False] * 10)
    assert lost_only.p_value == pytest.approx(2 * 0.5**10)
    assert paired([True], [True]).p_value == 1.0


def test_the_paired_interval_covers_and_never_collapses():
    assert paired([True] * 50, [True] * 50).difference.low < 0 < paired([True] * 50, [True] * 50).difference.high
    rng, covered, rounds = np.random.default_rng(1), 0, 400
    for _ in range(rounds):
        kind = rng.choice(4, size=200, p=[0.6, 0.06, 0.03, 0.31])
        drawn = paired(np.isin(kind, [0, 1]).tolist(), np.isin(kind, [0, 2]).tolist()).difference
        covered += drawn.low <= -3.0 <= drawn.high
    assert covered / rounds >= 0.93


def test_negligible_needs_the_whole_interval_above_the_margin():
    def outcome(items: int, lost: int, gained: int) -> str:
        first = [True] * lost + [False] * gained + [True] * (items - lost - gained)
        second = [False] * lost + [True] * gained + [True] * (items - lost - gained)
        return paired(first, second).within(1.0)

    assert outcome(10_000, 5, 5) == "yes"
    assert outcome(164, 0, 0) == "not shown", "HumanEval alone can never show one point"
    assert outcome(1000, 100, 0) == "no"


def test_wilson_matches_the_textbook():
    drawn = wilson(8, 10)
    assert (round(drawn.low, 1), round(drawn.high, 1)) == (49.0, 94.3)


SCOPES, WEIGHTS = ("cpu+virtual", "gpu+throttled", "gpu+pcie", "anything"), ("real", "synthetic", "shipped-tiny")


@pytest.mark.parametrize(("scope", "weights"), list(product(SCOPES, WEIGHTS)))
def test_only_real_weights_on_a_real_link_can_be_reproduced(scope, weights):
    says = verdict(Interval(1.65, 1.64, 1.66), 1.60, 1.72, scope, weights)
    assert (says == "REPRODUCED") == ((scope, weights) == ("gpu+pcie", "real"))
    assert says == "REPRODUCED" or says.startswith("NOT COMPARABLE")


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(1.50, 1.55, "SHORT"), (1.80, 1.90, "EXCEEDS"), (1.55, 1.57, "REPRODUCED"), (1.2, 2.0, "INCONCLUSIVE"),
     (1.74, 1.80, "REPRODUCED"), (1.76, 1.80, "EXCEEDS")],
)  # fmt: skip
def test_the_verdict_rule(low, high, says):
    assert verdict(Interval((low + high) / 2, low, high), 1.60, 1.72, "gpu+pcie", "real") == says
    assert verdict(None, 1.60, 1.72, "gpu+pcie", "real") == "MISSING"
