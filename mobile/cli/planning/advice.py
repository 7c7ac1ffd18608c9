"""The advice of `mobile plan`: decode speeds to expect, and one command to run, beside the fastest lossless one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from mobile.costs.cost_model import CostModel
from mobile.costs.expected import Curve, Speed, Split, curves, expect
from mobile.policies.strategy import Strategy, resolve

# A plan speaks of these unless it is asked for others: the baseline, and whatever may be the fastest, lossless or not.
NAMED = ("on-demand-overlap", "lru", "lfu", "cpu-hybrid", "mobile", "mobile+lfu", "mobile+lfu+cpu-hybrid")
LEAST_CPU_SHARE = 0.1  # of its memory's rate that a processor is taken to keep beside a link that is as fast


@dataclass(frozen=True)
class Expected:
    """A strategy's decode speed to expect, in tokens a second, and the band that it lies in; a projection.

    `budget_meets_needs` says whether there are the slots with which it works as intended. `fallback_rate` is the share
    of tokens that run twice, None where none does.
    """

    strategy: str
    lossless: bool
    tokens_per_s: float
    low: float
    high: float
    fallback_rate: float | None
    budget_meets_needs: bool


@dataclass(frozen=True)
class Advised:
    """The strategy to run, its speed to expect, and the command that runs it."""

    strategy: str
    lossless: bool
    tokens_per_s: float
    low: float
    high: float
    command: str


@dataclass(frozen=True)
class Recommendation:
    """The fastest strategy, and the fastest lossless one; both are the same where nothing lossy is faster."""

    fastest: Advised
    lossless: Advised | None


def expected_speeds(
    cost: CostModel, slots: int, *, on_disk: bool, chosen: Sequence[Strategy] = (), fallback_rate: float | None = None
) -> tuple[Expected, ...]:
    """Return the speeds to expect of the `chosen` strategies, or of `NAMED`, as far as their routing was measured."""
    names = NAMED if slots < cost.geometry.total_experts else ("resident", *NAMED)
    found = []
    for strategy in chosen or [each for each in map(resolve, names) if not (on_disk and each.on_cpu)]:
        speed = _speed(cost, strategy, slots, fallback_rate)
        if speed is not None:
            meets = slots >= strategy.min_slots(cost.geometry)
            found.append(Expected(lossless=strategy.lossless, budget_meets_needs=meets, **vars(speed)))
    return tuple(found)


def _speed(cost: CostModel, strategy: Strategy, slots: int, fallback_rate: float | None) -> Speed | None:
    """Return the speed to expect; None for a strategy whose routing was not measured.

    Where the processor computes experts, the low end is that of a processor whose memory the link reads all the time,
    which takes what it copies off the processor's rate.
    """
    known = partial(expect, strategy=strategy.name, slots=slots, fallback_rate=fallback_rate)
    if strategy.name == "on-demand-overlap":
        return known(cost, among=(_constant(cost, strategy.name, missed=1.0),))
    if strategy.name == "resident":
        return known(cost, among=(_constant(cost, strategy.name, missed=0.0),))
    if strategy.on_cpu is None:
        return known(cost)
    alone = known(cost, split=_split(strategy, cost))
    profile = cost.profile
    left = max(profile.cpu_gb_per_s - profile.link_gb_per_s, LEAST_CPU_SHARE * profile.cpu_gb_per_s)
    shared = CostModel(replace(profile, cpu_gb_per_s=left), cost.geometry)
    beside = known(shared, split=_split(strategy, shared))
    return alone if alone is None or beside is None else replace(alone, low=min(alone.low, beside.low))


def _constant(cost: CostModel, strategy: str, missed: float) -> Curve:
    """Return the curve of a strategy that misses the same share of experts on any routing."""
    geometry = cost.geometry
    return Curve(strategy, geometry.experts, geometry.top_k, "any", None, (1.0,), {"full": (missed,)})


def _split(strategy: Strategy, cost: CostModel) -> Split:
    """Return how many of so many missing experts the strategy has the processor compute."""
    assert strategy.on_cpu is not None
    placement = strategy.on_cpu(cost)
    return lambda missing: len(placement.on_cpu(0, (1,) * missing))


def recommend(speeds: Sequence[Expected], options: Sequence[str]) -> Recommendation | None:
    """Return the strategy with the highest low end of its band, and the lossless one; None without any.

    Only those count whose needs the budget meets, or if there is none, all. `options` are what the command has besides
    the strategy, the model first.
    """
    able = [each for each in speeds if each.budget_meets_needs] or list(speeds)
    if not able:
        return None

    def advised(best: Expected) -> Advised:
        model, *others = options
        words = ["mobile", "generate", model, "PROMPT", "--strategy", best.strategy, *others]
        command = shlex.join(words)
        return Advised(best.strategy, best.lossless, best.tokens_per_s, best.low, best.high, command)

    exact = [each for each in able if each.lossless]
    best = max(able, key=lambda each: each.low)
    return Recommendation(advised(best), advised(max(exact, key=lambda each: each.low)) if exact else None)


def tasks() -> int:
    """Return the number of tasks whose routing was measured."""
    return len({curve.task for curve in curves()})
