"""Controls: checks that must hold and canaries that must fail. A broken one is the first line of the page."""

from __future__ import annotations

from dataclasses import dataclass

from reports.data.chance_levels import chance_level
from reports.data.compare import accuracy, count, speedup, total
from reports.data.results import Results
from reports.elements.numbers import points
from reports.elements.page import Table
from reports.stats.intervals import Paired
from reports.tables import speed
from suites.record import Record

COLLAPSE_POINTS = 10.0  # a scrambled router must cost at least this much accuracy
SAME_TIME = 0.05  # and time per token may change by no more than this share

CANARY = (
    "The canary is the same model with the rows of every router shuffled, so that each token goes to experts that were "
    f"not trained for it. Its accuracy must fall by at least {COLLAPSE_POINTS:g} points (a model that scores less than "
    "that above guessing has nothing to lose, and cannot tell), and its time per token must stay within "
    f"{100 * SAME_TIME:g} %: an engine that answers or saves time from memory of these prompts would show here."
)


@dataclass(frozen=True)
class Canary:
    """A scrambled cell compared with the sound one; `passed` is None where the comparison cannot decide."""

    record: Record
    loss: Paired | None
    speedup: float | None
    passed: bool | None
    result: str


def canaries(results: Results) -> list[Canary]:
    """Return every canary of the run, judged."""
    return [_judge(results, record) for record in results.controls if record.config["control"] == "canary"]


def _judge(results: Results, record: Record) -> Canary:
    """Judge a canary: its scores by full K's, its times by the same strategy's, both on the same items."""
    same = {"model": record.model, "task": record.task, "seed": record.seed}
    sound = results.select(strategy="resident", **same)
    if not record.lossless:
        sound = results.select(strategy=record.strategy, gamma=record.gamma, budget=record.budget, **same)
    timed = results.select(strategy=record.strategy, gamma=record.gamma, budget=record.budget, **same)
    loss = accuracy([record], sound) if sound else None
    change = speedup([record], timed) if timed and record.strategy != "resident" else None
    ratio = change.value if change else None
    if loss is None or not loss.items:
        return Canary(record, None, None, None, "nothing to hold it against")
    above_guessing = 100 * (total(sound, "correct") / count(sound) - (chance_level(record.task) or 0))
    if above_guessing < COLLAPSE_POINTS:
        return Canary(record, loss, ratio, None, "cannot tell: the sound score is near guessing")
    faults = []
    if -loss.difference.value < COLLAPSE_POINTS:
        faults.append("accuracy did not collapse")
    # A strategy that falls back takes longer where the model is less sure, so only fixed work must take equal time.
    if ratio is not None and record.gamma is None and abs(ratio - 1) > SAME_TIME:
        faults.append("time changed")
    return Canary(record, loss, ratio, not faults, " and ".join(faults) or "held")


def canary_table(results: Results) -> Table:
    """Return one row a canary."""
    rows = tuple(
        (
            f"{canary.record.model}, {canary.record.task}, {canary.record.strategy}",
            str(canary.loss.items if canary.loss else 0),
            points(canary.loss.difference) if canary.loss else "-",
            "-" if canary.speedup is None else f"{canary.speedup:.3f}x",
            canary.result if canary.passed is not False else f"BROKEN: {canary.result}",
        )
        for canary in canaries(results)
    )
    return Table("Canary: a scrambled router", ("cell", "n", "difference to full K", "speed", "result"), rows, CANARY)


def checks(results: Results) -> Table:
    """Return one row a check made by the live runs, and whether it held in every cell."""
    by_check: dict[str, list[bool]] = {}
    for record in results.all_records:
        for check, passed in record.checks.items():
            by_check.setdefault(check, []).append(passed)
    rows = tuple(
        (
            check,
            f"held in {len(outcomes)} cells"
            if all(outcomes)
            else f"BROKEN in {outcomes.count(False)} of {len(outcomes)} cells",
        )
        for check, outcomes in sorted(by_check.items())
    )
    return Table("Checks made during the run", ("check", "result"), rows)


def broken(results: Results) -> list[str]:
    """Return what makes the page untrustworthy, one clause each; empty where all controls held."""
    found = [check for check, result in checks(results).rows if result.startswith("BROKEN")]
    found += [f"canary: {c.result} ({c.record.model}, {c.record.task})" for c in canaries(results) if c.passed is False]
    for model in results.distinct("model"):
        above = [row for row in speed.against_ceiling(results, model).rows if row[-1] != "yes"]
        for strategy in dict.fromkeys(row[1] for row in above):
            tasks = [row[0] for row in above if row[1] == strategy]
            found.append(f"{strategy} passed its bandwidth ceiling with {model} on {', '.join(tasks)}")
    return found
