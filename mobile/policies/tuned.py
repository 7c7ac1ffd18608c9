"""The file of `mobile tune`: a gamma, its signal, the model it was tuned for, and what was measured of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mobile import outputs
from mobile.costs.geometry import Geometry
from mobile.errors import Refused, one_line, shortened
from mobile.inputs import read_json
from mobile.policies.signals import SIGNALS
from mobile.suggest import offer

FORMAT = "mobile-gamma-1"
MOST_FILE_NBYTES = 1_000_000
ARCHITECTURE = ("name", "moe_layers", "experts", "top_k")  # of a geometry: what a gamma is tuned for


@dataclass(frozen=True)
class Tuned:
    """One tuned threshold. Losses are in points: percent of the items.

    `architecture` is the part of the model's geometry that `ARCHITECTURE` names. Of `items`, `answered` came with a
    right answer; `lost` are those that full K gets right and this setting does not (without an answer: whose text
    differs), `gained` the reverse. The true loss is from `low` to `high` points, each bound with `confidence`, and
    `certified` says that `high` is within `max_loss`. `fallback_rate` is per decoded token.
    """

    model: str
    architecture: dict[str, str | int]
    strategy: str
    signal: str
    gamma: float
    max_loss: float
    certified: bool
    items: int
    answered: int
    lost: int
    gained: int
    loss: float
    low: float
    high: float
    confidence: float
    fallback_rate: float
    max_new_tokens: int
    tasks: dict[str, str]  # by file's name, its SHA-256
    format: str = FORMAT

    def write(self, path: Path) -> None:
        """Write the file whole or not at all. Raise Refused where it cannot be written."""
        with outputs.open_atomic(path) as file:
            file.write(f"{json.dumps(asdict(self), indent=1, allow_nan=False)}\n".encode())


def architecture_of(geometry: Geometry) -> dict[str, str | int]:
    """Return what a gamma is tuned for."""
    return {name: getattr(geometry, name) for name in ARCHITECTURE}


def read(path: str | os.PathLike[str]) -> Tuned:
    """Read a file. Raise Refused unless it holds all fields, no others, and sound values."""
    name = shortened(ascii(os.fspath(path))[1:-1])
    try:
        data = read_json(Path(path), MOST_FILE_NBYTES)
        return _tuned(data)
    except (OSError, ValueError, TypeError) as error:
        raise Refused(
            f"Gamma cannot be read from {name} ({one_line(error)}); give a number, or a file that `mobile tune` wrote."
        ) from error


def check_model(gamma: Any, native: Geometry) -> None:
    """Raise Refused where `gamma` is a file that was tuned for another architecture than this model's."""
    if not isinstance(gamma, str | os.PathLike):
        return
    tuned = read(gamma)
    here = architecture_of(native)
    if tuned.architecture != here:
        said, mine = (_worded(each) for each in (tuned.architecture, here))
        raise Refused(
            f"This gamma was tuned for {shortened(ascii(tuned.model))} ({said}), and this model is {mine}; tune it "
            "for this one, or give a number."
        )


def _worded(architecture: dict[str, str | int]) -> str:
    name, layers, experts, top_k = (architecture[each] for each in ARCHITECTURE)
    return f"{shortened(ascii(name))[1:-1]}, {layers} layers of {experts} experts, {top_k} a token"


def _tuned(data: Any) -> Tuned:
    """Return the Tuned of which `asdict` made `data`. Raise ValueError for anything else."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"it is no {FORMAT} file")
    named = {field.name: field.type for field in fields(Tuned)}
    if set(data) != set(named):
        raise ValueError(f"its field {sorted(set(data) ^ set(named))[0][:40]!r} is missing or unknown")
    for name, kind in named.items():
        if not _is(data[name], str(kind)):
            raise ValueError(f"its {name} is not of the kind {kind}")
    if data["signal"] not in SIGNALS:
        raise ValueError(f"its signal {data['signal'][:40]!r} is unknown; {offer(data['signal'][:40], SIGNALS)}")
    if data["gamma"] < 0:
        raise ValueError("its gamma is negative")
    if set(data["architecture"]) != set(ARCHITECTURE):
        raise ValueError(f"its architecture is not of {', '.join(ARCHITECTURE)}")
    return Tuned(**{**data, "gamma": float(data["gamma"])})


def _is(value: Any, kind: str) -> bool:
    """Return whether a value of JSON is of the kind that a field's annotation names."""
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind.startswith("dict"):
        inside = (str, int) if "int" in kind else (str,)
        return isinstance(value, dict) and all(type(each) in inside for each in value.values())
    return type(value).__name__ == kind
