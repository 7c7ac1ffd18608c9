"""The identity of a result: the model it is of, and hashes of the code, packages, tasks and weights behind it."""

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
ENGINE = ("torch", "transformers", "numpy")  # packages that every result depends on
LONGEST_NAME = 100
VERSIONED = (*ENGINE, "lm-eval")  # and those that a scored result depends on
SUMS, SHIPPED = "SHA256SUMS", "shipped-tiny"
SAMPLES, SAMPLE_NBYTES = 64, 2**14


def check_name(whose: str, name: Any) -> None:
    """Raise Refused unless the name is 1 to 100 printable characters: it stands in labels, tables and pages."""
    if not (isinstance(name, str) and name.strip() and len(name) <= LONGEST_NAME and name.isprintable()):
        shown = ascii(name)
        raise Refused(
            f"{whose} cannot be called {shown if len(shown) <= LONGEST_NAME else f'{shown[:LONGEST_NAME]}...'}; give a "
            f"name of 1 to {LONGEST_NAME} printable characters."
        )


@dataclass(frozen=True)
class Model:
    """A checkpoint, and the real model whose sizes its times are computed from.

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

    def __post_init__(self) -> None:
        """Raise Refused for a name or a family that cannot be printed."""
        check_name("A model", self.name)
        if self.family is not None:
            check_name("A family", self.family)

    @property
    def folder(self) -> Path:
        """Return where it lies. Raise Refused for a model of the hub."""
        if self.path is None:
            raise Refused(f"Model {self.name} lies on the hub and has no folder here; give --model {self.name}=FOLDER.")
        return HERE / self.path


def bytes_hash(data: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(*parts: Any) -> str:
    """Return 16 hexadecimal digits that depend on all parts, which are JSON."""
    return bytes_hash(json.dumps(parts, sort_keys=True).encode())[:16]


@cache
def versions(of: tuple[str, ...] = VERSIONED) -> dict[str, str]:
    """Return the installed versions of packages."""
    return {name: version(name) for name in of}


@cache
def task_hash(task: str, folder: Path | None = None) -> str:
    """Return the SHA-256 of a task's items, and of its YAML where that is ours.

    lm-eval's YAML depends on lm-eval's version, and the items of the hub are identified by the task's name alone.
    """
    ours = FOLDER / f"{PUBLISHED[task].asked_as if task in PUBLISHED else task}.yaml"
    parts = [ours.read_bytes()] if ours.is_file() else []
    return bytes_hash(b"".join([*parts, *(path.read_bytes() for path in locate(task, folder).values())]))


@cache
def code_hash() -> str:
    """Return the SHA-256 of the code that makes results: mobile, baselines and suites, but no models and no presets."""
    rooms = [HERE, HERE.parent / "mobile", HERE.parent / "baselines"]
    files = sorted(path for room in rooms for path in room.rglob("*.py") if "models" not in path.parts)
    return bytes_hash(b"".join(path.name.encode() + path.read_bytes() for path in files))


@cache
def model_hash(model: Model) -> str:
    """Return the SHA-256 of the checkpoint's list of hashes.

    A real checkpoint has no list: of the hub it is its name and revision, in a folder its files' names, sizes and
    samples. Raise Refused for a file that is missing or differs, and for a model that is called ours and is not.
    """
    if model.hub is not None:
        if model.weights == SHIPPED:
            raise Refused(
                f'Model {model.name} lies on the hub and is none that is shipped here; say weights = "real" of it.'
            )
        return bytes_hash(f"{model.hub}@{model.revision}".encode())
    if model.weights == "real" and (model.folder / "config.json").is_file():
        files = sorted(path for path in model.folder.iterdir() if path.is_file())
        return digest([(path.name, path.stat().st_size, bytes_hash(_samples(path))) for path in files])
    sums = model.folder / SUMS
    if not sums.is_file():
        raise Refused(f"Model {model.name} is not in {model.folder}: {SUMS} is missing.")
    if model.weights == SHIPPED and not lists_shipped_files(model.folder):
        raise Refused(
            f"{model.folder} holds no model that is shipped here, and {model.name} is to be one (weights = "
            f'"{SHIPPED}"); leave --model {model.name}=FOLDER out, or name another model in a preset of your own, with '
            'weights = "real".'
        )
    if model.weights == SHIPPED and _shipped_lists().get(model.name, sums.read_bytes()) != sums.read_bytes():
        raise Refused(
            f"{model.folder} holds another of the models that are shipped here, and not {model.name}; call it by its "
            "own name, or give the folder of that one."
        )
    listed = {name: expected for expected, name in map(str.split, sums.read_text(encoding="utf-8").splitlines())}
    for name, expected in listed.items():
        path = model.folder / name
        if not path.is_file() or bytes_hash(path.read_bytes()) != expected:
            raise Refused(f"{path} is missing or differs from {SUMS}; restore it from the repository.")
    if strange := {path.name for path in model.folder.iterdir()} - {*listed, SUMS, "README.md"}:
        raise Refused(f"{model.folder / min(strange)} is not among the files of {SUMS}; take it out.")
    return bytes_hash(sums.read_bytes())


@cache
def lists_shipped_files(folder: Path) -> bool:
    """Return whether the folder's list of hashes is that of a model in suites/models. Its files are not looked at."""
    sums = folder / SUMS
    return sums.is_file() and sums.read_bytes() in _shipped_lists().values()


@cache
def _shipped_lists() -> dict[str, bytes]:
    """Return the list of hashes of each model in suites/models, by its name."""
    return {path.parent.name: path.read_bytes() for path in (HERE / "models").glob(f"*/{SUMS}")}


def _samples(path: Path) -> bytes:
    """Return pieces of a file, evenly spaced: all of a small one, 1 MiB of a large one, which takes minutes to hash."""
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        if nbytes <= SAMPLES * SAMPLE_NBYTES:
            return file.read()
        found = []
        for number in range(SAMPLES):
            file.seek(number * (nbytes - SAMPLE_NBYTES) // (SAMPLES - 1))
            found.append(file.read(SAMPLE_NBYTES))
        return b"".join(found)
