"""The first screen of a page: one sentence of verdict, three tiles, and where, when and how the run was made.

Speed is MoBiLE's at its own threshold over overlapped plain offloading (`on-demand-overlap`), with the least memory
of the run. A rival is the fastest strategy that gives full K's answers, offloads, and knows no future.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import verdict
from reports.data import groups
from reports.data.compare import accuracy, count, speedup
from reports.data.groups import ON_DEMAND, Group
from reports.data.results import Results
from reports.elements.numbers import points, ratio
from reports.elements.page import FirstScreen, Tile
from reports.sections import accuracy as rounds
from reports.sections import past_paper
from reports.stats.intervals import Interval, Paired
from reports.tables import synthetic
from suites.record import Record

BASE = "on-demand-overlap"
NO_RIVALS = ("resident", *ON_DEMAND)
ROOT = Path(__file__).parents[2]
NO_VERDICT = "No verdict: a control of this run is broken, as said above."


@dataclass(frozen=True)
class Case:
    """MoBiLE over the baseline on one model, memory and link, and the best lossless rival there."""

    model: str
    memory: str
    mobile: Group
    base: Group
    over_base: Interval
    rival: Group
    rival_over_base: Interval | None
    rival_over_mobile: Interval | None


def first_screen(results: Results, paper: dict[str, Any], trusted: bool = True) -> FirstScreen:
    """Return the first screen; tiles that this run has no numbers for are left out, and the sentence says so."""
    only_rounds = results.accuracy and not results.records
    said, tiles = rounds.screen(results) if only_rounds else _screen(results, paper)
    return FirstScreen(said if trusted else NO_VERDICT, tiles, _made(results), links(paper), command(results.preset))


def _screen(results: Results, paper: dict[str, Any]) -> tuple[str, tuple[Tile, ...]]:
    """Return the sentence and the tiles of a run that was timed."""
    least = [case for model in results.models if (case := scored_case(results, model, least_memory(results, model)))]
    timed = timed_cases(results)
    losses = {case.model: accuracy(case.mobile, groups.full_k(results, case.model)) for case in least}
    losses = {model: loss for model, loss in losses.items() if loss.items}
    tiles = _speed(least, timed, paper), _worst_loss(results, losses), _rival(results, least, timed)
    past = past_paper.in_short(results, paper["accuracy"]["margin_points"])
    loss = rounds.cited_clause(results) or _loss_clause(losses, paper["accuracy"]["margin_points"])
    return _verdict(least, timed, f"{loss}{f'; {past}' if past else ''}", paper), tuple(tile for tile in tiles if tile)


def least_memory(results: Results, model: str) -> str:
    """Return the budget under which MoBiLE has the fewest slots; `smallest` where it has none."""
    found = {record.budget: record.slots or 0 for record in groups_of_mobile(results, model)}
    return min(found, key=lambda budget: found[budget], default="smallest")


def groups_of_mobile(results: Results, model: str) -> Group:
    """Return MoBiLE's cells of a model at its own threshold, under every budget for all models."""
    gamma, budgets = groups.default_gamma(results, model), results.budgets(model)
    return [r for r in results.select(model=model, strategy="mobile", gamma=gamma) if r.budget in budgets]


def scored_case(results: Results, model: str, budget: str) -> Case | None:
    """Return the case of a model whose answers are scored; None where MoBiLE or the baseline was not timed."""
    mobile = groups.mobile(results, model, budget)
    base = groups.baselines(results, budget, model).get(BASE)
    over_base = speedup(mobile, base) if mobile and base else None
    if not base or over_base is None:
        return None
    others = [group for group in groups.unswept(results, budget, model) if is_rival(group[0])]
    return _case(model, budget, mobile, over_base, others, base)


def timed_cases(results: Results) -> list[Case]:
    """Return the cases of synthetic cells: a geometry and link each, on recorded routing, with the least memory."""
    found = []
    cells = synthetic.on_recorded_routing(results.synthetic)
    for model, link in dict.fromkeys((r.model, synthetic.link_title(r)) for r in cells):
        here = [r for r in cells if (r.model, synthetic.link_title(r)) == (model, link)]
        own = min((r for r in here if r.strategy == "mobile"), key=lambda r: r.slots or 0, default=None)
        base = synthetic.baseline_cell(here, own, BASE) if own else []
        over_base = speedup([own], base) if own and base else None
        if own and over_base:
            others = [[r] for r in here if is_rival(r) and r.budget == own.budget]
            found.append(_case(model, own.budget, [own], over_base, others, base))
    return found


def is_rival(record: Record) -> bool:
    """Return whether a cell's strategy gives full K's answers, offloads experts, and could be built today."""
    return record.lossless and not groups.knows_future(record) and record.strategy not in NO_RIVALS


def _case(model: str, memory: str, mobile: Group, over_base: Interval, others: Sequence[Group], base: Group) -> Case:
    timed = [(faster, group) for group in others if (faster := speedup(group, base))]
    best = max(timed, key=lambda each: each[0].value, default=None)
    if best is None:
        return Case(model, memory, mobile, base, over_base, [], None, None)
    return Case(model, memory, mobile, base, over_base, best[1], best[0], speedup(best[1], mobile))


def _speed(least: Sequence[Case], timed: Sequence[Case], paper: dict[str, Any]) -> Tile | None:
    claim = paper["speedup"]
    lines = [
        (_span([case.over_base for case in cases]), f"{_how_in_short(cases)}, {_of(cases)}, {_memory(cases)}")
        for cases in (least, *_by_scope(timed))
        if cases
    ]
    published = (f"{claim['low']:.2f}x to {claim['high']:.2f}x", "published, consumer GPU")
    return Tile("Speed over plain offloading", (*lines, published)) if lines else None


def _worst_loss(results: Results, losses: dict[str, Paired]) -> Tile | None:
    """Return the largest loss of one task, then the largest one of all tasks of a model, beside full K."""
    by_task = [
        (loss, f"{model} on {task}")
        for model in losses
        for task in results.tasks(model)
        if (loss := _loss_on(results, model, task)) is not None
    ]
    if not by_task:
        return None
    pooled = min(((loss, f"{model}, all tasks together") for model, loss in losses.items()), key=_lost)
    shown = (min(by_task, key=_lost), *((pooled,) if len(by_task) > len(losses) else ()))  # one task is all tasks
    lines = [(f"{points(loss.difference)} points", f"{where}, n = {loss.items:,}") for loss, where in shown]
    return Tile("Worst loss of accuracy", tuple(lines))


def _loss_on(results: Results, model: str, task: str) -> Paired | None:
    """Return MoBiLE's loss on one task, by the cell with the most items: its answers do not depend on the memory."""
    cells = [record for record in groups_of_mobile(results, model) if record.task == task]
    full_k = groups.full_k(results, model, task=task)
    loss = accuracy([max(cells, key=lambda r: count([r]))], full_k) if cells and full_k else None
    return loss if loss and loss.items else None


def _lost(found: tuple[Paired, str]) -> float:
    return found[0].difference.value


def _rival(results: Results, least: Sequence[Case], timed: Sequence[Case]) -> Tile | None:
    most = [case for model in results.models if (case := scored_case(results, model, _most_memory(results, model)))]
    lines = []
    for cases in (least, [case for case in most if case not in least], *_by_scope(timed)):
        beside = [case for case in cases if case.rival_over_base]
        if beside:
            names = dict.fromkeys(case.rival[0].strategy for case in beside)
            own = _span([case.over_base for case in beside])
            lines.append(
                (
                    _span([case.rival_over_base for case in beside if case.rival_over_base]),
                    f"{' or '.join(names)}; MoBiLE {own}; {_how_in_short(beside)}, {_memory(beside)}",
                )
            )
    return Tile("Best lossless rival, over the same", tuple(lines)) if lines else None


def _most_memory(results: Results, model: str) -> str:
    """Return the largest budget that does not hold the whole model; the least one where there is no other."""
    slots = {}
    for record in groups_of_mobile(results, model):
        if not groups.holds_all([record]):
            slots[record.budget] = record.slots or 0
    return max(slots, key=lambda budget: slots[budget], default=least_memory(results, model))


def _verdict(least: Sequence[Case], timed: Sequence[Case], loss: str, paper: dict[str, Any]) -> str:
    """Return the one sentence; `loss` are its clauses on accuracy."""
    cases = least or timed
    if not cases:
        return rounds.LACKS
    how = _how(cases)
    speed = (
        f"{how[:1].upper()}{how[1:]}, with {_memory(cases, 'the ')}, MoBiLE decodes "
        f"{_span([c.over_base for c in cases])} as fast as plain offloading ({BASE})"
    )
    return f"{speed}{loss}{_rival_clause(cases)}{_band_clause(least, paper)}."


def _rival_clause(cases: Sequence[Case]) -> str:
    """Return in how many cases a lossless strategy is shown to be faster, paired by prompt."""
    found = [(case.rival[0].strategy, case.rival_over_mobile.low > 1) for case in cases if case.rival_over_mobile]
    if not found:
        return ""
    if len(found) == 1:
        [(name, faster)] = found
        return f"; {name}, which is lossless, is {'' if faster else 'not shown to be '}faster there"
    return (
        f"; a lossless rival is shown to be faster there in {sum(faster for _, faster in found)} of {len(found)} cases"
    )


def _loss_clause(losses: dict[str, Paired], margin: float) -> str:
    """Return whether the loss is negligible, by the rule that was fixed before the run."""
    if not losses:
        return "; nothing was answered, so nothing is said of accuracy"
    said = [loss.within(margin) for loss in losses.values()]
    if len(said) == 1:
        words = {"yes": "is shown to be", "no": "is more than", "not shown": "is not shown to be"}
        return f"; its loss of accuracy {words[said[0]]} {margin:g} point" + ("" if said[0] == "no" else " at most")
    more = f" and to be more for {said.count('no')}" if "no" in said else ""
    return (
        f"; its loss of accuracy is shown to be at most {margin:g} point for {said.count('yes')} of {len(said)} "
        f"families{more}"
    )


def _band_clause(least: Sequence[Case], paper: dict[str, Any]) -> str:
    """Return how many cases reproduce the published speed; empty where they may not be held against it."""
    stamp = verdict.stamp_of(*(group for case in least for group in (case.mobile, case.base)))
    if not least or stamp.refusal:
        return ""
    claim = paper["speedup"]
    outcomes = [verdict.speedup_verdict(case.over_base, claim["low"], claim["high"], stamp) for case in least]
    return f"; the published speed is {', '.join(f'{o} {outcomes.count(o)}x' for o in dict.fromkeys(outcomes))}"


def _how(cases: Sequence[Case]) -> str:
    """Return whether times were computed or measured, and on what."""
    record = cases[0].mobile[0]
    if record.scope == "cpu+virtual":
        return f"projected onto {' and '.join(dict.fromkeys(case.mobile[0].hardware for case in cases))}"
    if record.scope == "cpu+disk":
        return "measured over a disk"
    return f"measured ({record.scope}, {record.weights} weights)"


def _how_in_short(cases: Sequence[Case]) -> str:
    return "projected" if cases[0].mobile[0].scope == "cpu+virtual" else _how(cases)


def _of(cases: Sequence[Case]) -> str:
    models = dict.fromkeys(case.model for case in cases)
    return next(iter(models)) if len(models) == 1 else f"{len(models)} families"


def _memory(cases: Sequence[Case], article: str = "") -> str:
    """Return the memory of the cases in words."""
    budgets = list(dict.fromkeys(case.memory for case in cases))
    fewest = [f"{article}fewest slots"] if "smallest" in budgets else []
    sizes = ", ".join(budget for budget in budgets if budget != "smallest")
    return " or ".join((*fewest, *((sizes,) if sizes else ())))


def _by_scope(cases: Sequence[Case]) -> list[list[Case]]:
    scopes = dict.fromkeys(case.mobile[0].scope for case in cases)
    return [[case for case in cases if case.mobile[0].scope == scope] for scope in scopes]


def _span(found: Sequence[Interval]) -> str:
    """Write one ratio with its interval; of several, the least and the largest."""
    if len(found) == 1:
        return ratio(found[0])
    low, high = (f"{end(each.value for each in found):.2f}x" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _made(results: Results) -> str:
    """Return the days of the records and the machines, in words."""
    records = results.all_records
    days = sorted({day for r in records if (day := r.environment.get("date"))})
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "(day not kept)"
    machines = {verdict.machine_identity(r) for r in records}
    if len(machines) > 1:
        return f"Recorded {when} on {len(machines)} unlike machines."
    where = records[0].environment
    gpu = (where["gpu"] or {}).get("name") or "no GPU"
    return f"Recorded {when} on {where['cpu']}, {where['cores']} cores, {gpu}."


def links(paper: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the addresses of the paper and, where the project states one, of the repository."""
    path = ROOT / "pyproject.toml"
    urls = tomllib.loads(path.read_text(encoding="utf-8"))["project"].get("urls", {}) if path.is_file() else {}
    named = {name.lower(): url for name, url in urls.items()}
    repository = next((named[name] for name in ("repository", "source", "homepage") if name in named), None)
    return (("paper", paper["url"]), *((("repository", repository),) if repository else ()))


def command(preset: str) -> str:
    """Return the command line that runs the preset and builds its page; a preset that is not shipped is a file."""
    shipped = {path.stem for path in (ROOT / "suites" / "presets").glob("*.toml")}
    named = shlex.quote(preset if preset in shipped else f"{preset}.toml")
    return f"python -m suites run --preset {named} && python -m reports build"
