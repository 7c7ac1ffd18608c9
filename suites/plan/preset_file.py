"""The file of a preset: TOML, in which each key is known and of its type.

Which of the keys must be there, and which values go together, those say who use them.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from suites.strict_json import LARGEST_FLOAT, LARGEST_INT, read_bytes
from suites.typed_json import Amount, Matching, Rate, Some, typed

MOST_NBYTES = 2**20
Word = Annotated[str, Matching(r"[^\x00-\x1f\x7f]{1,200}", "a text of 1 to 200 characters")]
Place = Annotated[str, Matching(r"[^\x00-\x1f\x7f]{1,4000}", "a path")]
Words = tuple[Word, ...]
Places = tuple[Place, ...]


@dataclass(frozen=True)
class ModelRow:
    """A model of a scored preset, and what it sets for itself."""

    name: str = ""
    geometry: Word = ""
    weights: Word = ""
    path: Place = ""
    hub: Word = ""
    revision: Word = ""
    family: str = ""
    training_seed: int = 0
    strategies: Words = ()
    budgets: Words = ()
    gammas: tuple[Amount, ...] = ()
    swept: Words = ()
    rows: Words = ()
    caches: Words = ()
    shares: Words = ()
    canaries: Words = ()
    items: int = 0
    fewer_items: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredPreset:
    """A preset whose answers are scored."""

    minutes: Rate = 1
    tasks: Words = ()
    items: int = 0
    seeds: tuple[int, ...] = ()
    hardware: Places = ()
    budgets: Words = ()
    strategies: Words = ()
    gammas: tuple[Amount, ...] = ()
    swept: Words = ()
    rows: Words = ()
    models: tuple[ModelRow, ...] = ()
    measured: Word = ""
    timed_items: int = 0
    swept_items: int = 0
    canary_items: Some = 1
    task_items: dict[str, Some] = field(default_factory=dict)
    fewer_items: dict[str, int] = field(default_factory=dict)
    link: Word = ""
    caches: Words = ()
    shares: Words = ()
    canaries: Words = ()
    signals: Words = ()
    signal_items: Some = 1


@dataclass(frozen=True)
class AccuracyPreset:
    """A preset of rounds of fresh items."""

    minutes: Rate = 1
    tasks: Words = ()
    fresh_items: Some = 1
    rounds: Some = 1
    margin_points: Rate = 1
    gammas: tuple[Amount, ...] = ()
    seeds: tuple[int, ...] = ()
    models: tuple[ModelRow, ...] = ()


@dataclass(frozen=True)
class SyntheticModelRow:
    """A model of a preset with runs."""

    name: str = ""
    geometry: Word = ""
    path: Place = ""
    hub: Word = ""
    revision: Word = ""
    family: str = ""
    training_seed: int = 0
    budgets: Words = ()
    layers: Some = 1
    shrink: Some = 1


@dataclass(frozen=True)
class RunRow:
    """A table of [[runs]]; a link is "native" or a rate."""

    routing: Word = ""
    links: tuple[Any, ...] = ()
    strategies: Words = ()
    rates: tuple[Amount, ...] = ()
    budgets: Words = ()
    rows: Words = ()


@dataclass(frozen=True)
class SyntheticPreset:
    """A preset of cells that play a script."""

    minutes: Rate = 1
    link: Word = ""
    hardware: Places = ()
    seeds: tuple[int, ...] = ()
    prompt_tokens: Some = 1
    warmup_tokens: Some = 1
    decode_tokens: Some = 1
    repeats: Some = 1
    runs: tuple[RunRow, ...] = ()
    models: tuple[SyntheticModelRow, ...] = ()
    budgets: Words = ()
    layers: Some = 1
    shrink: Some = 1
    beside: Words = ()
    beside_memory: Word = ""
    beside_tokens: Some = 1
    beside_repeats: Some = 1


def read(path: Path) -> dict[str, Any]:
    """Read a preset's file. Raise ValueError, which names the key, for what is no preset; OSError."""
    try:
        data = tomllib.loads(read_bytes(path, MOST_NBYTES).decode())
    except RecursionError as error:
        raise ValueError("it is nested too deep to be read") from error
    _hold_numbers(data)
    shape = SyntheticPreset if "runs" in data else AccuracyPreset if "rounds" in data else ScoredPreset
    typed(data, shape, "it holds")
    return data


def _hold_numbers(value: Any) -> None:
    """Raise ValueError for a number that is none or beyond any measurement, and for what only TOML has: times."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _hold_numbers(each)
    elif not isinstance(value, str | bool | int | float):
        raise ValueError(f"{value} is a date or a time, of which a preset has none")
    elif not isinstance(value, str) and not abs(value) <= (LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT):
        raise ValueError(f"the number {str(value)[:40]} is none that a preset can have")
