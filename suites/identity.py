"""What a result depends on: the model it is of, and hashes of the code, packages, tasks and weights behind it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mobile.errors import Refused
from suites.tasks.catalogue import PUBLISHED
from suites.tasks.files import FOLDER, locate

HERE = Path(__file__).parent
ENGINE = ("torch", "transformers", "numpy")  # what a result depends on wherever it is made
VERSIONED = (*ENGINE, "lm-eval")  # and where answers are scored


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


def bytes_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(*parts: Any) -> str:
    return bytes_hash(json.dumps(parts, sort_keys=True).encode())[:16]


@cache
def versions(of: tuple[str, ...] = VERSIONED) -> dict[str, str]:
    return {name: version(name) for name in of}


@cache
def task_hash(task: str, folder: Path | None = None) -> str:
    """SHA-256 over a task's items, and its YAML where that is ours; lm-eval's follow its version, the hub its name."""
    ours = FOLDER / f"{PUBLISHED[task].asked_as if task in PUBLISHED else task}.yaml"
    parts = [ours.read_bytes()] if ours.is_file() else []
    return bytes_hash(b"".join([*parts, *(path.read_bytes() for path in locate(task, folder).values())]))


@cache
def code_hash() -> str:
    """SHA-256 over the code that makes results: mobile, baselines and suites, models and presets left out."""
    rooms = [HERE, HERE.parent / "mobile", HERE.parent / "baselines"]
    files = sorted(path for room in rooms for path in room.rglob("*.py") if "models" not in path.parts)
    return bytes_hash(b"".join(path.name.encode() + path.read_bytes() for path in files))


@cache
def model_hash(model: Model) -> str:
    """SHA-256 of the checkpoint's list of hashes. Raises Refused if a file is missing or differs from the list.

    A real checkpoint has no list: of the hub it is its name and revision, in a folder its files' names and sizes.
    """
    if model.hub is not None:
        return bytes_hash(f"{model.hub}@{model.revision}".encode())
    sums = model.folder / "SHA256SUMS"
    if model.weights == "real" and (model.folder / "config.json").is_file():
        return digest([(path.name, path.stat().st_size) for path in sorted(model.folder.iterdir()) if path.is_file()])
    if not sums.is_file():
        raise Refused(f"Model {model.name} is not in {model.folder}: SHA256SUMS is missing.")
    for line in sums.read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        path = model.folder / name
        if not path.is_file() or bytes_hash(path.read_bytes()) != expected:
            raise Refused(f"{path} is missing or differs from SHA256SUMS; restore it from the repository.")
    return bytes_hash(sums.read_bytes())
