"""Live runs and the cells that time them, each named by a hash of everything that could change its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from mobile.costs.hardware import profile
from mobile.costs.rows import AS_IS
from mobile.links.registry import scope_of
from suites.identity import Model, code_hash, digest, model_hash, task_hash, versions
from suites.record import VIRTUAL, RunFolder, intact_zip, is_record, sound
from suites.run_files import read_trace_about
from suites.tasks.files import items_of, locate


@dataclass(frozen=True)
class Generation:
    """One live run: a model answers a task under one gating; gives text, scores and a trace.

    `data` is the folder with a real task's files, None the hub. No answer depends on `hardware`, whose profile only
    times the checks of the run against a replay.
    """

    model: Model
    task: str
    strategy: str
    gamma: float | None
    items: int
    seed: int
    scrambled: bool = False  # the canary: every router's rows shuffled
    data: str | None = None
    hardware: str = field(default="auto", compare=False)
    rows: str = AS_IS  # how the experts' rows are packed; other rows are other weights, and may answer otherwise

    kind = "generate"
    scope = VIRTUAL  # alike on any machine
    shared = ()  # one process does any of them, a model at a time

    @property
    def id(self) -> str:
        fields = {name: value for name, value in asdict(self).items() if name not in ("data", "hardware")}
        return digest(fields, code_hash(), versions(), task_hash(self.task, self.folder), model_hash(self.model))

    @property
    def folder(self) -> Path | None:
        return None if self.data is None else Path(self.data)

    @property
    def label(self) -> str:
        return _label(self, self.strategy, self.gamma)

    @property
    def online(self) -> bool:
        return not locate(self.task, self.folder)

    def needs(self, run: RunFolder) -> None:
        return None

    def output(self, run: RunFolder) -> Path:
        return run.answers(self.id)

    def intact(self, run: RunFolder) -> bool:
        if not sound(self.output(run), generation=self.id) or not intact_zip(run.trace(self.id)):
            return False
        try:
            return read_trace_about(run, self.id).get("generation") == self.id
        except (OSError, ValueError):
            return False

    @property
    def docs(self) -> list[int]:
        """Return a seeded random subset of the task's items, ascending; a larger one has the items of a smaller."""
        available = items_of(self.task, self.folder)
        return sorted(Random(self.seed).sample(range(available), available)[: self.items])


@dataclass(frozen=True)
class Cell:
    """One row of a result: a generation timed under a strategy, on hardware with a memory budget."""

    generation: Generation
    strategy: str
    gamma: float | None
    hardware: str
    budget: str
    swept: bool = False  # one point of a sweep, over gamma or over cache sizes, beside the strategy's own
    timed: int | None = None  # how many of the items are timed; None: all
    link: str | None = None  # over which link it is timed live, alone, answering itself; None: its trace is replayed

    @property
    def id(self) -> str:
        card = asdict(profile(self.hardware))  # what counts is what is in it, wherever it lies
        return digest(self.generation.id, self.strategy, self.gamma, card, self.budget, self.timed, self.link)

    @property
    def docs(self) -> list[int]:
        """Return the items that are timed, ascending: those that a live run of so few would have been asked.

        A seeded random part, since a file's first items need not be like its others (real tasks are in no random
        order), and one that other small cells of the same seed share, so that more pairs can be formed.
        """
        few = self.generation.items if self.timed is None else min(self.timed, self.generation.items)
        return replace(self.generation, items=few).docs

    @property
    def scope(self) -> str:
        """Return whose time it takes: the virtual clock's, alike on any machine, or this machine's."""
        return scope_of(self.link)

    @property
    def label(self) -> str:
        return _label(self.generation, self.strategy, self.gamma, self.budget)

    @property
    def model(self) -> Model:
        return self.generation.model

    @property
    def task(self) -> str:
        return self.generation.task

    @property
    def kind(self) -> str:
        return "replay" if self.link is None else "live"

    @property
    def shared(self) -> tuple:
        """Return which trace is replayed; or how the model is attached, whatever the task."""
        if self.link is None:
            return (self.generation.id,)
        one = self.generation
        served = one.rows, self.strategy, self.gamma or 0, self.hardware, self.budget, self.scope
        return one.model.name, one.seed, *served

    @property
    def online(self) -> bool:
        return self.link is not None and (self.model.hub is not None or self.generation.online)

    def needs(self, run: RunFolder) -> Path | None:
        return run.answers(self.generation.id) if self.link is None else None

    def output(self, run: RunFolder) -> Path:
        return run.record(self.id)

    def intact(self, run: RunFolder) -> bool:
        return is_record(self.output(run))


def generation_from(data: dict[str, Any]) -> Generation:
    """Return the generation whose fields, as JSON, are `data`."""
    return Generation(**{**data, "model": Model(**data["model"])})


def cell_from(data: dict[str, Any]) -> Cell:
    """Return the cell whose fields, as JSON, are `data`."""
    return Cell(**{**data, "generation": generation_from(data["generation"])})


def _label(of: Generation, strategy: str, gamma: float | None, *budget: str) -> str:
    threshold = () if gamma is None else ("gamma", str(gamma))
    packed = () if of.rows == AS_IS else ("rows", of.rows)
    control = ("canary",) if of.scrambled else ()
    return " ".join((of.model.name, of.task, strategy, *threshold, *packed, *budget, *control))
