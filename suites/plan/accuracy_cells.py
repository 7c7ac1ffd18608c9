"""Accuracy cells: one model on fresh items of one task, answered by each of several gatings. No torch here.

The items come in rounds, and a family is done after the round at which its verdict is settled (`suites.plan.looks`).
`suites.measure.accuracy` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mobile.errors import Refused
from mobile.policies.big_little import MOBILE
from suites.identity import Model, code_hash, digest, model_hash, task_hash, versions
from suites.plan import looks
from suites.record import VIRTUAL, Record, RunFolder, is_record, load
from suites.tasks.catalogue import SHIPPED

FULL_K, STATIC, RANDOM = "full K", "static K/2", "random fallback"  # the gatings besides MoBiLE's


def called(gamma: float) -> str:
    """Return the name of MoBiLE's gating at that gamma."""
    return f"MoBiLE {gamma:g}"


PAPERS = called(MOBILE.gamma or 0.0)  # the one that a verdict is about


@dataclass(frozen=True)
class AccuracyCell:
    """Round `round` of `rounds` of a task: `items` fresh items, answered at each of `gammas` and by the controls.

    `tasks` are all of the preset: their earlier rounds decide whether this one is asked.
    """

    model: Model
    task: str
    tasks: tuple[str, ...]
    gammas: tuple[float, ...]
    items: int
    round: int
    rounds: int
    margin_points: float
    seed: int

    strategy = "mobile"
    gamma = None
    budget = "smallest"
    hardware = "auto"

    kind = "accuracy"
    scope = VIRTUAL  # alike on any machine
    online = False

    @property
    def id(self) -> str:
        tasks = [task_hash(task) for task in self.tasks]
        return digest(asdict(self), code_hash(), versions(), tasks, model_hash(self.model))

    @property
    def label(self) -> str:
        return f"{self.model.name} {self.task} accuracy round {self.round} of {self.rounds}"

    @property
    def shared(self) -> tuple:
        """Return which model is loaded: the rounds of a family follow each other in one job."""
        return (self.model.name,)

    def needs(self, run: RunFolder) -> Path | None:
        return None

    def output(self, run: RunFolder) -> Path:
        return run.record(self.id)

    def intact(self, run: RunFolder) -> bool:
        return is_record(self.output(run))

    def settled(self, run: RunFolder) -> tuple[int, looks.Judgement] | None:
        """Return the earlier round that settled the verdict of the family, and the verdict; None if none did.

        A round that lacks a record, of a cell that failed, settles nothing.
        """
        asked: list[Record] = []
        for number in range(1, self.round):
            paths = [replace(self, task=task, round=number).output(run) for task in self.tasks]
            if not all(map(is_record, paths)):
                return None
            asked += map(load, paths)
            verdict = judge(asked, number, self.rounds).within(self.margin_points)
            if verdict != "not shown":
                return number, verdict
        return None


def judge(
    records: Iterable[Record], look: int, rounds: int, of: str = PAPERS, against: str = FULL_K
) -> looks.Difference:
    """Return the paired difference of two gatings over all items of these records, at the level of that look."""
    first, second, keys = [], [], []
    for record in records:
        first.append(record.config["right"][against])
        second.append(record.config["right"][of])
        keys += [f"{record.task} {key}" for key in record.config["keys"]]
    return looks.difference("".join(first), "".join(second), keys, looks.error_of(look, rounds))


def accuracy_cell_from(data: dict[str, Any]) -> AccuracyCell:
    """Return the cell whose fields, as JSON, are `data`."""
    lists = {name: tuple(data[name]) for name in ("tasks", "gammas")}
    return AccuracyCell(**{**data, **lists, "model": Model(**data["model"])})


def accuracy_cells_of(data: dict[str, Any], models: Sequence[Model]) -> Iterator[AccuracyCell]:
    """Yield the cells of a preset with rounds, family by family, round by round. Raise Refused, KeyError."""
    for task in data["tasks"]:
        if task not in SHIPPED:
            raise Refused(f"Fresh items are generated, which those of {task} are not; leave it out.")
    gammas = tuple(dict.fromkeys((MOBILE.gamma or 0.0, *data["gammas"])))
    for model in models:
        model_hash(model)
    for model, seed, number, task in product(models, data["seeds"], range(data["rounds"]), data["tasks"]):
        yield AccuracyCell(
            model,
            task,
            tuple(data["tasks"]),
            gammas,
            data["fresh_items"],
            number + 1,
            data["rounds"],
            data["margin_points"],
            seed,
        )
