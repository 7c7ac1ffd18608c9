"""Sentences of the page that hold numbers of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from reports.data import groups
from reports.data.compare import accuracy, hit_rate, share, speedup, strategy_name, worst_task
from reports.data.families import Family, families, worst_family
from reports.data.groups import Group
from reports.data.own import own_strategies
from reports.data.results import Results
from reports.elements.numbers import bare_ratio, percent, span
from reports.verdict import Stamp, stamp_of

SHOWN = {
    "yes": "within the {margin:g} point we call negligible",
    "no": "more than the {margin:g} point we call negligible",
    "not shown": "an interval too wide, or too low, to call negligible at {margin:g} point",
}


LACKS = "This run lacks the cells to say how far that holds; see what is missing below."


def opening(results: Results, paper: dict[str, Any]) -> tuple[str, str]:
    """Return an introduction for someone new to MoBiLE, and this run's main numbers."""
    introduction = (
        "A Mixture-of-Experts language model has many small networks, its experts, and uses a few of them for each "
        "token it writes. Experts that do not fit in a graphics card's memory wait in main memory, and copying the "
        "chosen ones takes most of the time. MoBiLE copies less: it writes each token with half of its experts, and "
        "only where the model is then unsure, again with all of them. Its authors report "
        f"{paper['speedup']['low']:.2f} to {paper['speedup']['high']:.2f} times the speed of plain offloading with "
        "negligible loss of accuracy."
    )
    found, own = families(results), _own(results)
    if not (found or own):
        return introduction, LACKS
    margin = paper["accuracy"]["margin_points"]
    findings = (
        () if not found else (_one_family(found[0], margin) if len(found) == 1 else _all_families(found, margin),)
    )
    return introduction, " ".join((_scope_sentence(stamp_of(results.records)), *findings, *own))


def _own(results: Results) -> tuple[str, ...]:
    """Return a sentence on each strategy of the run's own: its speed beside MoBiLE's baseline, and its loss."""
    found: dict[str, list[tuple[str, Group]]] = {}
    for model in results.models:
        for group in own_strategies(results, model):
            found.setdefault(strategy_name(group[0]), []).append((model, group))
    said = []
    for name, measured in found.items():
        speeds, losses, worst = [], [], []
        for model, group in measured:
            base = groups.baselines(results, group[0].budget, model).get("on-demand-overlap")
            if base and (faster := speedup(group, base)):
                speeds.append(faster.value)
            full_k = groups.full_k(results, model)
            if full_k and not group[0].lossless and (lost := accuracy(group, full_k)).items:
                losses.append(lost.difference.value)
                worst += [each for each in [worst_task(group, full_k)] if each]
        speed = f"ran {span(speeds, '.2f')} times as fast as overlapped plain offloading" if speeds else "was not timed"
        loss = "answers as full K does" if measured[0][1][0].lossless else "was not scored beside full K"
        if losses:
            most = min(worst, key=lambda each: each.loss.difference.value)
            loss = f"changed accuracy by {span(losses, '+.1f')} points (worst task {most.in_words})"
        said.append(f"{name}, a strategy of this run's own, {speed} and {loss}.")
    return tuple(said)


def _scope_sentence(stamp: Stamp) -> str:
    models = {
        "shipped-tiny": "small models trained for the purpose",
        "synthetic": "models with made-up weights",
        "real": "the published weights",
    }.get(stamp.weights, "models of several kinds")
    if stamp.scope == "cpu+virtual":
        return (
            f"This run used {models} on a simulated card with the sizes of real models: a projection, not a "
            "measurement, and not judged by the published numbers."
        )
    return f"This run used {models} ({stamp})."


def _one_family(family: Family, margin: float) -> str:
    return (
        f"{family.model}, timed as {family.geometry}, fell back on {percent(family.fallbacks)} of tokens, ran "
        f"{_speed([family])} times as fast as overlapped plain offloading, and changed accuracy by {_lost([family])} "
        f"over {family.loss.items:,} questions{_worst([family])}: "
        f"{SHOWN[family.loss.within(margin)].format(margin=margin)}."
    )


def _all_families(found: Sequence[Family], margin: float) -> str:
    """Return the range of each number over families, and for how many the loss was shown to be small."""
    shown = Counter(family.loss.within(margin) for family in found)
    fallbacks = span([100 * family.fallbacks for family in found], ".1f", " %")
    return (
        f"Over {len(found)} families MoBiLE fell back on {fallbacks} of tokens, ran {_speed(found)} times as "
        f"fast as overlapped plain offloading, and changed accuracy by {_lost(found)}{_worst(found)}. The "
        f"loss was shown to be within {margin:g} point, which we call negligible, for {shown['yes']} of them, to be "
        f"more for {shown['no']}, and neither for {shown['not shown']}."
    )


def _speed(found: Sequence[Family]) -> str:
    """Return one family's speedup with its interval, or the range over several."""
    return bare_ratio(found[0].speed_up) if len(found) == 1 else span([each.speed_up.value for each in found], ".2f")


def _lost(found: Sequence[Family]) -> str:
    """Return one family's difference in points with its interval, or the range over several."""
    differences = [each.loss.difference for each in found]
    if len(found) > 1:
        return span([each.value for each in differences], "+.1f", " points")
    [one] = differences
    return f"{one.value:+.1f} points [{one.low:+.1f}, {one.high:+.1f}]"


def _worst(found: Sequence[Family]) -> str:
    """Return in brackets the worst task of all families; empty where there is one task, whose numbers are all."""
    family = worst_family(found)
    if family is None or family.worst is None or family.worst.loss == family.loss:
        return ""
    whose = f", {family.model}" if len(found) > 1 else ""
    return f" (worst task {family.worst.in_words}{whose})"


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
