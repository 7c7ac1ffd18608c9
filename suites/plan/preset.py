"""A preset: what a run does, read from TOML into its cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mobile.costs.geometry import GEOMETRIES, slots_for
from mobile.costs.hardware import parse_nbytes, profile
from mobile.costs.rows import AS_IS, check_rows
from mobile.errors import Refused, one_line
from mobile.links.registry import LINKS, in_words, needs_gpu
from mobile.policies.strategy import Strategy, resolve
from mobile.residency.residency import PREFILL_BUFFERS
from mobile.suggest import offer
from suites.budget import percent_of
from suites.identity import HERE, SHIPPED, Model, check_name, lists_shipped_files, model_hash
from suites.plan import preset_file
from suites.plan.accuracy_cells import AccuracyCell, accuracy_cells_of
from suites.plan.cells import Cell, Generation
from suites.plan.signal_cells import SignalCell, signal_cells_of
from suites.synthetic.cells import SyntheticCell, synthetic_cells_of
from suites.synthetic.reference_cells import ReferenceCell
from suites.tasks.catalogue import GROUPS, PUBLISHED, TASKS, expand
from suites.tasks.files import items_of

ORACLE = "resident"  # its run is the full-K run whose trace every lossless strategy replays
CANARY = "on-demand-overlap"  # what the scrambled router is timed under: a copy for every expert, whichever it is
MOST_CELLS = 20_000
AnyCell = Cell | SyntheticCell | ReferenceCell | SignalCell | AccuracyCell
OVERRIDABLE = (  # keys of a preset that a model may set for itself
    "strategies",
    "budgets",
    "gammas",
    "swept",
    "rows",
    "caches",
    "shares",
    "canaries",
    "items",
    "fewer_items",
)


@dataclass(frozen=True)
class Preset:
    """A named set of cells and the minutes it may take on 2 cores."""

    name: str
    minutes: int
    cells: tuple[AnyCell, ...]

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

    @property
    def signals(self) -> list[SignalCell]:
        """Return the cells that compare confidence signals."""
        return [cell for cell in self.cells if isinstance(cell, SignalCell)]

    @property
    def accuracy(self) -> list[AccuracyCell]:
        """Return the cells that answer rounds of fresh items."""
        return [cell for cell in self.cells if isinstance(cell, AccuracyCell)]

    def only(self, pattern: str | None) -> Preset:
        """Return the preset with the cells whose label holds the pattern (as it is, or with * and ? as in file names).

        Raise Refused where none does.
        """
        chosen = tuple(
            c for c in self.cells if pattern is None or pattern in c.label or fnmatch(c.label, f"*{pattern}*")
        )
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

    `link` is another than its own for a preset of synthetic cells. Raise Refused for a preset that is unknown or asks
    for unknown things.
    """
    path = Path(name) if name.endswith(".toml") else HERE / "presets" / f"{name}.toml"
    if not path.is_file():
        raise Refused(f"Unknown preset {name!r}; {offer(name, presets())}, or give a .toml file.")
    check_name("A preset", path.stem)
    if path.stem.startswith("."):  # "...toml" would be run in the folder above
        raise Refused(f"A preset cannot be called {path.stem}; give its file a name that begins with no dot.")
    try:
        data = preset_file.read(path)
        if "runs" in data and not folders:
            return _preset(path.stem, data, synthetic_cells_of(data, link))
        if "runs" in data:
            raise Refused(f"Preset {path.stem} makes its models itself; leave --model out.")
        if link is not None:
            raise Refused(f"Preset {path.stem} says itself how it is timed; leave --link out.")
        if "rounds" in data:
            models = [_placed(Model(**_model_fields(model)), folders) for model in data["models"]]
            return _preset(path.stem, data, accuracy_cells_of(data, models))
        measured = read_preset(data["measured"]).cells if "measured" in data else ()
        return _preset(path.stem, data, chain(_cells(data, folder, folders), measured))
    except Refused:
        raise
    except (ValueError, TypeError, AttributeError) as error:  # no TOML, no text, or a value of another kind
        raise Refused(f"Preset {path} cannot be read: {one_line(error)}.") from error
    except KeyError as error:
        raise Refused(f"Preset {path} lacks {error}; suites/presets/smoke.toml shows what a preset holds.") from error


def _preset(name: str, data: dict[str, Any], asked: Iterable[AnyCell]) -> Preset:
    """Return the preset of these cells. Raise Refused where there are none, too many, or one twice; KeyError."""
    cells = tuple(islice(asked, MOST_CELLS + 1))
    if not cells:
        raise Refused(
            "The preset asks for no cell; give it a model, task, strategy, hardware, budget and seed at least."
        )
    if len(cells) > MOST_CELLS:
        raise Refused(f"The preset asks for more than {MOST_CELLS:,} cells; make two of it.")
    seen: set[str] = set()
    for cell in cells:
        if cell.id in seen:
            raise Refused(
                f"The preset asks twice for the cell {cell.label!r}; take what is there twice out of its lists."
            )
        seen.add(cell.id)
    return Preset(name, data["minutes"], cells)


def _cells(data: dict[str, Any], folder: Path | None, folders: Mapping[str, Path]) -> Iterator[Cell | SignalCell]:
    """Yield the cells of a preset whose answers are scored, then those of `signals`. Raise Refused, KeyError."""
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
    for model in data["models"]:
        yield from _cells_of(models[model["name"]], {**data, **model}, link, at_most, task_folders)
    yield from signal_cells_of(data, list(models.values()), at_most)


def _placed(model: Model, folders: Mapping[str, Path]) -> Model:
    """Return the model with the folder that is given for it, if any; one of ours is never called real."""
    if model.name in folders:
        model = replace(model, path=str(folders[model.name].absolute()), hub=None, revision=None)
    ours = model.hub is None and model.path is not None and lists_shipped_files(model.folder)
    return replace(model, weights=SHIPPED) if ours else model


def _model_fields(model: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model in a preset, without what it overrides of the preset."""
    return {name: value for name, value in model.items() if name not in OVERRIDABLE}


def _cells_of(
    model: Model, data: dict[str, Any], link: str | None, at_most: dict[str, int], task_folders: dict[str, str]
) -> Iterator[Cell]:
    """Yield the cells of one model; `data` is the preset with what this model overrides of it.

    By task, `at_most` is the most items that may be asked, and `task_folders` the folder of those that have one.
    """
    # 1. Refuse what cannot be: an unknown geometry, a budget too small, a checkpoint that is not there.
    if model.geometry not in GEOMETRIES:
        raise Refused(f"Unknown geometry {model.geometry!r}; {offer(model.geometry, sorted(GEOMETRIES))}.")
    cards = [_card(name, link) for name in data["hardware"]]
    for found in map(profile, cards):
        for budget in set(data["budgets"]) - {"smallest"}:
            slots_for(GEOMETRIES[model.geometry], parse_nbytes(budget), found.reserve_nbytes, PREFILL_BUFFERS)
    model_hash(model)
    items, few, timed = data["items"], data.get("swept_items", data["items"]), data.get("timed_items")
    chosen = [resolve(name) for name in data["strategies"]]
    own_gammas = [strategy.gamma for strategy in chosen]
    fewer = data.get("fewer_items", {})
    if unknown := set(fewer) - {strategy.name for strategy in chosen}:
        raise Refused(f"fewer_items names {sorted(unknown)[0]!r}, which is not among the strategies of {model.name}.")
    named = {*data.get("canaries", []), *data.get("task_items", {})}
    if unknown := named - set(TASKS) - set(GROUPS):  # a task may be known and not asked: a preset with fewer tasks
        raise Refused(f"{sorted(unknown)[0]!r} has a canary or a number of items, and is not a task; take it out.")
    for share in data.get("shares", []):
        percent_of(share)
    if min((items, *fewer.values())) < 1:
        raise Refused(f"Model {model.name} must be asked at least one item, also under {', '.join(fewer) or 'any'}.")
    # 2. List (strategy, budget, swept, items): the strategies at every budget, then the sweeps of gamma and of caches.
    first, gammas = next(iter(data["budgets"]), "smallest"), data["gammas"]
    runs = [
        (strategy, budget, False, min(items, fewer.get(strategy.name, items)))
        for strategy in chosen
        for budget in _budgets(strategy, data["budgets"])
    ]
    for sweeping in map(resolve, data.get("swept", ["mobile"])):
        runs += [(resolve(sweeping, gamma), first, True, few) for gamma in gammas if gamma not in own_gammas]
    runs += [(resolve(name), share, True, items) for name in data.get("caches", []) for share in data.get("shares", [])]

    # 3. For each seed, task, card and row format: a cell for each of them, then the canary's.
    formats = _formats(data)
    for seed, task, card, rows in product(data["seeds"], at_most, cards, formats):
        generation = partial(Generation, model, task, seed=seed, data=task_folders.get(task), hardware=card, rows=rows)
        for strategy, budget, swept, count in runs:
            # Every item is timed once for each way to answer. A part of them is timed otherwise, and where a lossless
            # strategy repeats full K's answers; one that needs a live run for that is asked no more than that part.
            name = ORACLE if strategy.routes_as_full_k else strategy.routed_by
            answers = strategy.name == name and (swept or budget == first)
            whole = strategy.name == ORACLE if strategy.lossless else answers
            asked = min(count, timed or count) if strategy.lossless and name != ORACLE else count
            live = generation(name, strategy.gamma, min(asked, at_most[task]))
            over = link
            # No trace says what one that knows the cache would have chosen: it answers in each cell itself, one prompt
            # at a time, which takes long. So it has one budget and one row format, the first ones.
            if strategy.knows_cache:
                whole, over = True, link or "virtual"
                if (budget, rows) != (first, formats[0]):
                    continue
            yield Cell(live, strategy.name, strategy.gamma, card, budget, swept, None if whole else timed, over)
        if task in data.get("canaries", []) and rows == AS_IS:
            scrambled = generation(ORACLE, None, min(data["canary_items"], at_most[task]), scrambled=True)
            yield Cell(scrambled, CANARY, None, card, "smallest", link=link)


def _formats(data: dict[str, Any]) -> list[str]:
    """Return the row formats of a preset. Raise Refused for one that is unknown."""
    formats: list[str] = data.get("rows", [AS_IS])
    for rows in formats:
        check_rows(rows)
    return formats


def _card(name: str, link: str | None) -> str:
    """Return a profile's name, or its file's absolute path. Over a real link "auto" stays: the card that is there."""
    if name.endswith(".json"):
        return str(Path(name).absolute())
    return name if name == "auto" and needs_gpu(link) else profile(name).name


def _budgets(strategy: Strategy, budgets: list[str]) -> list[str]:
    """Return the budgets that make a difference: none does to a strategy that keeps every expert."""
    return ["all"] if strategy.retain == "everything" else budgets
