"""Sentences of the page that hold numbers of the run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from reports.data import groups
from reports.data.compare import accuracy, hit_rate, share, speedup
from reports.data.results import Results
from reports.elements.numbers import percent
from reports.stats.intervals import Interval, Paired
from reports.verdict import Stamp, stamp_of

SHOWN = {
    "yes": "within the {margin:g} point we call negligible",
    "no": "more than the {margin:g} point we call negligible",
    "not shown": "an interval too wide, or too low, to call negligible at {margin:g} point",
}


LACKS = "This run lacks the cells to say how far that holds; see what is missing below."


def opening(results: Results, paper: dict[str, Any]) -> tuple[str, ...]:
    """Return an introduction for someone new to MoBiLE, then this run's main numbers."""
    introduction = (
        "A Mixture-of-Experts language model has many small networks, its experts, and uses only a few of "
        "them for each word it writes. When the experts do not fit in a graphics card's memory they wait in "
        "main memory, and copying the chosen ones over for every token takes most of the time. MoBiLE is an "
        "idea to copy less: write each token with half of its experts, and only if the model is then unsure "
        f"of the token, write it again with all of them. Its authors report {paper['speedup']['low']:.2f} to "
        f"{paper['speedup']['high']:.2f} times the speed of plain offloading with negligible loss of accuracy."
    )
    found = [family for model in results.models if (family := _measure(results, model))]
    if not found:
        return introduction, LACKS
    margin = paper["accuracy"]["margin_points"]
    findings = _one_family(found[0], margin) if len(found) == 1 else _all_families(found, margin)
    return introduction, f"{_scope_sentence(stamp_of(results.records))} {findings}"


def _scope_sentence(stamp: Stamp) -> str:
    models = {
        "shipped-tiny": "small models trained for the purpose",
        "synthetic": "models with made-up weights",
        "real": "the published weights",
    }.get(stamp.weights, "models of several kinds")
    if stamp.scope == "cpu+virtual":
        return (
            f"This run used {models} on a simulated card with the sizes of real models: a projection, not a "
            "measurement, and nothing on this page is judged by the published numbers."
        )
    return f"This run used {models} ({stamp})."


@dataclass(frozen=True)
class Family:
    """MoBiLE's main numbers for one model, at its own threshold and the fewest slots."""

    model: str
    geometry: str
    fallbacks: float
    speed_up: Interval
    loss: Paired


def _measure(results: Results, model: str) -> Family | None:
    mobile, full_k = groups.mobile(results, model), groups.full_k(results, model)
    base = groups.baselines(results, "smallest", model).get("on-demand-overlap")
    speed_up = speedup(mobile, base) if mobile and base else None
    if not full_k or speed_up is None:
        return None
    rate = share(mobile, "fallbacks", "tokens") or 0.0
    return Family(model, mobile[0].geometry, rate, speed_up, accuracy(mobile, full_k))


def _one_family(family: Family, margin: float) -> str:
    lost = family.loss.difference
    return (
        f"{family.model}, timed as {family.geometry}, fell back on {percent(family.fallbacks)} of tokens, ran "
        f"{bare_ratio(family.speed_up)} times as fast as overlapped plain offloading, and changed accuracy by "
        f"{lost.value:+.1f} points [{lost.low:+.1f}, {lost.high:+.1f}] over {family.loss.items:,} questions: "
        f"{SHOWN[family.loss.within(margin)].format(margin=margin)}."
    )


def _all_families(families: list[Family], margin: float) -> str:
    """Return the range of each number over families, and for how many the loss was shown to be small."""

    def span(numbers: list[float], spec: str, unit: str = "") -> str:
        low, high = format(min(numbers), spec), format(max(numbers), spec)
        return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"

    shown = Counter(family.loss.within(margin) for family in families)
    fallbacks = span([100 * family.fallbacks for family in families], ".1f", " %")
    speed_up = span([family.speed_up.value for family in families], ".2f")
    lost = span([family.loss.difference.value for family in families], "+.1f")
    return (
        f"Over {len(families)} families MoBiLE fell back on {fallbacks} of tokens, ran {speed_up} times as fast as "
        f"overlapped plain offloading, and changed accuracy by {lost} points. The loss was shown to be within "
        f"{margin:g} point, which we call negligible, for {shown['yes']} of them, to be more for {shown['no']}, and "
        f"neither for {shown['not shown']}."
    )


def bare_ratio(interval: Interval) -> str:
    """Write a ratio with its interval, without a unit."""
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def fallback_arithmetic(results: Results, model: str) -> str:
    """Return the speedup that the fallback rate alone would give, so that the cache's share in a speedup is plain."""
    group = groups.mobile(results, model)
    if not group:
        return "There is no MoBiLE cell at the smallest budget."
    fallbacks, hits = share(group, "fallbacks", "tokens") or 0.0, hit_rate(group) or 0.0
    return (
        "Arithmetic to hold against the tables: if loading were all of the time, nothing were kept between tokens and "
        f"every prefetch were in time, a fallback rate of {100 * fallbacks:.1f} % would give 2 / (1 + r) = "
        f"{2 / (1 + fallbacks):.2f}x. Whatever a row has beyond that is cache: MoBiLE must hold one token's little "
        f"experts, and at the smallest budget {100 * hits:.1f} % of the experts that a decode step asked for were "
        "still there. Larger budgets are mostly cache, which is why the row of lru at the same budget stands beside."
    )


def limits(results: Results) -> tuple[str, ...]:
    """Return the limits of the page, chosen by the scopes and weights of its records."""
    projected = (
        "Time is computed, not measured: a discrete-event clock charges copies at the profile's bandwidth and compute "
        "by a roofline. It has not been checked against a GPU in this run.",
        "Each layer of a small model stands for several of the real one, so layers of a group make the same choices.",
    )
    tiny = (
        "The models are tiny and their tasks are generated, so fallback rates and losses are their own. They say how "
        "the method behaves, not how a real model scores.",
    )
    always = (
        "Intervals of speedups that pool tasks draw the tasks again as well as the prompts: they speak of tasks like "
        "these, as far as so few tasks can. Intervals of accuracy speak of these tasks only.",
        "Many comparisons stand on this page; one in twenty 95 % intervals misses. No correction was made, and no "
        "row was left out.",
        "The baseline keeps nothing between tokens; the paper does not say whether its baseline does.",
    )
    pageable = (
        "The driver did not page-lock the experts' host memory on the machine that was timed, so that copies read "
        "ordinary memory: its link was slower than it could be.",
    )
    scopes, weights = set(results.distinct("scope")), set(results.distinct("weights"))
    return (
        *(projected if "cpu+virtual" in scopes else ()),
        *(pageable if any(record.config.get("link_page_locked") is False for record in results.records) else ()),
        *(tiny if "shipped-tiny" in weights else ()),
        *always,
    )
