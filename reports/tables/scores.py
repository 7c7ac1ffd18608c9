"""Accuracy tables: scores, paired differences to full K on the same items, the gamma sweep, and seeds."""

from __future__ import annotations

from statistics import mean, stdev

from reports.data import groups
from reports.data.chance_levels import chance_level
from reports.data.compare import accuracy, count, share, speedup, strategy_name, total
from reports.data.groups import Group
from reports.data.results import Results
from reports.elements.numbers import p_value, percent, points, ratio, score
from reports.elements.page import Table
from reports.stats.intervals import Interval, wilson
from reports.tables.speed import speedup_text

SUMMED = "all tasks"


def head(margin_points: float) -> tuple[str, ...]:
    """Return the column heads of `row`."""
    return (
        "strategy",
        "n",
        "score %",
        "difference to full K",
        "lost / gained",
        "McNemar p",
        f"within {margin_points:g} point",
        "fallbacks",
        "over on-demand-overlap",
    )


def row(group: Group, reference: Group, base: Group | None, margin_points: float) -> tuple[str, ...]:
    """Return a strategy's score, its paired difference to full K, and its speedup over `base`."""
    scored = (str(count(group)), score(wilson(total(group, "correct"), count(group))))
    if group[0].strategy == "resident":
        return ("full K", *scored, "-", "-", "-", "-", "-", "-")
    paired = accuracy(group, reference)
    return (
        strategy_name(group[0]),
        *scored,
        points(paired.difference),
        f"{paired.lost} / {paired.gained}",
        p_value(paired.p_value),
        paired.within(margin_points),
        "-" if group[0].gamma is None else percent(share(group, "fallbacks", "tokens")),
        speedup_text(group, base),
    )


def by_task(results: Results, model: str, margin_points: float) -> Table:
    """Return full K and every lossy strategy, by task and all tasks together, at the smallest budget."""
    rows = []
    for task in (*results.tasks(model), None):
        wanted = {"task": task} if task else {}
        reference = groups.full_k(results, model, **wanted)
        base = groups.baselines(results, "smallest", model, **wanted).get("on-demand-overlap")
        shown = [
            group
            for group in groups.unswept(results, "smallest", model, **wanted)
            if group[0].strategy == "resident" or not group[0].lossless
        ]
        for group in shown if reference else []:
            rows.append((_with_chance_level(task) if task else SUMMED, *row(group, reference, base, margin_points)))
    return Table("Accuracy on the same items", ("task", *head(margin_points)), tuple(rows))


def _with_chance_level(task: str) -> str:
    guessed = chance_level(task)
    return task if guessed is None else f"{task} (guessing {100 * guessed:g} %)"


def by_gamma(results: Results, model: str, margin_points: float) -> Table:
    """Return accuracy and speed by gamma, all tasks together, at the smallest budget."""
    reference = groups.full_k(results, model)
    base = groups.baselines(results, "smallest", model).get("on-demand-overlap")
    rows = []
    if reference:
        for group in gamma_sweep(results, model):
            rows.append(row(group, reference, base, margin_points))
    return Table("Sweep over gamma, all tasks, smallest budget", head(margin_points), tuple(rows))


def gamma_sweep(results: Results, model: str) -> list[Group]:
    """Return MoBiLE's cells at the smallest budget, a group a gamma, ascending."""
    found = results.select(model=model, strategy="mobile", budget="smallest")
    ordered = sorted({record.gamma for record in found if record.gamma is not None})
    pools = (
        results.select_complete(model=model, strategy="mobile", budget="smallest", gamma=gamma) for gamma in ordered
    )
    return [pool for pool in pools if pool]


def by_seed(results: Results, models: list[str], margin_points: float) -> Table:
    """Return one row a training seed of a family, on the tasks that all were given, then mean and deviation."""
    tasks = [task for task in results.tasks(models[0]) if all(task in results.tasks(other) for other in models)]
    rows: list[tuple[str, ...]] = []
    numbers: list[tuple[float, float, float, float | None]] = []
    for model in models:
        full_k = _of_tasks(tasks, groups.full_k(results, model))
        mobile = _of_tasks(tasks, groups.mobile(results, model))
        static_half = results.select_complete(model=model, strategy="static-half", budget="smallest")
        static_half = _of_tasks(tasks, static_half)
        base = _of_tasks(tasks, groups.baselines(results, "smallest", model).get("on-demand-overlap", []))
        if not (full_k and mobile and count(mobile)):
            continue
        seed = full_k[0].config.get("training_seed")
        paired, speed_up = accuracy(mobile, full_k), speedup(mobile, base) if base else None
        full_score = wilson(total(full_k, "correct"), count(full_k))
        fallbacks = share(mobile, "fallbacks", "tokens")
        rows.append(
            (
                model,
                "-" if seed is None else str(seed),
                str(count(mobile)),
                score(full_score),
                points(accuracy(static_half, full_k).difference) if static_half else "-",
                points(paired.difference),
                paired.within(margin_points),
                percent(fallbacks),
                ratio(speed_up),
            )
        )
        numbers.append(
            (full_score.value, paired.difference.value, 100 * (fallbacks or 0), speed_up.value if speed_up else None)
        )
    if len(rows) > 1:
        rows.append(_spread(numbers))
    columns = (
        "model",
        "training seed",
        "n",
        "full K %",
        "static K/2 less full K",
        "MoBiLE less full K",
        f"within {margin_points:g} point",
        "fallbacks",
        "over on-demand-overlap",
    )
    note = f"On {', '.join(tasks)}; the last row is mean ± standard deviation over the trainings."
    return Table("Trainings of one family", columns, tuple(rows), note)


def _spread(numbers: list[tuple[float, float, float, float | None]]) -> tuple[str, ...]:
    """Return the row of mean and standard deviation over trainings, of the columns that have both."""
    full_k, lost, fallbacks, speed_up = ([n for n in column if n is not None] for column in zip(*numbers, strict=True))
    ratios = f"{mean(speed_up):.2f} ± {stdev(speed_up):.2f}" if len(speed_up) > 1 else "-"
    return (
        "mean ± sd",
        "-",
        "-",
        f"{mean(full_k):.1f} ± {stdev(full_k):.1f}",
        "-",
        f"{mean(lost):+.1f} ± {stdev(lost):.1f}",
        "-",
        f"{mean(fallbacks):.1f} ± {stdev(fallbacks):.1f} %",
        ratios,
    )


def _of_tasks(tasks: list[str], group: Group) -> Group:
    return [record for record in group if record.task in tasks]


def full_score(results: Results, model: str) -> Interval | None:
    """Return full K's score over all tasks of a model, in percent; None if it was not run."""
    full_k = groups.full_k(results, model)
    return wilson(total(full_k, "correct"), count(full_k)) if full_k else None
