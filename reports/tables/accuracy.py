"""Tables of accuracy cells: the verdict a family, every gating against full K, and every task by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from reports.data.results import family
from reports.elements.numbers import percent
from reports.elements.page import Table
from suites.plan.accuracy_cells import FULL_K, PAPERS, RANDOM, STATIC, judge
from suites.plan.looks import Difference, error_of
from suites.record import Record

BAND = (0.30, 0.90)  # the accuracies of full K at which a task can show a loss
BRACKETS = (
    "Brackets hold together over all looks with 95 %: each is as wide as its look demands, and wider where items share "
    "their substance. Those of tasks are as wide, and nothing was corrected for their number."
)


@dataclass(frozen=True)
class Judged:
    """All that was asked of one model: the records that have items, in order, and those that came too late."""

    model: str
    records: tuple[Record, ...]
    ended: tuple[Record, ...]

    @property
    def tasks(self) -> list[str]:
        """Return the tasks, in order."""
        return list(dict.fromkeys(record.task for record in self.records))

    @property
    def gatings(self) -> list[str]:
        """Return the names of the gatings besides full K, in the order in which they answered."""
        return [each["gating"] for each in self.records[0].config["gatings"] if each["gating"] != FULL_K]

    @property
    def items(self) -> int:
        return sum(len(record.config["keys"]) for record in self.records)

    @property
    def look(self) -> int:
        """Return the last look: the round whose records are there for every task."""
        return max(record.config["round"] for record in self.records)

    @property
    def margin_points(self) -> float:
        return float(self.records[0].config["margin_points"])

    @cached_property
    def verdict(self) -> str:
        """Return "yes" where MoBiLE at the paper's gamma is shown to lose less than the margin, "no" where more."""
        return self.difference(PAPERS).within(self.margin_points)

    def difference(self, of: str, against: str = FULL_K, task: str | None = None) -> Difference:
        """Return the paired difference of two gatings, over all tasks or one, at the level of the last look."""
        records = [record for record in self.records if task in (None, record.task)]
        return judge(records, self.look, records[0].config["rounds"], of, against)

    def worst(self, of: str) -> tuple[str, Difference]:
        """Return the task on which a gating loses most, and its difference to full K."""
        by_task = {task: self.difference(of, task=task) for task in self.tasks}
        task = min(by_task, key=lambda name: by_task[name].value)
        return task, by_task[task]

    def score(self, task: str | None = None) -> float:
        """Return full K's accuracy, from 0 to 1, over all tasks or one."""
        right = "".join(r.config["right"][FULL_K] for r in self.records if task in (None, r.task))
        return right.count("1") / len(right)

    def rate(self, gating: str) -> float:
        """Return the share of decode tokens of a gating that fell back."""
        counts = [each for r in self.records for each in r.config["gatings"] if each["gating"] == gating]
        return sum(each["fallbacks"] for each in counts) / max(1, sum(each["tokens"] for each in counts))


def judged(records: Sequence[Record]) -> list[Judged]:
    """Return what was asked of each model that was asked anything, in order."""
    found = []
    for model in dict.fromkeys(record.model for record in records):
        mine = [record for record in records if record.model == model]
        asked = tuple(record for record in mine if record.config["keys"])
        if asked:
            found.append(Judged(model, asked, tuple(record for record in mine if record.config["ended"])))
    return found


def in_points(difference: Difference) -> str:
    """Write a difference with its interval, signed."""
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def verdicts(found: Sequence[Judged]) -> Table:
    """Return a row a family: whether MoBiLE's loss is within the margin, and what MoBiLE adds to its little pass."""
    rows = []
    for one in found:
        task, worst = one.worst(PAPERS)
        rows.append(
            (
                family(one.records[0]),
                one.verdict,
                in_points(one.difference(PAPERS)),
                f"{task} {in_points(worst)}",
                in_points(one.difference(STATIC)),
                in_points(one.difference(PAPERS, STATIC)),
                in_points(one.difference(PAPERS, RANDOM)),
                percent(one.rate(PAPERS)),
                f"{one.items:,}" + (f", ended after round {one.look}" if one.ended else ""),
                f"{100 * one.score():.1f}",
                one.model,
            )
        )
    head = (
        "family",
        f"within {found[0].margin_points:g} point",
        f"{PAPERS} less {FULL_K}",
        "worst task",
        f"{STATIC} less {FULL_K}",
        f"{PAPERS} less {STATIC}",
        f"{PAPERS} less {RANDOM}",
        "fallbacks",
        "items",
        f"{FULL_K} %",
        "model",
    )
    return Table("The verdict on negligible loss", head, tuple(rows), BRACKETS)


def gatings(found: Sequence[Judged]) -> Table:
    """Return a row a family and gating: its difference to full K, and how often it fell back."""
    rows = [
        (
            family(one.records[0]),
            gating,
            in_points(one.difference(gating)),
            one.difference(gating).within(one.margin_points),
            f"{one.worst(gating)[0]} {in_points(one.worst(gating)[1])}",
            percent(one.rate(gating)) if gating != STATIC else "-",
            f"{one.difference(gating).lost} / {one.difference(gating).gained}",
        )
        for one in found
        for gating in one.gatings
    ]
    head = (
        "family",
        "gating",
        f"less {FULL_K}",
        f"within {found[0].margin_points:g} point",
        "worst task",
        "fallbacks",
        "lost / gained",
    )
    note = f"{RANDOM.capitalize()} falls back as often as {PAPERS} did on the same items, at tokens drawn by lot."
    return Table("Every gating on the same items", head, tuple(rows), note)


def by_task(found: Sequence[Judged]) -> Table:
    """Return a row a family and task: full K's accuracy, and every gating's difference to it."""
    names = found[0].gatings
    rows = [
        (
            family(one.records[0]),
            task,
            f"{100 * one.score(task):.1f}",
            *(in_points(one.difference(gating, task=task)) for gating in names),
            f"{sum(len(r.config['keys']) for r in one.records if r.task == task):,}",
            f"{len({key for r in one.records if r.task == task for key in r.config['keys']}):,}",
        )
        for one in found
        for task in one.tasks
    ]
    head = ("family", "task", f"{FULL_K} %", *(f"{name} less it" for name in names), "items", "of different substance")
    return Table("Task by task", head, tuple(rows), BRACKETS)


def headroom(one: Judged) -> list[str]:
    """Return the tasks of a family on which full K is neither near the floor nor near the ceiling."""
    return [task for task in one.tasks if BAND[0] <= one.score(task) <= BAND[1]]


def levels(one: Judged) -> str:
    """Return the coverage of the interval of each look, in words."""
    rounds = one.records[0].config["rounds"]
    return ", ".join(f"{100 * (1 - error_of(look, rounds)):.2f} %" for look in range(1, rounds + 1))
