"""The verdict rule, and that nothing but a measurement with the real weights can pass it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from reports import verdict
from reports.stats.intervals import Interval, Paired
from reports.verdict import Stamp
from tests.report_runs import Rule, records

MEASURED = Stamp("gpu+pcie", "real")
known = ["cpu+virtual", "cpu+disk", "gpu+throttled", "gpu+pcie", "mixed", "-"]
scopes = some.sampled_from(known) | some.text(max_size=12)
kinds = some.sampled_from(["real", "synthetic", "shipped-tiny", "mixed", "-"]) | some.text(max_size=12)
sized = some.floats(0.5, 4).map(lambda value: Interval(value, 0.99 * value, 1.01 * value))
pairs = some.tuples(some.integers(0, 50), some.integers(0, 50)).map(lambda c: Paired(20_000, *c))
OUTCOMES = {"REPRODUCED", "SHORT", "EXCEEDS", "INCONCLUSIVE"}


@given(scopes, kinds, some.integers(1, 3), some.booleans(), some.none() | sized, some.none() | pairs)
def test_only_real_weights_on_one_real_link_are_judged(scope, weights, machines, trusted, ratio, pair):
    of = Stamp(scope, weights, machines)
    for says, result in (
        (verdict.speedup_verdict(ratio, 1.60, 1.72, of, trusted), ratio),
        (verdict.accuracy_verdict(pair, 1.0, of, trusted), pair),
    ):
        judged = (scope, weights, machines, trusted) == ("gpu+pcie", "real", 1, True) and result is not None
        assert (says in OUTCOMES) == judged
        if result is None:
            assert says == "MISSING"
        elif not trusted:
            assert says == "FAILED"
        elif not judged:
            assert says.startswith("NOT COMPARABLE")


@pytest.mark.parametrize(
    ("scope", "weights", "says"),
    [
        ("cpu+virtual", "shipped-tiny", "NOT COMPARABLE (projected)"),
        ("cpu+disk", "synthetic", "NOT COMPARABLE (measured on another link)"),
        ("gpu+throttled", "real", "NOT COMPARABLE (measured on another link)"),
        ("gpu+pcie", "synthetic", "NOT COMPARABLE"),
        ("cpu+paced", "synthetic", "NOT COMPARABLE"),
    ],
)
def test_a_number_that_is_not_set_against_the_paper_says_why(scope, weights, says):
    assert Stamp(scope, weights).refusal == says


def test_a_measurement_can_be_reproduced():
    """Without this the test above would pass for a rule that never says yes."""
    assert verdict.speedup_verdict(Interval(1.65, 1.64, 1.66), 1.60, 1.72, MEASURED) == "REPRODUCED"
    assert verdict.accuracy_verdict(Paired(20_000, 20, 20), 1.0, MEASURED) == "REPRODUCED"


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (1.50, 1.55, "SHORT"),
        (1.80, 1.90, "EXCEEDS"),
        (1.55, 1.57, "REPRODUCED"),
        (1.2, 2.0, "INCONCLUSIVE"),
        (1.74, 1.80, "REPRODUCED"),
        (1.76, 1.80, "EXCEEDS"),
    ],
)
def test_the_rule_for_a_band(low, high, says):
    assert verdict.speedup_verdict(Interval((low + high) / 2, low, high), 1.60, 1.72, MEASURED) == says


def test_the_rule_for_a_margin():
    assert verdict.accuracy_verdict(Paired(1000, 100, 0), 1.0, MEASURED) == "SHORT"
    assert verdict.accuracy_verdict(Paired(164, 0, 0), 1.0, MEASURED) == "INCONCLUSIVE"


def test_one_projected_baseline_stamps_the_whole_number():
    sound = records(Rule(scope="gpu+pcie", weights="real", gpu={"name": "a card"}))
    projected = records(Rule(weights="real"))
    assert verdict.stamp_of(sound[:3], sound[3:5]).refusal is None
    assert verdict.stamp_of(sound[:3], projected[:1]) == Stamp("mixed", "real", 2)
    assert verdict.stamp_of(sound[:3], projected[:1]).refusal == "NOT COMPARABLE"
    assert verdict.stamp_of().refusal == "NOT COMPARABLE"


def test_cards_that_differ_are_not_compared():
    ours, theirs = (records(Rule(scope="gpu+pcie", weights="real", gpu={"name": name})) for name in ("one", "another"))
    assert verdict.stamp_of(ours, theirs).refusal == "NOT COMPARABLE (unlike machines)"
