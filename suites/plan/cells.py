"""Presets, read into cells, each named by a hash of everything that could change its result."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from mobile.costs.geometry import GEOMETRIES, slots_for
from mobile.costs.hardware import parse_nbytes, profile
from mobile.errors import Refused
from mobile.links.registry import LINKS, in_words, needs_gpu, scope_of
from mobile.policies.strategy import Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.suggest import offer
from suites.identity import HERE, Model, code_hash, digest, model_hash, task_hash, versions
from suites.record import VIRTUAL, RunFolder, intact_zip, sound
from suites.synthetic.cells import SyntheticCell, synthetic_cells_of
from suites.synthetic.reference_cells import ReferenceCell
from suites.tasks.catalogue import PUBLISHED, TASKS, expand
from suites.tasks.files import items_of, locate

ORACLE = "resident"  # its run is the full-K run whose trace every lossless strategy replays
CANARY = "on-demand-overlap"  # what the scrambled router is timed under: a copy for every expert, whichever it is
OVERRIDABLE = (  # keys of a preset that a model may set for itself
    "strategies",
    "budgets",
    "gammas",
    "caches",
    "shares",
    "canaries",
    "items",
    "fewer_items",
)


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
        return sound(self.output(run)) and intact_zip(run.trace(self.id))

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
        return one.model.name, one.seed, self.strategy, self.gamma or 0, self.hardware, self.budget, self.scope

    @property
    def online(self) -> bool:
        return self.link is not None

    def needs(self, run: RunFolder) -> Path | None:
        return run.answers(self.generation.id) if self.link is None else None

    def output(self, run: RunFolder) -> Path:
        return run.record(self.id)

    def intact(self, run: RunFolder) -> bool:
        return sound(self.output(run))


def generation_from(data: dict[str, Any]) -> Generation:
    """Return the generation whose fields, as JSON, are `data`."""
    return Generation(**{**data, "model": Model(**data["model"])})


def cell_from(data: dict[str, Any]) -> Cell:
    """Return the cell whose fields, as JSON, are `data`."""
    return Cell(**{**data, "generation": generation_from(data["generation"])})


def _label(of: Generation, strategy: str, gamma: float | None, *budget: str) -> str:
    threshold = () if gamma is None else ("gamma", str(gamma))
    return " ".join((of.model.name, of.task, strategy, *threshold, *budget, *(["canary"] if of.scrambled else [])))


@dataclass(frozen=True)
class Preset:
    """A named set of cells and the minutes it may take on 2 cores."""

    name: str
    minutes: int
    cells: tuple[Cell | SyntheticCell | ReferenceCell, ...]

    @property
    def scored(self) -> list[Cell]:
        """Return the cells whose answers are scored."""
        return [cell for cell in self.cells if isinstance(cell, Cell)]

    @property
    def replayed(self) -> list[Cell]:
        """Return the scored cells that are timed by replaying a live run."""
        return [cell for cell in self.scored if cell.link is None]

    @property
    def generations(self) -> list[Generation]:
        """Return the live runs that replayed cells need, each once, in order."""
        return list(dict.fromkeys(cell.generation for cell in self.replayed))

    @property
    def live(self) -> list[Cell]:
        """Return the scored cells that are timed live."""
        return [cell for cell in self.scored if cell.link is not None]

    @property
    def synthetic(self) -> list[SyntheticCell]:
        """Return the cells that play a script."""
        return [cell for cell in self.cells if isinstance(cell, SyntheticCell)]

    @property
    def references(self) -> list[ReferenceCell]:
        """Return the measurements that those are held against."""
        return [cell for cell in self.cells if isinstance(cell, ReferenceCell)]

    def only(self, pattern: str | None) -> Preset:
        """Return the preset with the cells whose label holds the pattern (with * and ? as in file names).

        Raises Refused where none does.
        """
        chosen = self.cells if pattern is None else tuple(c for c in self.cells if fnmatch(c.label, f"*{pattern}*"))
        if not chosen:
            raise Refused(f"No cell of {self.name} is called {pattern!r}; one is called {self.cells[0].label!r}.")
        return replace(self, cells=chosen)


def presets() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(path.stem for path in (HERE / "presets").glob("*.toml"))


def read_preset(
    name: str, folder: Path | None = None, folders: Mapping[str, Path] = MappingProxyType({}), link: str | None = None
) -> Preset:
    """Read the preset of that name, or at that path; published tasks' files are in `folder`, models in `folders`.

    `link` is another than its own for a preset of synthetic cells. Raises Refused for a preset that is unknown or asks
    for unknown things.
    """
    path = Path(name) if name.endswith(".toml") else HERE / "presets" / f"{name}.toml"
    if not path.is_file():
        raise Refused(f"Unknown preset {name!r}; {offer(name, presets())}, or give a .toml file.")
    try:
        data = tomllib.loads(path.read_text())
        if "runs" in data and not folders:
            return Preset(path.stem, data["minutes"], tuple(synthetic_cells_of(data, link)))
        if "runs" in data:
            raise Refused(f"Preset {path.stem} makes its models itself; leave --model out.")
        if link is not None:
            raise Refused(f"Preset {path.stem} says itself how it is timed; leave --link out.")
        return Preset(path.stem, data["minutes"], tuple(_cells(data, folder, folders)))
    except Refused:
        raise
    except (ValueError, TypeError, AttributeError) as error:  # no TOML, no text, or a value of another kind
        raise Refused(f"Preset {path} cannot be read: {error}.") from error
    except KeyError as error:
        raise Refused(f"Preset {path} lacks {error}; suites/presets/smoke.toml shows what a preset holds.") from error


def _cells(data: dict[str, Any], folder: Path | None, folders: Mapping[str, Path]) -> list[Cell]:
    """Return the cells of a preset whose answers are scored. Raises Refused, KeyError, TypeError."""
    tasks = expand(data["tasks"])
    available = {task: items_of(task, folder) for task in tasks}
    most = max(available.values(), default=max(task.items for task in TASKS.values()))
    for count in ("items", "swept_items", "timed_items"):
        if not 1 <= data.get(count, most) <= most:
            raise Refused(f"{count} must be between 1 and {most}, not {data[count]}.")
    models = {model["name"]: _placed(Model(**_model_fields(model)), folders) for model in data["models"]}
    if unknown := set(folders) - set(models):
        raise Refused(f"The preset has no model {sorted(unknown)[0]}; it has: {', '.join(models)}.")
    link = data.get("link")
    if link is not None and link not in LINKS:
        raise Refused(f"Link {link!r} is not available; choose {in_words(tuple(LINKS))}, or leave it out to replay.")
    at_most = {task: min(data.get("task_items", {}).get(asked, most), available[task]) for task, asked in tasks.items()}
    task_folders = {task: str(folder.absolute()) for task in tasks if folder is not None and task in PUBLISHED}
    cells = [
        cell
        for model in data["models"]
        for cell in _cells_of(models[model["name"]], {**data, **model}, link, at_most, task_folders)
    ]
    if not cells:
        raise Refused(
            "The preset asks for no cell; give it a model, task, strategy, hardware, budget and seed at least."
        )
    return cells


def _placed(model: Model, folders: Mapping[str, Path]) -> Model:
    """Return the model with the folder that is given for it, if any; one with our recipe is never called real."""
    if model.name not in folders:
        return model
    folder = folders[model.name].absolute()
    weights = "shipped-tiny" if (folder / "recipe.json").is_file() else model.weights
    return replace(model, path=str(folder), hub=None, revision=None, weights=weights)


def _model_fields(model: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model in a preset, without what it overrides of the preset."""
    return {name: value for name, value in model.items() if name not in OVERRIDABLE}


def _cells_of(
    model: Model, data: dict[str, Any], link: str | None, at_most: dict[str, int], task_folders: dict[str, str]
) -> Iterator[Cell]:
    """Yield the cells of one model; `data` is the preset with what this model overrides of it.

    By task, `at_most` is the most items that may be asked, and `task_folders` the folder of those that have one.
    """
    if model.geometry not in GEOMETRIES:
        raise Refused(f"Unknown geometry {model.geometry!r}; {offer(model.geometry, sorted(GEOMETRIES))}.")
    cards = [_card(name, link) for name in data["hardware"]]
    for found in map(profile, cards):
        for budget in set(data["budgets"]) - {"smallest"}:
            slots_for(GEOMETRIES[model.geometry], parse_nbytes(budget), found.reserve_nbytes, PREFILL_BUFFERS)
    model_hash(model)
    items, few, timed = data["items"], data.get("swept_items", data["items"]), data.get("timed_items")
    chosen = [resolve(name) for name in data["strategies"]]
    gammas = [strategy.gamma for strategy in chosen]
    fewer = data.get("fewer_items", {})
    if unknown := set(fewer) - {strategy.name for strategy in chosen}:
        raise Refused(f"fewer_items names {sorted(unknown)[0]!r}, which is not among the strategies of {model.name}.")
    if min((items, *fewer.values())) < 1:
        raise Refused(f"Model {model.name} must be asked at least one item, also under {', '.join(fewer) or 'any'}.")
    runs = [
        (strategy, budget, False, min(items, fewer.get(strategy.name, items)))
        for strategy in chosen
        for budget in _budgets(strategy, data["budgets"])
    ]
    runs += [(resolve("mobile", gamma), "smallest", True, few) for gamma in data["gammas"] if gamma not in gammas]
    runs += [(resolve(name), share, True, items) for name in data.get("caches", []) for share in data.get("shares", [])]

    for seed, task, card in product(data["seeds"], at_most, cards):
        generation = partial(Generation, model, task, seed=seed, data=task_folders.get(task), hardware=card)
        for strategy, budget, swept, count in runs:
            # Every item is timed once for each way to answer. A part of them is timed otherwise, and where a lossless
            # strategy repeats full K's answers; one that needs a live run for that is asked no more than that part.
            name = ORACLE if strategy.routes_as_full_k else strategy.name
            whole = strategy.name == ORACLE if strategy.lossless else swept or budget == data["budgets"][0]
            asked = min(count, timed or count) if strategy.lossless and name != ORACLE else count
            live = generation(name, strategy.gamma, min(asked, at_most[task]))
            yield Cell(live, strategy.name, strategy.gamma, card, budget, swept, None if whole else timed, link)
        if task in data.get("canaries", []):
            scrambled = generation(ORACLE, None, min(data["canary_items"], at_most[task]), scrambled=True)
            yield Cell(scrambled, CANARY, None, card, "smallest", link=link)


def _card(name: str, link: str | None) -> str:
    """Return a profile's name, or its file's absolute path. Over a real link "auto" stays: the card that is there."""
    if name.endswith(".json"):
        return str(Path(name).absolute())
    return name if name == "auto" and needs_gpu(link) else profile(name).name


def _budgets(strategy: Strategy, budgets: list[str]) -> list[str]:
    """Return the budgets that make a difference: none does to a strategy that keeps every expert."""
    return ["all"] if strategy.retain == "everything" else budgets
