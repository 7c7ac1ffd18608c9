"""From a preset to its cells, each named by a hash of everything that could change its result."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from mobile.geometry import GEOMETRIES, slots_for
from mobile.hardware import parse_nbytes, profile
from mobile.refusal import Refused
from mobile.residency import STAGING
from mobile.strategy import BigLittle, Strategy, resolve
from suites.tasks import FOLDER as TASKS
from suites.tasks import GENERATORS

HERE = Path(__file__).parent
ORACLE = "resident"  # its run is the full-K run whose trace every lossless strategy replays
SHIPPED = 250  # test items in each task's data
CANARY = "on-demand-overlap"  # what the scrambled router is timed under: a copy for every expert, whichever it is
OVERRIDDEN = ("strategies", "budgets", "gammas", "caches", "shares", "canaries", "items")  # a model's own, if it likes
VIRTUAL = "cpu+virtual"
VERSIONED = ("torch", "transformers", "lm-eval", "numpy")


@dataclass(frozen=True)
class Model:
    """A checkpoint folder (relative to suites/, or absolute) and the real model its times are charged as."""

    name: str
    path: str
    geometry: str
    weights: str
    family: str | None = None
    training_seed: int | None = None

    @property
    def folder(self) -> Path:
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

    @property
    def id(self) -> str:
        return _hash(asdict(self), code_hash(), _versions(), task_hash(self.task), model_hash(self.model))

    @property
    def label(self) -> str:
        gamma = "" if self.gamma is None else f" gamma {self.gamma}"
        return f"{self.model.name} {self.task} {self.strategy}{gamma}{' canary' if self.scrambled else ''}"

    @property
    def docs(self) -> list[int]:
        """A seeded random subset of the task's items, ascending; more items hold those of fewer."""
        return sorted(Random(self.seed).sample(range(SHIPPED), SHIPPED)[: self.items])


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

    @property
    def id(self) -> str:
        return _hash(self.generation.id, self.strategy, self.gamma, self.hardware, self.budget, self.timed)

    @property
    def scope(self) -> str:
        """Whose time it takes: every cell yet is charged by the virtual clock, alike on any machine."""
        return VIRTUAL

    @property
    def label(self) -> str:
        gamma = "" if self.gamma is None else f" gamma {self.gamma}"
        canary = " canary" if self.generation.scrambled else ""
        return f"{self.generation.model.name} {self.generation.task} {self.strategy}{gamma} {self.budget}{canary}"


@dataclass(frozen=True)
class Preset:
    """A named set of cells and the minutes it may take on 2 cores."""

    name: str
    minutes: int
    cells: tuple[Cell, ...]

    @property
    def generations(self) -> list[Generation]:
        """The live runs the cells need, each once, in order."""
        return list(dict.fromkeys(cell.generation for cell in self.cells))


def presets() -> list[str]:
    return sorted(path.stem for path in (HERE / "presets").glob("*.toml"))


def read_preset(name: str) -> Preset:
    """The preset of that name, or at that path. Raises Refused for one that is unknown or asks for unknown things."""
    path = Path(name) if name.endswith(".toml") else HERE / "presets" / f"{name}.toml"
    if not path.is_file():
        raise Refused(f"Unknown preset {name!r}; choose one of: {', '.join(presets())}, or give a .toml file.")
    try:
        data = tomllib.loads(path.read_text())
        return Preset(path.stem, data["minutes"], tuple(_cells(data)))
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise Refused(f"Preset {path} cannot be read: {error}.") from error
    except KeyError as error:
        raise Refused(f"Preset {path} lacks {error}; suites/presets/smoke.toml shows what a preset holds.") from error


def _cells(data: dict[str, Any]) -> list[Cell]:
    for count in ("items", "swept_items", "timed_items"):
        if not 1 <= data.get(count, SHIPPED) <= SHIPPED:
            raise Refused(f"{count} must be between 1 and {SHIPPED}, not {data[count]}.")
    for task in data["tasks"]:
        if task not in GENERATORS:
            raise Refused(f"Unknown task {task!r}; choose among: {', '.join(GENERATORS)}.")
    cells = [cell for model in data["models"] for cell in _cells_of(Model(**_own(model)), {**data, **model})]
    if not cells:
        raise Refused(
            "The preset asks for no cell; give it a model, task, strategy, hardware, budget and seed at least."
        )
    return cells


def _own(model: dict[str, Any]) -> dict[str, Any]:
    """A model's own fields, without what it overrides of the preset."""
    return {name: value for name, value in model.items() if name not in OVERRIDDEN}


def _cells_of(model: Model, data: dict[str, Any]) -> Iterator[Cell]:
    """The cells of one model; `data` is the preset with what this model overrides of it."""
    if model.geometry not in GEOMETRIES:
        raise Refused(f"Unknown geometry {model.geometry!r}; choose one of: {', '.join(sorted(GEOMETRIES))}.")
    cards = [profile(name) for name in data["hardware"]]
    for card in cards:
        for budget in set(data["budgets"]) - {"smallest"}:
            slots_for(GEOMETRIES[model.geometry], parse_nbytes(budget), card.reserve_nbytes, STAGING)
    model_hash(model)
    items, few, timed = data["items"], data.get("swept_items", data["items"]), data.get("timed_items")
    chosen = [resolve(name) for name in data["strategies"]]
    own = [_gamma(strategy) for strategy in chosen]
    runs = [(strategy, budget, False, items) for strategy in chosen for budget in _budgets(strategy, data["budgets"])]
    runs += [(resolve("mobile", gamma), "smallest", True, few) for gamma in data["gammas"] if gamma not in own]
    runs += [(resolve(name), share, True, items) for name in data.get("caches", []) for share in data.get("shares", [])]
    for seed, task, card in product(data["seeds"], data["tasks"], cards):
        for strategy, budget, swept, count in runs:
            name = ORACLE if strategy.routes_as_full_k else strategy.name
            generation = Generation(model, task, name, _gamma(strategy), count, seed)
            # What full K answered is timed on a part of the items, what answers otherwise on all that it answered.
            part = timed if strategy.routes_as_full_k and strategy.name != ORACLE else None
            yield Cell(generation, strategy.name, _gamma(strategy), card.name, budget, swept, part)
        if task in data.get("canaries", []):
            scrambled = Generation(model, task, ORACLE, None, data["canary_items"], seed, scrambled=True)
            yield Cell(scrambled, CANARY, None, card.name, "smallest")


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
def task_hash(task: str) -> str:
    """SHA-256 over a task's YAML and items."""
    return _bytes_hash((TASKS / f"{task}.yaml").read_bytes() + (TASKS / "data" / f"{task}.jsonl").read_bytes())


@cache
def code_hash() -> str:
    """SHA-256 over the code that makes results: mobile, baselines and suites, models and presets left out."""
    rooms = [HERE, HERE.parent / "mobile", HERE.parent / "baselines"]
    files = sorted(path for room in rooms for path in room.rglob("*.py") if "models" not in path.parts)
    return _bytes_hash(b"".join(path.name.encode() + path.read_bytes() for path in files))


@cache
def model_hash(model: Model) -> str:
    """SHA-256 of the checkpoint's list of hashes. Raises Refused if a file is missing or differs from the list."""
    sums = model.folder / "SHA256SUMS"
    if not sums.is_file():
        raise Refused(f"Model {model.name} is not in {model.folder}: SHA256SUMS is missing.")
    for line in sums.read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        path = model.folder / name
        if not path.is_file() or _bytes_hash(path.read_bytes()) != expected:
            raise Refused(f"{path} is missing or differs from SHA256SUMS; restore it from the repository.")
    return _bytes_hash(sums.read_bytes())
