"""Tables of the chapter past the paper: every setting at one memory, and the fastest of each kind a family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reports.data import groups
from reports.data.compare import accuracy, count, share, tokens_per_s, total
from reports.data.results import AS_IS, family, rows_of, strategy_and_rows
from reports.data.settings import Setting
from reports.elements.numbers import percent, points, ratio
from reports.elements.page import Table
from reports.stats.intervals import Interval, Paired
from reports.stats.pareto import front
from reports.tables.synthetic import on_recorded_routing, over_plain
from suites.record import Record

WANTED = 3.0  # times on-demand-overlap at the same memory: the aim
SMALLEST_ROWS = "int4"


def by_setting(settings: Sequence[Setting], model: str, budget: str, margin_points: float) -> Table:
    """Return a row for each setting of a model under a budget, the fastest first."""
    ahead, alike = on_the_front(settings), _on_common_items(settings)
    fewest = min((each.items for each in alike), default=0)
    head = (
        "strategy",
        "rows",
        "over on-demand-overlap",
        "over lru",
        "over on-demand-overlap on its own rows",
        "less full K, points",
        f"within {margin_points:g} point",
        "worst task",
        f"the points on the {fewest:,} questions that all were asked",
        "on the front",
        "answers",
        "fallbacks",
        "GB/token",
        "tokens/s",
        "slots",
        "n",
    )
    rows = [
        _row(each, margin_points, common, "a limit" if each.is_a_limit else "yes" if each in ahead else "no")
        for each, common in zip(settings, alike, strict=True)
    ]
    speed = [-each.over_base.value for each in settings]
    ordered = tuple(row for _, row in sorted(zip(speed, rows, strict=True), key=lambda pair: pair[0]))
    note = (
        "Speedups are over rows as they are at the same memory, unless said. n is the questions that points are of, "
        "fewer where a strategy answers by itself; one column has all on the same. On the front: none is faster and "
        "more accurate. A limit knows the future."
    )
    return Table(f"{model} with {budget}, fastest first", head, ordered, note)


def _on_common_items(settings: Sequence[Setting]) -> list[Paired]:
    """Return each setting's difference to full K over the items that all of them answered."""
    alike = groups.on_common_items([each.answers for each in settings])
    return [accuracy(answers, each.full_k) for answers, each in zip(alike, settings, strict=True)]


def _row(setting: Setting, margin_points: float, common: Paired, front: str) -> tuple[str, ...]:
    first, tokens, speed = setting.cells[0], total(setting.cells, "decode_tokens"), tokens_per_s(setting.cells)
    every = first.config["moe_layers"] * first.config["experts"]
    slots = "-" if first.slots is None else f"all {every:,}" if first.slots >= every else f"{first.slots:,}"
    return (
        setting.strategy,
        setting.rows,
        ratio(setting.over_base),
        ratio(setting.over_lru),
        ratio(setting.over_own_rows),
        "0" if setting.exact else points(setting.points),
        "yes" if setting.exact else setting.loss.within(margin_points),
        setting.worst.in_words if setting.worst else "-",
        "0" if setting.exact else points(common.difference) if common.items else "-",
        front,
        "full K's" if setting.exact else f"full K's of {setting.rows} rows" if setting.of_full_k else "may differ",
        "-" if first.gamma is None else percent(share(setting.cells, "fallbacks", "tokens")),
        f"{total(setting.cells, 'decode_bytes') / tokens / 1e9:.3f}" if tokens else "-",
        "-" if speed is None else f"{speed:.1f}",
        slots,
        f"{count(setting.answers):,}",
    )


def on_the_front(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings that none is faster and more accurate than."""
    settings = [each for each in settings if not each.is_a_limit]
    edge = set(front([(each.over_base.value, each.points.value) for each in settings]))
    return [each for each in settings if (each.over_base.value, each.points.value) in edge]


def fastest(settings: Iterable[Setting], most_lost: float | None = None) -> Setting | None:
    """Return the fastest setting, of those that lose at most so many points (None: any); None if there is none."""
    real = [each for each in settings if not each.is_a_limit]
    left = [each for each in real if most_lost is None or each.points.value >= -most_lost]
    return max(left, key=lambda each: each.over_base.value, default=None)


def champions(found: Sequence[tuple[str, str, Sequence[Setting]]], margin_points: float) -> Table:
    """Return a row for each (model, budget, settings): the fastest of each kind, with what it loses.

    The aim is `WANTED` times on-demand-overlap at the same memory for at most `margin_points` lost.
    """
    rows = []
    for model, budget, settings in found:
        own = [each for each in settings if each.rows == AS_IS]
        best = fastest(settings, margin_points)
        reached = "-" if best is None else "yes" if best.over_base.value >= WANTED else "no"
        rows.append(
            (
                model,
                budget,
                _text(next((each for each in own if each.cells[0].strategy == "mobile" and not _swept(each)), None)),
                _text(fastest(each for each in settings if each.exact)),
                _text(fastest(own, margin_points)),
                _text(best),
                "-" if best is None else "yes" if best.exact else best.loss.within(margin_points),
                reached,
                _on_own_rows([each for each in settings if each.rows == SMALLEST_ROWS], margin_points),
            )
        )
    head = (
        "model",
        "memory",
        "MoBiLE",
        "fastest with full K's answers",
        f"fastest that loses at most {margin_points:g} point, rows as they are",
        "the same, any rows",
        f"shown to be within {margin_points:g} point",
        f"{WANTED:g}x reached",
        f"fastest if all rows are {SMALLEST_ROWS} for everyone",
    )
    note = (
        "Over on-demand-overlap with rows as they are at the same memory; in brackets points less full K's on the same "
        "items, all tasks together, then the worst one; the last column over on-demand-overlap on the same packed "
        "rows. The fastest is chosen on the items that it is shown on, which flatters it."
    )
    return Table("The fastest of each kind", head, tuple(rows), note)


def measured(records: Sequence[Record], found: Sequence[tuple[str, str, Sequence[Setting]]], margin: float) -> Table:
    """Return a row for each geometry timed over a disk: MoBiLE and the fastest that loses at most `margin` points.

    Nothing is answered over the disk: points are those of the same strategy, gamma and rows among `found`.
    """
    rows = []
    for model in dict.fromkeys(record.model for record in records):
        cells = [record for record in on_recorded_routing(records) if record.model == model]
        for budget in dict.fromkeys(record.budget for record in cells if record.budget != "smallest"):
            timed = [
                (speed_up.value, record, speed_up, _points(record, found))
                for record in cells
                if record.budget == budget and (speed_up := over_plain(cells, record)) is not None
            ]
            own = [each for each in timed if each[1].strategy == "mobile" and rows_of(each[1]) == AS_IS]
            kept = [each for each in timed if each[3] is not None and each[3] >= -margin]
            made, real = cells[0].config["moe_layers"], cells[0].config["real_moe_layers"]
            shown = [max(group, key=lambda each: each[0], default=None) for group in (own, timed, kept)]
            best = shown[2]
            rows.append(
                (
                    model,
                    f"{made} of {real}",
                    budget,
                    *map(_timed, shown),
                    "-" if best is None else "yes" if best[0] >= WANTED else "no",
                    "; ".join("-" if each is None else _worst(each[1], found) for each in shown),
                )
            )
    head = (
        "geometry",
        "MoE layers made",
        "memory",
        "MoBiLE",
        "fastest",
        f"fastest that loses at most {margin:g} point",
        f"{WANTED:g}x reached",
        "worst task of each",
    )
    note = (
        "Over on-demand-overlap with rows as they are, measured, paired by script; in brackets points less full K's, "
        "from the projected run of the same strategy and rows, whose int4 has the numbers of int4-cpu."
    )
    return Table("Measured over the disk: the fastest", head, tuple(rows), note)


Timed = tuple[float, Record, Interval, float | None]  # speedup, cell, its interval, points


def _points(record: Record, found: Sequence[tuple[str, str, Sequence[Setting]]]) -> float | None:
    """Return the points less full K's of the same strategy, gamma and rows in the record's family; None if unknown."""
    if record.lossless and rows_of(record) == AS_IS:
        return 0.0
    scored = _scored(record, found)
    return None if scored is None else scored.points.value


def _worst(record: Record, found: Sequence[tuple[str, str, Sequence[Setting]]]) -> str:
    """Return the worst task of the same setting and its points; a dash where nothing is lost or it is not known."""
    scored = _scored(record, found)
    return "-" if scored is None or scored.worst is None else scored.worst.short


def _scored(record: Record, found: Sequence[tuple[str, str, Sequence[Setting]]]) -> Setting | None:
    """Return the setting of the same strategy, gamma and rows in the record's family; None if none was scored."""
    rows = rows_of(record).removesuffix("-cpu")
    for _, _, settings in found:
        for each in settings:
            first = each.cells[0]
            same = (first.strategy, first.gamma, each.rows) == (record.strategy, record.gamma, rows)
            if same and family(first) == family(record):
                return each
    return None


def _timed(timed: Timed | None) -> str:
    if timed is None:
        return "-"
    _, record, speed_up, lost = timed
    points = "not known" if lost is None else f"{lost:+.1f}"
    return f"{ratio(speed_up)} {strategy_and_rows(record)} ({points})"


def _swept(setting: Setting) -> bool:
    return bool(setting.cells[0].config["swept"])


def _text(setting: Setting | None) -> str:
    if setting is None:
        return "-"
    return f"{setting.over_base.value:.2f}x {setting.name} ({_lost(setting)})"


def _lost(setting: Setting) -> str:
    """Return the pooled points less full K's, never without those of the worst task; over how many, where not all."""
    asked = "" if setting.loss.items == count(setting.full_k) else f", n = {setting.loss.items:,}"
    return f"{setting.points.value:+.1f}, {setting.worst.short}{asked}" if setting.worst else "0"


def _on_own_rows(settings: Sequence[Setting], margin_points: float) -> str:
    """Return the fastest over the baseline on the same rows, of those that lose at most the margin."""
    left = [
        (each.over_own_rows.value, each)
        for each in settings
        if each.over_own_rows is not None and not each.is_a_limit and each.points.value >= -margin_points
    ]
    if not left:
        return "-"
    speed_up, best = max(left, key=lambda pair: pair[0])
    return f"{speed_up:.2f}x {best.strategy} ({_lost(best)})"
