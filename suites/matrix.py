"""From a preset to its cells, each named by a hash of everything that could change its result."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from mobile.geometry import GEOMETRIES, slots_for
from mobile.hardware import parse_nbytes, profile
from mobile.refusal import Refused
from mobile.residency import STAGING
from mobile.strategy import BigLittle, Strategy, resolve
from suites.real_tasks import REAL, SHIPPED, expand, items_of, locate
from suites.tasks import FOLDER as TASKS

HERE = Path(__file__).parent
ORACLE = "resident"  # its run is the full-K run whose trace every lossless strategy replays
CANARY = "on-demand-overlap"  # what the scrambled router is timed under: a copy for every expert, whichever it is
OVERRIDDEN = ("strategies", "budgets", "gammas", "caches", "shares", "canaries", "items")  # a model's own, if it likes
VIRTUAL = "cpu+virtual"
SCOPES = {None: VIRTUAL, "virtual": VIRTUAL, "paced": "cpu+paced", "cuda": "gpu+pcie"}  # by the link of a cell
VERSIONED = ("torch", "transformers", "lm-eval", "numpy")


@dataclass(frozen=True)
class Model:
    """A checkpoint and the real model its times are charged as.

    It lies in a folder (`path`, relative to suites/, or absolute), or at `revision` of the hub's `hub`.
    """

    name: str
    geometry: str
    weights: str
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    family: str | None = None
    training_seed: int | None = None

    @property
    def folder(self) -> Path:
        """Raises Refused for a model of the hub."""
        if self.path is None:
            raise Refused(f"Model {self.name} lies on the hub and has no folder here; give --model {self.name}=FOLDER.")
        return HERE / self.path


@dataclass(frozen=True)
class Generation:
    """One live run: a model answers a task under one gating; gives text, scores and a trace."""

    model: Model
    task: str
    strategy: str
    gamma: float | None
    items: int
    seed: int
    scrambled: bool = False  # the canary: every router's rows shuffled
    data: str | None = None  # the folder with a real task's files; None is the hub

    @property
    def id(self) -> str:
        own = {name: value for name, value in asdict(self).items() if name != "data"}  # what counts is what is in it
        return _hash(own, code_hash(), _versions(), task_hash(self.task, self.folder), model_hash(self.model))

    @property
    def folder(self) -> Path | None:
        return None if self.data is None else Path(self.data)

    @property
    def label(self) -> str:
        return _label(self, self.strategy, self.gamma)

    @property
    def docs(self) -> list[int]:
        """A seeded random subset of the task's items, ascending; more items hold those of fewer."""
        there_are = items_of(self.task, self.folder)
        return sorted(Random(self.seed).sample(range(there_are), there_are)[: self.items])


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
        return _hash(self.generation.id, self.strategy, self.gamma, card, self.budget, self.timed, self.link)

    @property
    def scope(self) -> str:
        """Whose time it takes: the virtual clock's, alike on any machine, or this machine's."""
        return SCOPES[self.link]

    @property
    def label(self) -> str:
        return _label(self.generation, self.strategy, self.gamma, self.budget)


def _label(of: Generation, strategy: str, gamma: float | None, *budget: str) -> str:
    threshold = () if gamma is None else ("gamma", str(gamma))
    return " ".join((of.model.name, of.task, strategy, *threshold, *budget, *(["canary"] if of.scrambled else [])))


@dataclass(frozen=True)
class Preset:
    """A named set of cells and the minutes it may take on 2 cores."""

    name: str
    minutes: int
    cells: tuple[Cell, ...]

    @property
    def generations(self) -> list[Generation]:
        """The live runs that replayed cells need, each once, in order."""
        return list(dict.fromkeys(cell.generation for cell in self.cells if cell.link is None))

    @property
    def live(self) -> list[Cell]:
        """The cells that are timed live."""
        return [cell for cell in self.cells if cell.link is not None]


def presets() -> list[str]:
    return sorted(path.stem for path in (HERE / "presets").glob("*.toml"))


def read_preset(name: str, folder: Path | None = None, folders: Mapping[str, Path] = MappingProxyType({})) -> Preset:
    """The preset of that name, or at that path, with real tasks' files from `folder` and models from `folders`.

    Raises Refused for one that is unknown or asks for unknown things.
    """
    path = Path(name) if name.endswith(".toml") else HERE / "presets" / f"{name}.toml"
    if not path.is_file():
        raise Refused(f"Unknown preset {name!r}; choose one of: {', '.join(presets())}, or give a .toml file.")
    try:
        data = tomllib.loads(path.read_text())
        return Preset(path.stem, data["minutes"], tuple(_cells(data, folder, folders)))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise Refused(f"Preset {path} cannot be read: {error}.") from error
    except KeyError as error:
        raise Refused(f"Preset {path} lacks {error}; suites/presets/smoke.toml shows what a preset holds.") from error


def _cells(data: dict[str, Any], folder: Path | None, folders: Mapping[str, Path]) -> list[Cell]:
    tasks = expand(data["tasks"])
    there_are = {task: items_of(task, folder) for task in tasks}
    most = max(there_are.values(), default=SHIPPED)
    for count in ("items", "swept_items", "timed_items"):
        if not 1 <= data.get(count, most) <= most:
            raise Refused(f"{count} must be between 1 and {most}, not {data[count]}.")
    models = {model["name"]: _at(Model(**_own(model)), folders) for model in data["models"]}
    if strangers := set(folders) - set(models):
        raise Refused(f"The preset has no model {sorted(strangers)[0]}; it has: {', '.join(models)}.")
    link = data.get("link")
    if link not in SCOPES:
        raise Refused(f"Link {link!r} is not available; choose cuda, virtual or paced, or leave it out to replay.")
    at_most = {task: min(data.get("task_items", {}).get(asked, most), there_are[task]) for task, asked in tasks.items()}
    lies_in = {task: str(folder.absolute()) for task in tasks if folder is not None and task in REAL}
    cells = [
        cell
        for model in data["models"]
        for cell in _cells_of(models[model["name"]], {**data, **model}, link, at_most, lies_in)
    ]
    if not cells:
        raise Refused(
            "The preset asks for no cell; give it a model, task, strategy, hardware, budget and seed at least."
        )
    return cells


def _at(model: Model, folders: Mapping[str, Path]) -> Model:
    """The model, taken from a folder where one is given for it; a checkpoint with our recipe is never called real."""
    if model.name not in folders:
        return model
    folder = folders[model.name].absolute()
    weights = "shipped-tiny" if (folder / "recipe.json").is_file() else model.weights
    return replace(model, path=str(folder), hub=None, revision=None, weights=weights)


def _own(model: dict[str, Any]) -> dict[str, Any]:
    """A model's own fields, without what it overrides of the preset."""
    return {name: value for name, value in model.items() if name not in OVERRIDDEN}


def _cells_of(
    model: Model, data: dict[str, Any], link: str | None, at_most: dict[str, int], lies_in: dict[str, str]
) -> Iterator[Cell]:
    """The cells of one model; `data` is the preset with what this model overrides of it.

    By task, `at_most` is the most items that may be asked, and `lies_in` the folder of those that have one.
    """
    if model.geometry not in GEOMETRIES:
        raise Refused(f"Unknown geometry {model.geometry!r}; choose one of: {', '.join(sorted(GEOMETRIES))}.")
    cards = [str(Path(n).absolute()) if n.endswith(".json") else profile(n).name for n in data["hardware"]]
    for found in map(profile, cards):
        for budget in set(data["budgets"]) - {"smallest"}:
            slots_for(GEOMETRIES[model.geometry], parse_nbytes(budget), found.reserve_nbytes, STAGING)
    model_hash(model)
    items, few, timed = data["items"], data.get("swept_items", data["items"]), data.get("timed_items")
    chosen = [resolve(name) for name in data["strategies"]]
    own = [_gamma(strategy) for strategy in chosen]
    runs = [(strategy, budget, False, items) for strategy in chosen for budget in _budgets(strategy, data["budgets"])]
    runs += [(resolve("mobile", gamma), "smallest", True, few) for gamma in data["gammas"] if gamma not in own]
    runs += [(resolve(name), share, True, items) for name in data.get("caches", []) for share in data.get("shares", [])]

    def generation(task: str, name: str, gamma: float | None, count: int, seed: int, scrambled: bool) -> Generation:
        asked = min(count, at_most[task])
        return Generation(model, task, name, gamma, asked, seed, scrambled, lies_in.get(task))

    for seed, task, card in product(data["seeds"], at_most, cards):
        for strategy, budget, swept, count in runs:
            name = ORACLE if strategy.routes_as_full_k else strategy.name
            live = generation(task, name, _gamma(strategy), count, seed, False)
            # What full K answered is timed on a part of the items, what answers otherwise on all that it answered.
            part = timed if strategy.routes_as_full_k and strategy.name != ORACLE else None
            yield Cell(live, strategy.name, _gamma(strategy), card, budget, swept, part, link)
        if task in data.get("canaries", []):
            scrambled = generation(task, ORACLE, None, data["canary_items"], seed, True)
            yield Cell(scrambled, CANARY, None, card, "smallest", link=link)


def _budgets(strategy: Strategy, budgets: list[str]) -> list[str]:
    return ["all"] if strategy.retain == "everything" else budgets


def _gamma(strategy: Strategy) -> float | None:
    return strategy.gating.gamma if isinstance(strategy.gating, BigLittle) else None


# --- what a result depends on ------------------------------------------------------------------------


def _bytes_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash(*parts: Any) -> str:
    return _bytes_hash(json.dumps(parts, sort_keys=True).encode())[:16]


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED}


@cache
def task_hash(task: str, folder: Path | None = None) -> str:
    """SHA-256 over a task's items, and its YAML where that is ours; lm-eval's follow its version, the hub its name."""
    ours = TASKS / f"{REAL[task].plain if task in REAL else task}.yaml"
    parts = [ours.read_bytes()] if ours.is_file() else []
    return _bytes_hash(b"".join([*parts, *(path.read_bytes() for path in locate(task, folder).values())]))


@cache
def code_hash() -> str:
    """SHA-256 over the code that makes results: mobile, baselines and suites, models and presets left out."""
    rooms = [HERE, HERE.parent / "mobile", HERE.parent / "baselines"]
    files = sorted(path for room in rooms for path in room.rglob("*.py") if "models" not in path.parts)
    return _bytes_hash(b"".join(path.name.encode() + path.read_bytes() for path in files))


@cache
def model_hash(model: Model) -> str:
    """SHA-256 of the checkpoint's list of hashes. Raises Refused if a file is missing or differs from the list.

    A real checkpoint has no list: of the hub it is its name and revision, in a folder its files' names and sizes.
    """
    if model.hub is not None:
        return _bytes_hash(f"{model.hub}@{model.revision}".encode())
    sums = model.folder / "SHA256SUMS"
    if model.weights == "real" and (model.folder / "config.json").is_file():
        return _hash([(path.name, path.stat().st_size) for path in sorted(model.folder.iterdir()) if path.is_file()])
    if not sums.is_file():
        raise Refused(f"Model {model.name} is not in {model.folder}: SHA256SUMS is missing.")
    for line in sums.read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        path = model.folder / name
        if not path.is_file() or _bytes_hash(path.read_bytes()) != expected:
            raise Refused(f"{path} is missing or differs from SHA256SUMS; restore it from the repository.")
    return _bytes_hash(sums.read_bytes())
