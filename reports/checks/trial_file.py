"""The file of a trial, typed: what `suites.abba` writes and `abba` judges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from suites.typed_json import Holding, Some


@dataclass(frozen=True)
class Side:
    """One of the two variants."""

    name: str


@dataclass(frozen=True)
class Repeat:
    """One repeat of the decode steps: its time, and what was counted meanwhile."""

    wall_ns: Some
    counters: dict[str, float]


@dataclass(frozen=True)
class Timed:
    """All repeats of one strategy in one process, and the tokens that it would have written."""

    strategy: str
    repeats: tuple[Annotated[dict[str, Any], Holding(Repeat)], ...]
    written: tuple[int, ...]
    ids_sha256: str


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    name: str
    uuid: str | None


@dataclass(frozen=True)
class Disk:
    """A disk; null where it is not known."""

    model: str | None
    source: str | None
    file_system: str | None


@dataclass(frozen=True)
class Process:
    """One process: where it ran, what it did, and what each strategy took."""

    steps: Some
    repeats: Some
    layers: Some | None
    model: str | None
    link: str
    cpu: str | None
    torch: str
    gpu: Annotated[dict[str, Any], Holding(Gpu)] | None
    git_commit: str | None
    git_dirty: bool | None
    strategies: tuple[Annotated[dict[str, Any], Holding(Timed)], ...]
    disk: Annotated[dict[str, Any], Holding(Disk)] | None = None


ProcessOf = Annotated[dict[str, Any], Holding(Process)]


@dataclass(frozen=True)
class Trial:
    """A trial of two sides, as many processes each."""

    kind: Literal["regression", "compare"]
    sides: tuple[Annotated[dict[str, Any], Holding(Side)], Annotated[dict[str, Any], Holding(Side)]]
    processes: tuple[tuple[ProcessOf, ...], tuple[ProcessOf, ...]]
    scope: str | None = None


def lacking(trial: dict[str, Any]) -> str | None:
    """Return what keeps the typed parts of a trial from being set against each other; None if nothing does."""
    processes = [process for side in trial["processes"] for process in side]
    if not _one_length(process["strategies"] for process in processes):
        return "its processes must have timed as many strategies each, one at least"
    timed = [one for process in processes for one in process["strategies"]]
    if not _one_length(one["repeats"] for one in timed):
        return "its strategies must have as many repeats each, one at least"
    if len({len(one["written"]) for one in timed}) > 1:
        return "its strategies must have written as many tokens each"
    return None


def _one_length(lists: Iterable[Sequence[Any]]) -> bool:
    """Return whether there are lists, as long as each other, and none is empty."""
    lengths = {len(one) for one in lists}
    return len(lengths) == 1 and 0 not in lengths
