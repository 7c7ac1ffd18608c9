"""Settings of a model at equal memory: strategy, gamma and row format, each with its speed and with what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from reports.data.compare import Worst, accuracy, count, speedup, strategy_name, worst_task
from reports.data.groups import Group, full_k, knows_future
from reports.data.results import AS_IS, Results, rows_of
from reports.stats.intervals import Interval, Paired
from suites.record import Record

BASE = "on-demand-overlap"


@dataclass(frozen=True)
class Setting:
    """One strategy on one row format under one memory budget.

    `cells` are what was timed, one a task. `answers` are the cells whose answers it gives, on the most items; `full_k`
    those of all experts in their own rows, the reference. `over_base` and `over_lru` are its speedups over
    on-demand-overlap and lru with rows as they are at the same memory, `over_own_rows` that over on-demand-overlap on
    its own rows.
    """

    cells: Group
    answers: Group
    full_k: Group
    over_base: Interval
    over_lru: Interval | None
    over_own_rows: Interval | None

    @property
    def name(self) -> str:
        """Return the strategy with its gamma, and the rows where they are packed."""
        return self.strategy if self.rows == AS_IS else f"{self.strategy}, {self.rows}"

    @property
    def strategy(self) -> str:
        return strategy_name(self.cells[0])

    @property
    def rows(self) -> str:
        return rows_of(self.cells[0])

    @property
    def of_full_k(self) -> bool:
        """Return whether its answers are those of full K in its own rows."""
        return self.cells[0].lossless

    @property
    def exact(self) -> bool:
        """Return whether its answers are those of the stock model: all experts, in rows as they are."""
        return self.of_full_k and self.rows == AS_IS

    @property
    def is_a_limit(self) -> bool:
        """Return whether it knows the future, which no system does."""
        return knows_future(self.cells[0])

    @cached_property
    def loss(self) -> Paired:
        """Return its accuracy less that of full K on the same items."""
        return accuracy(self.answers, self.full_k)

    @property
    def points(self) -> Interval:
        """Return the difference in points; exactly none where the answers are the stock model's."""
        return Interval(0, 0, 0) if self.exact else self.loss.difference

    @cached_property
    def worst(self) -> Worst | None:
        """Return the task on which most is lost; None where the answers are the stock model's."""
        return None if self.exact else worst_task(self.answers, self.full_k)


def memory_budgets(results: Results, model: str) -> list[str]:
    """Return the budgets of a model that are bytes, and so the same for every strategy and row format."""
    return [budget for budget in results.budgets(model) if budget != "smallest"]


def at_memory(results: Results, model: str, budget: str) -> list[Setting]:
    """Return every setting of a model under a budget, in the plan's order; none where the baseline is missing."""
    cells = [r for r in results.scored if r.model == model]
    tasks = results.tasks(model)
    by_setting: dict[tuple[str, float | None, str, str], Group] = {}
    for record in cells:
        by_setting.setdefault((record.strategy, record.gamma, rows_of(record), record.budget), []).append(record)
    whole = {key: group for key, group in by_setting.items() if {record.task for record in group} == set(tasks)}
    reference, base = full_k(results, model), whole.get((BASE, None, AS_IS, budget))
    if not reference or base is None:
        return []
    found = []
    for (_, _, rows, its_budget), group in whole.items():
        over_base = speedup(group, base) if its_budget == budget else None
        answers = _answers(whole, group)
        if over_base is None or not answers:
            continue
        lru, own_rows = (whole.get((name, None, on, budget)) for name, on in (("lru", AS_IS), (BASE, rows)))
        others = (None if other is None else speedup(group, other) for other in (lru, own_rows))
        found.append(Setting(group, answers, reference, over_base, *others))
    return found


def _answers(whole: dict[tuple[str, float | None, str, str], Group], group: Group) -> Group:
    """Return the cells whose answers a group gives: its own if it answered itself, else those of a live run's whole."""
    first = group[0]
    if answered_itself(first):
        return group
    wrote = first.config.get("answers_of") or first.strategy
    gamma = None if first.lossless else first.gamma
    same = [g for (name, its, rows, _), g in whole.items() if (name, its, rows) == (wrote, gamma, rows_of(first))]
    return max(same, key=count, default=[])


def answered_itself(record: Record) -> bool:
    """Return whether a cell was timed on its own answers, which depend on what was in the slots."""
    return record.config.get("link") is not None
