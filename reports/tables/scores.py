"""Accuracy tables: scores, paired differences to full K on the same items, the gamma sweep, and seeds."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, stdev

from reports.data import groups
from reports.data.chance_levels import chance_level
from reports.data.compare import accuracy, count, speedup, strategy_name, total, worst_task
from reports.data.groups import Group
from reports.data.results import Results
from reports.elements.numbers import p_value, percent, points, ratio, score
from reports.elements.page import Table
from reports.stats.intervals import wilson
from reports.tables.speed import speedup_text

SUMMED, STATIC_HALF, WORST = "all tasks", "static-half", "worst task"
ALIKE, FEWER = "Accuracy on the same items", "Accuracy on the items that all were asked"


def head(margin_points: float) -> tuple[str, ...]:
    """Return the column heads of `row`."""
    return (
        "strategy",
        "score %",
        "difference to full K",
        f"within {margin_points:g} point",
        "difference to static K/2",
        "over on-demand-overlap",
        "fallbacks",
        "lost / gained",
        "McNemar p",
        "n",
    )


def row(
    group: Group, reference: Group, static_half: Group, base: Group | None, margin_points: float
) -> tuple[str, ...]:
    """Return a strategy's score, its paired differences to full K and to static K/2, and its speedup over `base`."""
    scored, items = score(wilson(total(group, "correct"), count(group))), str(count(group))
    if group[0].strategy == "resident":
        return ("full K", scored, "-", "-", "-", "-", "-", "-", "-", items)
    paired, tokens = accuracy(group, reference), total(group, "decode_tokens")
    over_half = accuracy(group, static_half) if static_half and group[0].strategy != STATIC_HALF else None
    return (
        strategy_name(group[0]),
        scored,
        points(paired.difference),
        paired.within(margin_points),
        points(over_half.difference) if over_half and over_half.items else "-",
        speedup_text(group, base),
        "-" if group[0].gamma is None else percent(total(group, "fallbacks") / tokens if tokens else None),
        f"{paired.lost} / {paired.gained}",
        p_value(paired.p_value),
        items,
    )


def by_task(results: Results, model: str, margin_points: float) -> tuple[Table, ...]:
    """Return tables of full K and every lossy strategy, by task and all tasks together, at the smallest budget.

    Every row of a task is over the same items. The first table has the strategies that were asked all that full K was;
    where others were asked fewer, a second has all of them, over the items that all were asked.
    """
    most: list[tuple[str, ...]] = []
    fewer: list[tuple[str, ...]] = []
    for task in (*results.tasks(model), None):
        wanted = {"task": task} if task else {}
        base = groups.baselines(results, "smallest", model, **wanted).get("on-demand-overlap")
        answered = [
            group
            for group in groups.unswept(results, "smallest", model, **wanted)
            if group[0].strategy == "resident" or not group[0].lossless
        ]
        asked = count(_named(answered, "resident"))
        whole = [g for g in answered if count(groups.on_common_items([g, _named(answered, "resident")])[0]) == asked]
        label = _with_chance_level(task) if task else SUMMED
        most += [(label, *each) for each in _rows(whole, base, margin_points)]
        if len(whole) < len(answered):
            fewer += [(label, *each) for each in _rows(answered, base, margin_points)]
    columns = ("task", *head(margin_points))
    found = (Table(ALIKE, columns, tuple(most)), Table(FEWER, columns, tuple(fewer)))
    return tuple(table for table in found if table.rows)


def _rows(answered: list[Group], base: Group | None, margin_points: float) -> list[tuple[str, ...]]:
    """Return a row a group, over the items that all have; none where full K is not among them or there is no item."""
    alike = groups.on_common_items(answered)
    reference, static_half = (_named(alike, name) for name in ("resident", STATIC_HALF))
    return [row(group, reference, static_half, base, margin_points) for group in alike] if count(reference) else []


def _named(found: list[Group], strategy: str) -> Group:
    """Return the group of a strategy, empty where there is none."""
    return next((group for group in found if group and group[0].strategy == strategy), [])


def _with_chance_level(task: str) -> str:
    guessed = chance_level(task)
    return task if guessed is None else f"{task} (guessing {100 * guessed:g} %)"


def by_gamma(results: Results, model: str, margin_points: float) -> Table:
    """Return accuracy and speed by gamma, beside full K and static K/2, over the items that all were asked."""
    sweep, reference = gamma_sweep(results, model), groups.full_k(results, model)
    static_half = results.select_complete(model=model, strategy=STATIC_HALF, budget="smallest")
    base = groups.baselines(results, "smallest", model).get("on-demand-overlap")
    rows = []
    if sweep and reference:
        alike = groups.on_common_items([reference, *([static_half] if static_half else []), *sweep])
        for group, shown in zip(alike, _rows(alike, base, margin_points), strict=False):
            worst = worst_task(group, alike[0])
            rows.append(_with_worst(shown, "-" if worst is None or group is alike[0] else worst.in_words))
    note = "Every row is over the same items, those that were asked at every gamma."
    return Table(
        "Sweep over gamma, all tasks, smallest budget", _with_worst(head(margin_points), WORST), tuple(rows), note
    )


def _with_worst(columns: tuple[str, ...], worst: str) -> tuple[str, ...]:
    """Return the columns of `row` with one on the worst task, behind the difference to full K and its judgement."""
    return (*columns[:4], worst, *columns[4:])


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
    for model, (full_k, mobile, static_half) in _alike_by_seed(results, models, tasks):
        base = _of_tasks(tasks, groups.baselines(results, "smallest", model).get("on-demand-overlap", []))
        seed = full_k[0].config.get("training_seed")
        paired, speed_up = accuracy(mobile, full_k), speedup(mobile, base) if base else None
        full_score, worst = wilson(total(full_k, "correct"), count(full_k)), worst_task(mobile, full_k)
        tokens = total(mobile, "decode_tokens")
        fallbacks = total(mobile, "fallbacks") / tokens if tokens else None
        rows.append(
            (
                model,
                "-" if seed is None else str(seed),
                points(paired.difference),
                paired.within(margin_points),
                worst.in_words if worst else "-",
                points(accuracy(static_half, full_k).difference) if static_half else "-",
                points(accuracy(mobile, static_half).difference) if static_half else "-",
                ratio(speed_up),
                percent(fallbacks),
                score(full_score),
                str(count(mobile)),
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
        "MoBiLE less full K",
        f"within {margin_points:g} point",
        WORST,
        "static K/2 less full K",
        "MoBiLE less static K/2",
        "over on-demand-overlap",
        "fallbacks",
        "full K %",
        "n",
    )
    note = (
        f"On {', '.join(tasks)}, the items that every training was asked; the last row is mean ± standard deviation "
        "over the trainings."
    )
    return Table("Trainings of one family", columns, tuple(rows), note)


def _alike_by_seed(
    results: Results, models: list[str], tasks: list[str]
) -> Iterator[tuple[str, tuple[Group, Group, Group]]]:
    """Yield each training's full K, MoBiLE and static K/2 (or nothing), over the items that all were asked."""
    found: dict[str, list[Group]] = {}
    for model in models:
        static_half = results.select_complete(model=model, strategy=STATIC_HALF, budget="smallest")
        three = (groups.full_k(results, model), groups.mobile(results, model), static_half)
        of_tasks = [_of_tasks(tasks, group) for group in three]
        if of_tasks[0] and of_tasks[1] and count(of_tasks[1]):
            found[model] = of_tasks
    alike = iter(groups.on_common_items([group for three in found.values() for group in three]))
    for model in found:
        full_k, mobile, static_half = next(alike), next(alike), next(alike)
        if count(mobile):
            yield model, (full_k, mobile, static_half)


def _spread(numbers: list[tuple[float, float, float, float | None]]) -> tuple[str, ...]:
    """Return the row of mean and standard deviation over trainings, of the columns that have both."""
    full_k, lost, fallbacks, speed_up = ([n for n in column if n is not None] for column in zip(*numbers, strict=True))
    ratios = f"{mean(speed_up):.2f} ± {stdev(speed_up):.2f}" if len(speed_up) > 1 else "-"
    return (
        "mean ± sd",
        "-",
        f"{mean(lost):+.1f} ± {stdev(lost):.1f}",
        "-",
        "-",
        "-",
        "-",
        ratios,
        f"{mean(fallbacks):.1f} ± {stdev(fallbacks):.1f} %",
        f"{mean(full_k):.1f} ± {stdev(full_k):.1f}",
        "-",
    )


def _of_tasks(tasks: list[str], group: Group) -> Group:
    return [record for record in group if record.task in tasks]
